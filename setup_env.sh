#!/usr/bin/env bash
# Sets up .venv in the project and runs something in it; what is there already is not done again.
#
#   bash setup_env.sh                       nothing more
#   bash setup_env.sh demo [driver flags]   the main job on emoji32: sample, gather, evaluate, grid
#   bash setup_env.sh test [pytest flags]   lint and tests, from the project's folder
#
# PYTHON=/path/to/python3 chooses the interpreter.
set -euo pipefail
readonly STARTED_IN=$PWD # where paths that the user types start
if [[ ${PYTHON:-} == */* && $PYTHON != /* ]]; then
    PYTHON=$STARTED_IN/$PYTHON
fi
cd "$(dirname "${BASH_SOURCE[0]}")"

readonly VENV=.venv
readonly CPU_INDEX=https://download.pytorch.org/whl/cpu
readonly INDEX_SECONDS=5 # an index that is not there within these is not waited for

die() {
    echo "setup_env.sh: $*" >&2
    exit 1
}

usage() {
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

# The pinned TensorFlow has no build for Python 3.14.
is_fitting() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
}

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        is_fitting "$PYTHON" || die "PYTHON=$PYTHON is not Python 3.11, 3.12 or 3.13"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11; do
        if is_fitting "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "Python 3.11, 3.12 or 3.13 is needed: on Debian and Ubuntu, apt install python3 python3-venv"
}

make_venv() {
    local python version
    if "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    python=$(find_python)
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        die "$python cannot make virtual environments: apt install python$version-venv"
    fi
    echo "setup_env.sh: making $VENV with $("$python" --version)"
    "$python" -m venv "$VENV"
}

pip_install() {
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

has_nvidia_gpu() {
    command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'
}

is_reachable() {
    "$VENV/bin/python" - "$1" "$INDEX_SECONDS" 2>/dev/null <<'EOF'
import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=float(sys.argv[2])).close()
EOF
}

# Without a GPU the plain package would bring gigabytes of CUDA libraries that nothing uses.
install_torch() {
    local pin
    pin=$(grep '^torch==' requirements.txt)
    if ! has_nvidia_gpu && is_reachable "$CPU_INDEX/torch/"; then
        echo "setup_env.sh: no NVIDIA GPU, installing the CPU build of $pin"
        if pip_install --index-url "$CPU_INDEX" "$pin"; then
            return
        fi
        echo "setup_env.sh: the CPU index has no $pin for this machine, trying the usual one"
    fi
    echo "setup_env.sh: installing $pin"
    pip_install "$pin"
}

# $1: the file of requirements. Its stamp changes with all that decides what is installed.
install() {
    local stamp="$VENV/.installed-$1" wanted
    wanted=$(cat requirements.txt "$1" pyproject.toml setup_env.sh | cksum)
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        return
    fi
    install_torch
    echo "setup_env.sh: installing $1"
    pip_install -r "$1"
    pip_install --no-deps --editable .
    echo "$wanted" >"$stamp"
}

set_up() {
    make_venv
    install requirements.txt
    echo "setup_env.sh: $VENV is ready; use it with: source $PWD/$VENV/bin/activate"
}

# From T' = 500 of 1000 in 8 network evaluations; the first 1000 images, so that two cores take
# a minute.
demo() {
    local devices=cpu,cpu
    if has_nvidia_gpu; then
        devices=0
    fi
    local project=$PWD
    make_venv
    install requirements.txt
    cd "$STARTED_IN"
    exec "$project/$VENV/bin/python" "$project/scripts/generate_processes_diffusion_and_reverse.py" \
        --execute --dataset emoji32 --devices "$devices" \
        --t_prime 500 --steps 8 --sampler dpmpp_2m_sde --limit 1000 "$@"
}

run_tests() {
    make_venv
    install requirements-dev.txt
    "$VENV/bin/python" -m ruff check .
    "$VENV/bin/python" -m ruff format --check --quiet .
    "$VENV/bin/python" -m mypy --no-error-summary
    # A process a core, each with whole files, whose tests share what takes long to make.
    exec "$VENV/bin/python" -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile "$@"
}

case ${1-} in
"") set_up ;;
demo) demo "${@:2}" ;;
test) run_tests "${@:2}" ;;
*) usage ;;
esac
