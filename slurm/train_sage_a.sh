#!/usr/bin/env bash
# The paper's setting A (VQ, MQ and TA weigh the same): SAGE with the dual moving KL, HunyuanVideo-1.5 at 480p.
#
#   sbatch slurm/train_sage_a.sh optimizer.lr=5e-6       in the repository's root; the arguments are those of `train`
#   sbatch slurm/train_sage_a.sh run.yaml                a configuration of your own instead of the recipe
#   sbatch --array=0-4 slurm/train_sage_a.sh seed=%a     five runs; %a is the task's number
#   DRYRUN=1 bash slurm/train_sage_a.sh                  check the settings and print what would run
#
# Options of sbatch win over these lines: sbatch --nodes=4 --partition=NAME --account=NAME slurm/train_sage_a.sh
#SBATCH --job-name=sage_a
#SBATCH --nodes=8
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1      # torchrun, which starts a process for each GPU
#SBATCH --exclusive              # all cores of the nodes
#SBATCH --mem=0                  # and all their memory: references and trajectories wait there
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@900        # so long before the limit the run saves and leaves, and the job is queued again
#SBATCH --requeue                # and Slurm queues it again when a node fails
#SBATCH --open-mode=append       # into the same log
#SBATCH --output=%x-%j.out
# Nothing else of your shell is handed over: it may hold tokens.
#SBATCH --export=HOME,USER,PATH,PYTHON,DRYRUN,MAX_RETRIES,REWARD_TOKEN_FILE
[[ -n ${SLURM_JOB_ID:-} ]] || cd "$(dirname "$0")/.." || exit
source slurm/common.sh || exit
train hv15_480p_a_sage_dual "$@"
