#!/usr/bin/env bash
# The same configuration on 1, 2, 4, ... nodes of one job, one size after the other: how throughput scales.
#
#   sbatch slurm/scaling_study.sh run.yaml [--layouts ...] [key=value ...]     in the repository's root
#   DRYRUN=1 bash slurm/scaling_study.sh run.yaml              print what would run
#SBATCH --job-name=sage_scaling
#SBATCH --nodes=8                # the largest size
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1      # torchrun, which starts a process for each GPU
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.out
#SBATCH --export=HOME,USER,PATH,PYTHON,DRYRUN    # nothing else of your shell: it may hold tokens
[[ -n ${SLURM_JOB_ID:-} ]] || cd "$(dirname "$0")/.." || exit
source slurm/common.sh || exit

(($#)) || fail "usage: sbatch slurm/scaling_study.sh CONFIG [key=value ...]"
config=$1
shift
prepare
failed=
for ((nodes = 1; nodes <= NODES; nodes *= 2)); do
    launch "$nodes" scaling "$config" --out "runs/scaling/${SLURM_JOB_ID:-JOB}" "$@"
    printf '[slurm] %s\n' "$(printf '%q ' "${LAUNCH[@]}")"
    [[ -n ${DRYRUN:-} ]] || "${LAUNCH[@]}" || failed+=" $((nodes * RANKS))"
done
[[ -z $failed ]] || fail "scaling: the sizes that failed:$failed"
