#!/usr/bin/env bash
# Installs naruto_lora and runs it: `usage` says how. For bash 3.2 (macOS) and newer.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
cd "$root"
torch_cpu=https://download.pytorch.org/whl/cpu # Linux wheels without the gigabytes of CUDA

usage() {
    cat <<'TEXT'
bash colab_setup.sh run [OPTIONS]   install, then execute the five notebooks on the embedded default
bash colab_setup.sh test [OPTIONS]  install, then run the tests (options go to pytest)
bash colab_setup.sh                 prepare a Colab machine (elsewhere: show this help)
The first two use the active virtual environment, or else create .venv beside this script.
TEXT
}

fail() {
    echo "colab_setup.sh: $*" >&2
    exit 1
}

on_colab() { [ -n "${COLAB_RELEASE_TAG:-}" ]; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

too_old() {
    local found
    found=$("$1" --version 2>/dev/null) || found="missing"
    fail "Python 3.11 or newer is needed, but $1 is $found: install a newer Python" \
        "(python.org or your system's packages), or activate an environment that has one."
}

find_python() { # tries each name: one on the PATH may be a shim that doesn't start
    local name
    for name in python3 python3.13 python3.12 python3.11; do
        if new_enough "$name"; then
            command -v "$name"
            return
        fi
    done
    too_old python3
}

need_disk() { # FOLDER GIGABYTES
    local free
    free=$(df -Pk "$1" | sed -n 's/.* \([0-9][0-9]*\)  *[0-9][0-9]*% .*/\1/p')
    [ "${free:-999999999}" -ge $(($2 * 1000000)) ] ||
        fail "about $2 GB of free disk space are needed in $1, but only $((free / 1000)) MB are free:" \
            "make room, or activate a virtual environment on a larger disk."
}

choose_environment() { # sets python, and where: the folder to install into
    if [ -n "${VIRTUAL_ENV:-}" ]; then
        where=$VIRTUAL_ENV
        python=$where/bin/python
        [ -x "$python" ] || fail "VIRTUAL_ENV is $where, which has no bin/python: run 'unset VIRTUAL_ENV'."
        new_enough "$python" || too_old "$python"
    elif on_colab; then
        python=$(find_python)
        where=$("$python" -c 'import sys; print(sys.prefix)')
    else
        where=$root/.venv
        python=$where/bin/python
        new_enough "$python" || make_environment
        export VIRTUAL_ENV=$where
    fi
    log=$where/naruto_lora.log
}

make_environment() {
    local base
    base=$(find_python)
    need_disk "$root" 4
    echo "Creating a virtual environment: $where"
    "$base" -m venv --clear "$where" >/dev/null 2>&1 ||
        fail "$base can't create a virtual environment in $where: check that the folder is writable and" \
            "that Python's venv module is complete (Debian and Ubuntu: apt install python3-venv)."
}

pip() { "$python" -m pip "$@" >"$log" 2>&1 </dev/null; }

explain() { # fails with one sentence: why pip failed
    local address network='NewConnectionError|Failed to establish|[Nn]ame ?[Rr]esolution|ConnectTimeout'
    network="$network|ReadTimeout|timed out|ProxyError|SSLError|Connection refused|Network is unreachable"
    if grep -q 'No space left on device' "$log"; then
        fail "the disk of $where, or of pip's temporary folder, is full: make room and run this again."
    elif grep -Eq "$network" "$log"; then
        address=$(COLUMNS=300 "$python" -m pip install --help 2>/dev/null |
            sed -n 's/.*(default \(http[^)]*\)).*/\1/p') || true
        fail "the package registry ${address:-of pip} can't be reached: check the network" \
            "(or set HTTPS_PROXY or PIP_INDEX_URL) and run this again (log: $log)."
    fi
    tail -n 15 "$log" >&2
    fail "pip failed with the error above (full log: $log)."
}

install() { # run | test. A stamp file in the environment says what is installed; test includes run
    local key stamp=$where/naruto_lora.stamp
    key="$(cat requirements.txt pyproject.toml | cksum) $root"
    if grep -Fqxs -e "$key test" -e "$key $1" "$stamp"; then return; fi
    need_disk "$where" 4
    : 2>/dev/null >"$log" || fail "$where isn't writable: activate your own virtual environment."
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >"$log" 2>&1 ||
        fail "$python has no pip and can't install it (Debian and Ubuntu: apt install python3-venv)."
    echo "Installing into $where (takes some minutes; log: $log)"
    install_torch
    if [ "$1" = test ]; then set -- test --editable '.[test]'; else set -- run --editable .; fi
    if on_colab; then # the image's packages may not change under the running kernel
        "$python" -m pip list --format=freeze 2>/dev/null >"$where/naruto_lora.txt"
        set -- "$@" --constraint "$where/naruto_lora.txt"
    fi
    pip install --no-input "${@:2}" || explain
    echo "$key $1" >"$stamp"
}

install_torch() { # if there is no torch yet: on Linux without an NVIDIA GPU the CPU build
    if [ "$(uname -s)" != Linux ] || pip show torch; then return; fi
    if ! nvidia-smi -L >/dev/null 2>&1; then
        # also as the extra index: another one from the user's settings would offer the large build
        if PIP_EXTRA_INDEX_URL=$torch_cpu pip install --no-input --no-deps --retries 0 --timeout 8 \
            --index-url "$torch_cpu" "$(grep '^torch>' requirements.txt)"; then return; fi
    fi
    need_disk "$where" 10
}

colab_plan() { # prints lines: install REQUIREMENT | old NAME VERSION FLOOR | uninstall NAME VERSION | self
    cd / # or the import below would find the current folder
    python3 - "$root" <<'PY'
import importlib.util, re, sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

def have(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None

def numbers(version):
    return [int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3]]

root = Path(sys.argv[1]).resolve()
leave = {"torch", "ipywidgets", "matplotlib", "papermill", "nbval"}  # Colab's own, or of no use there
for line in (root / "requirements.txt").read_text().splitlines():
    name, _, floor = line.partition(">=")
    if not floor:
        continue
    if not have(name) and name not in leave:
        print("install", line)
    elif have(name) and numbers(have(name)) < numbers(floor):
        print("old", name, have(name), floor)
torchao = have("torchao")
if torchao and numbers(torchao) < [0, 16]:
    print("uninstall torchao", torchao)
spec = importlib.util.find_spec("naruto_lora")
if not (spec and spec.origin and Path(spec.origin).resolve().parent == root / "naruto_lora"):
    print("self")
PY
}

prepare_colab() { # --no-deps throughout: packages that the running kernel has loaded must not change
    local plan word what
    python=python3 where=${TMPDIR:-/tmp} log=${TMPDIR:-/tmp}/naruto_lora.log
    plan=$(colab_plan)
    while read -r word what; do
        case $word in
            install)
                pip install --no-input --no-deps "$what" || explain
                echo "Installed $what" ;;
            old) # to replace it under a running kernel would need a restart
                echo "This image's ${what% *} is older than ${what##* }, the oldest tested version:" \
                    "choose the newest runtime version (Runtime › Change runtime type)." ;;
            uninstall)
                pip uninstall --yes "${what% *}" || explain
                echo "Removed torchao ${what#* } (peft needs 0.16 or newer, or none)" ;;
            self)
                pip install --no-input --no-deps --editable . || explain
                echo "Installed naruto_lora from $root" ;;
        esac
    done <<<"$plan"
    echo "This Colab machine is ready."
}

command=${1:-}
case $command in
    run | test)
        shift
        if on_colab && [ -z "${VIRTUAL_ENV:-}" ]; then prepare_colab; fi
        choose_environment
        install "$command"
        if [ -n "${VIRTUAL_ENV:-}" ]; then export PATH="$VIRTUAL_ENV/bin:$PATH"; fi
        export PYDEVD_DISABLE_FILE_VALIDATION=1 # else each kernel on Python 3.13 prints four lines
        if [ "$command" = run ]; then exec "$python" -m naruto_lora.tiny.run "$@"; fi
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # one core for each process
        exec "$python" -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@" ;;
    '') if on_colab; then prepare_colab; else usage; fi ;;
    *) usage >&2 && fail "there is no command '$command'." ;;
esac
