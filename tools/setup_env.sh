#!/usr/bin/env bash
# One step of the set-up, called by the Makefile: setup_env.sh venv|torch|lock|package VENV
# From the environment: PYTHON, the interpreter; TORCH, what to hand pip for torch (default: the CPU build).
set -euo pipefail

step=$1
venv=$2
pip=("$venv/bin/python" -m pip)

say() { printf '[setup] %s\n' "$*"; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# The first Python that the pinned versions admit; PYTHON=... decides otherwise.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.11 or 3.12 is needed, found ${PYTHON:-$(python3 --version 2>&1 || true)}; name one: make setup PYTHON=/path/to/python3.11"
}

make_venv() {
    local python
    if [[ -x $venv/bin/python ]] && "${pip[@]}" --version >/dev/null 2>&1; then
        say "$venv is there"
        return
    fi
    python=$(find_python) || exit 2
    say "creating $venv with $("$python" --version)"
    # Debian splits ensurepip off into python3-venv; where it is missing, the system's pip fills the new environment.
    "$python" -m venv "$venv" >/dev/null 2>&1 ||
        { "$python" -m venv --clear --without-pip "$venv" && "$python" -m pip -qq --python "$venv/bin/python" install pip; } ||
        fail "$python can make no virtual environment with pip; on Debian: apt install python3-venv"
}

# pip without the notes on configured index locations that do not exist, which say nothing about this project.
# --no-compile: only what is imported is ever compiled, which saves a minute on thousands of modules.
pip_install() {
    "${pip[@]}" install --no-compile "$@" 2> >(grep -v '^WARNING: Location' >&2 || true)
}

install_torch() {
    local wanted
    read -ra wanted <<<"${TORCH:-}"
    if ((${#wanted[@]})); then
        say "installing ${wanted[*]}"
        # A CPU build would satisfy the pin of a CUDA build of the same version, and stay.
        "${pip[@]}" uninstall -qq -y torch 2>/dev/null || true
        pip_install "${wanted[@]}"
    elif "${pip[@]}" install -qq --dry-run --no-deps -r requirements-torch.txt >/dev/null 2>&1; then
        say "installing torch (CPU build)"
        pip_install -r requirements-torch.txt
    else
        say "installing torch (CPU build, from download.pytorch.org)"
        pip_install --extra-index-url https://download.pytorch.org/whl/cpu -r requirements-torch.txt
    fi
}

install_lock() {
    local total constraint terminal=0
    [[ -t 1 ]] && terminal=1
    total=$(grep -c '==' requirements.lock)
    constraint=$venv/.stamp/torch.txt
    # The torch that is there is the only one that pip may consider: nothing can replace or double it.
    "$venv/bin/python" -c 'from importlib.metadata import version as v; print("torch==" + v("torch"))' >"$constraint"
    say "installing $total packages"
    pip_install --progress-bar off -r requirements.lock -c "$constraint" |
        awk -v total="$total" -v terminal="$terminal" '
            /^(Collecting|Processing|Requirement already satisfied)/ {
                if (n < total) n++
                name = $2 == "already" ? $4 : $2
                sub(/.*\//, "", name)
                if (terminal) printf "\r[setup] %d/%d %-50.50s", n, total, name
                else if (n % 30 == 0 && n > shown) printf "[setup] %d/%d\n", shown = n, total
                fflush()
            }
            /^Installing collected/ { printf terminal ? "\r[setup] unpacking %-60s" : "[setup] unpacking%s\n", ""; fflush() }
            END { if (terminal) printf "\r%-70s\r", "" }'
    say "packages are installed"
}

install_package() {
    "${pip[@]}" install -qq --no-deps --no-build-isolation -e .
    say "megatron-sage is installed in $venv"
}

case $step in
    venv) make_venv ;;
    torch) install_torch ;;
    lock) install_lock ;;
    package) install_package ;;
    *) fail "unknown step $step" ;;
esac
