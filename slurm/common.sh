# shellcheck shell=bash
# What the scripts beside it share. They source it in the repository's root, on the first node of a job.
set -euo pipefail

PYTHON=${PYTHON:-.venv/bin/python}
MAX_RETRIES=${MAX_RETRIES:-3} # how often, in a row, a job is queued again without a further iteration
STARTS=${SLURM_RESTART_COUNT:-0}

say() { printf '[slurm] %s\n' "$*"; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}
asked() { sed -n "s/^#SBATCH --$1=\([^ ]*\).*/\1/p" "$0"; } # for a dry run outside of a job

# The job's size, the launcher, and the settings of all processes. srun starts one torchrun a node, torchrun one process
# a GPU.
prepare() {
    [[ -n ${SLURM_JOB_ID:-}${DRYRUN:-} ]] || fail "$0: is for sbatch; DRYRUN=1 bash $0 prints what would run"
    NODES=${SLURM_JOB_NUM_NODES:-$(asked nodes)}
    RANKS=${SLURM_GPUS_PER_NODE:-} # "8" or "h100:8": what was asked for, --exclusive may give more
    RANKS=${RANKS##*:}
    # a trial without GPUs, sbatch --gpus-per-node=0 --cpus-per-task=2: a process for each CPU
    ((RANKS)) || RANKS=${SLURM_CPUS_PER_TASK:-}
    [[ -n ${SLURM_JOB_ID:-} ]] || RANKS=$(asked gpus-per-node)
    [[ $RANKS =~ ^[1-9][0-9]*$ ]] ||
        fail "--gpus-per-node=${SLURM_GPUS_PER_NODE:-}: a number is needed; without GPUs, --gpus-per-node=0 --cpus-per-task=N"

    local cpus=${SLURM_CPUS_ON_NODE:-$RANKS}
    export OMP_NUM_THREADS=$((cpus > RANKS ? cpus / RANKS : 1)) # all processes together: the CPUs that the job has
    export NCCL_DEBUG=WARN                                      # faults of the network stand in the log
    export HF_HUB_OFFLINE=1                                     # all files are local: nobody waits for a hub
    export PYTHONUNBUFFERED=1                                   # the log is up to date when a node dies
    # A token stays in its file until here: what sbatch exports is kept with the job.
    [[ -z ${REWARD_TOKEN_FILE:-} ]] || MEGATRON_SAGE_REWARD_TOKEN=$(<"$REWARD_TOKEN_FILE")
    export MEGATRON_SAGE_REWARD_TOKEN
    # Where host names lead to a slow network, or to the loopback, name the interface for NCCL and for gloo:
    # export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
}

# launch NODES COMMAND...: sets LAUNCH, a megatron-sage command under torchrun on so many of the job's nodes.
launch() {
    local nodes=$1 port=$((20000 + ${SLURM_JOB_ID:-0} % 10000)) # neither Ray's nor one that the kernel gives to clients
    shift
    LAUNCH=(
        srun --nodes "$nodes" --ntasks "$nodes"
        --export=ALL         # the variables above; sbatch's --export would hold for srun as well
        --cpu-bind=none      # a task is a whole node: not to be bound to one core
        --kill-on-bad-exit=0 # a torchrun that has ended after saving must not end another that still saves ...
        --wait=120           # ... but none may stay for ever when one is gone
        "$PYTHON" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$RANKS"
        --rdzv-backend c10d --rdzv-endpoint "$(hostname):$port" # the batch script runs on the first node
        --rdzv-id "${SLURM_JOB_ID:-JOB}.$STARTS"                # what is left of an earlier start may not join
        --signals-to-handle 'SIGTERM,SIGINT,SIGUSR1,SIGUSR2'    # USR1 would end torchrun and leave its workers
        --shutdown-timeout 840                                  # to save; Slurm's own limit comes 900 s after the signal
        -m megatron_sage "$@"
    )
}

# arguments RECIPE ARGUMENT...: sets ARGUMENTS for `train`: the recipe unless another one or a file is named.
arguments() {
    local recipe=$1 argument named=
    shift
    for argument in "$@"; do
        [[ $argument == *=* && $argument != --recipe* ]] || named=yes
        [[ $argument != *%a* || -n ${SLURM_ARRAY_TASK_ID:-} ]] ||
            fail "$argument: %a is an array task's number: sbatch --array=0-4 (dry run: SLURM_ARRAY_TASK_ID=0)"
    done
    ARGUMENTS=(training.resume=auto "${@//%a/${SLURM_ARRAY_TASK_ID:-}}") # yours come last, and win
    [[ -n $named ]] || ARGUMENTS=(--recipe "$recipe" "${ARGUMENTS[@]}")
}

# Checks the settings before any GPU is used, and prints them; status 2 and one line where they are wrong.
resolve() { WORLD_SIZE=$((NODES * RANKS)) "$PYTHON" -m megatron_sage train "${ARGUMENTS[@]}" --print-config; }

# Sets CONFIG (YAML) and RUN, the run's directory: each task of an array has its own.
resolve_run() {
    CONFIG=$(resolve) || return 2
    RUN=$("$PYTHON" -c 'import sys, yaml; print(yaml.safe_load(sys.argv[1])["output_dir"])' "$CONFIG")
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        RUN=${RUN}_$SLURM_ARRAY_TASK_ID
        ARGUMENTS+=("output_dir=$RUN")
        CONFIG=$(resolve) || return 2
    fi
}

# JOB names this job and no other: the job id of an array's last task is also that of the whole array.
claim() {
    JOB=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
    local other
    other=$(cat "$RUN/slurm/job" 2>/dev/null || true)
    if [[ -n $other && $other != "$JOB" && -n $(squeue --noheader --jobs "$other" 2>/dev/null) ]]; then
        fail "output_dir=$RUN: job $other trains there: scancel it, or choose another directory"
    fi
    mkdir -p "$RUN/slurm"
    echo "$JOB" >"$RUN/slurm/job"
    ((STARTS)) || rm -f "$RUN/slurm/progress"
}

# What this start runs: RUN/slurm/JOB.START/. A job that waited in the queue runs the code that it finds afterwards.
snapshot() {
    local folder=$RUN/slurm/$JOB.$STARTS
    mkdir -p "$folder"
    printf '%s\n' "$CONFIG" >"$folder/config.yaml"
    printf '%q ' "${LAUNCH[@]}" >"$folder/command.txt"
    scontrol show job "$JOB" >"$folder/job.txt"
    if git rev-parse HEAD >/dev/null 2>&1; then
        { git describe --always --tags --dirty && git status --short; } >"$folder/code.txt"
        git diff --binary HEAD >"$folder/code.diff"
    else
        echo "not a git checkout" >"$folder/code.txt"
    fi
}

# "CODE ITERATION" of the run that has ended, from its status.json: torchrun does not pass statuses on.
outcome() {
    "$PYTHON" - "$RUN/status.json" <<'PYTHON_END'
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
found = json.loads(path.read_text()) if path.exists() else {}
code = found.get("exit_code")  # null: killed from outside; no file: it did not come so far
print(1 if code is None else code, found.get("iteration") or 0)
PYTHON_END
}

# Queue the job again, unless a further start cannot help: CODE ITERATION.
again() {
    local code=$1 iteration=$2 best=0 retries=0
    ((code != 2)) || { say "status 2, see \"reason\" in $RUN/status.json: not queued again"; return; }
    [[ ! -f $RUN/slurm/progress ]] || read -r best retries <"$RUN/slurm/progress"
    if ((iteration > best)); then best=$iteration retries=0; else retries=$((retries + 1)); fi
    echo "$best $retries" >"$RUN/slurm/progress"
    if ((retries > MAX_RETRIES)); then
        say "status $code: $retries starts in a row without a further iteration: not queued again"
    else
        say "status $code after $iteration iterations: to be queued again" # said first: scontrol ends this script
        scontrol requeue "$JOB" || say "not by this script: Slurm has done it, or may not (Requeue=0): then submit it again"
    fi
}

# The whole of a training job: train RECIPE ARGUMENT...
train() {
    prepare
    arguments "$@"
    if [[ -n ${DRYRUN:-} ]]; then
        dry_run
        return
    fi
    resolve_run || exit 2
    claim
    launch "$NODES" train "${ARGUMENTS[@]}"
    snapshot
    say "job $JOB, start $STARTS: $NODES nodes x $RANKS processes into $RUN"
    rm -f "$RUN/status.json" # what stands there afterwards is of this start
    local status=0 found code iteration
    "${LAUNCH[@]}" || status=$?
    found=$(outcome)
    read -r code iteration <<<"$found"
    if ((code == 0)); then
        say "finished"
        return
    fi
    say "srun has ended with $status"
    again "$code" "$iteration"
    exit "$code"
}

dry_run() {
    say "dry run: $NODES nodes x $RANKS processes, OMP_NUM_THREADS=$OMP_NUM_THREADS"
    if resolve_run; then
        say "the settings are accepted; the run's directory is $RUN"
    else
        say "the settings would be refused"
    fi
    launch "$NODES" train "${ARGUMENTS[@]}"
    printf '%q ' "${LAUNCH[@]}"
    echo
}
