#!/usr/bin/env bash
# Slurm's daemons for `make test-slurm`, from Debian's packages; does nothing where they are. Nothing is configured.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

missing=()
for program in munged slurmctld slurmd sbatch; do
    command -v "$program" >/dev/null || missing+=("$program")
done
((${#missing[@]})) || exit 0

command=(apt-get install -y -qq --no-install-recommends slurm-wlm munge)
if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
    printf 'error: %s: not installed; as root: %s\n' "${missing[*]}" "${command[*]}" >&2
    exit 2
fi
printf '[setup] installing slurm-wlm and munge\n'
log=$(mktemp)
if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive "${command[@]}"; } >"$log" 2>&1; then
    tail -n 5 "$log" >&2
    printf 'error: %s failed; its output is in %s\n' "${command[*]}" "$log" >&2
    exit 2
fi
rm -f "$log"
