#!/usr/bin/env bash
# Runs a command in nanoslime's virtual environment, which is made first if it is missing or its lock has changed.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: bash env/run.sh [--target cpu|cuda] COMMAND [ARGUMENT...]

Runs COMMAND, in the current directory, with the environment .venv/TARGET of this checkout first in PATH.
The environment is made from env/TARGET.lock if it is missing, was interrupted, or its lock has changed.

  --target cpu    (default) PyTorch for CPU: rehearsals, tests, login nodes
  --target cuda   PyTorch for CUDA with SGLang's kernels and Transformer Engine: GPU nodes. Never guessed,
                  because a login node that submits GPU jobs often has no GPU. Needs nvcc and glibc 2.34.

NANOSLIME_PYTHON names the Python 3.11 to use where `python3.11` or `python3` is not it.
The file .venv/TARGET/.nanoslime-target says from which target and lock an environment was made.
USAGE
}

say() { echo "env/run.sh: $*" >&2; }
die() { say "$*"; exit 1; }

target=cpu
while [[ "${1-}" == -* ]]; do
    case "$1" in
        --target=*) target="${1#*=}"; shift ;;
        --target) target="${2-}"; shift $(( $# > 1 ? 2 : 1 )) ;;
        -h | --help) usage; exit 0 ;;
        *) say "unknown option $1"; usage >&2; exit 2 ;;
    esac
done
case "$target" in
    cpu | cuda) ;;
    *) say "--target is '$target'; choose cpu or cuda"; exit 2 ;;
esac
[[ $# -gt 0 ]] || { usage >&2; exit 2; }

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv/$target"
lock="$root/env/$target.lock"
pinned="$root/env/$target.pinned.txt"  # built on this machine; only the CUDA target has such packages
log="$root/.venv/$target.log"
stamp="$venv/.nanoslime-target"
project_stamp="$venv/.nanoslime-project"

sha256() { cat -- "$@" | sha256sum | cut -d' ' -f1; }
lock_files=("$lock")
[[ ! -f "$pinned" ]] || lock_files+=("$pinned")
wanted="target=$target
lock_sha256=$(sha256 "${lock_files[@]}")
checkout=$root"
wanted_project="pyproject_sha256=$(sha256 "$root/pyproject.toml")"

environment_ready() { [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" && -x "$venv/bin/python" ]]; }
project_ready() { [[ -f "$project_stamp" && "$(<"$project_stamp")" == "$wanted_project" ]]; }

find_python() {
    local candidate candidates=(python3.11 python3)
    [[ -z "${NANOSLIME_PYTHON-}" ]] || candidates=("$NANOSLIME_PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "needs Python 3.11 with venv (Debian: apt-get install python3 python3-venv), but $candidate is" \
        "$("$candidate" --version 2>/dev/null || echo "not usable"); NANOSLIME_PYTHON may name another one"
}

# Paths of other environments must not count as installed here.
pip_install() { env -u PYTHONPATH -u PYTHONHOME "$venv/bin/python" -m pip install "$@" >>"$log" 2>&1; }

step() {  # WHAT COMMAND...: one line of progress, and the end of the log when it fails
    local what="$1" begin=$SECONDS
    shift
    say "$what ..."
    if ! "$@"; then
        tail -n 25 -- "$log" >&2
        die "failed: $what (after $((SECONDS - begin)) s). The whole log is $log; the next call starts again."
    fi
}

make_environment() {
    local python torch
    python="$(find_python)"
    rm -rf -- "$venv"
    : >"$log"
    say "making .venv/$target from env/$target.lock: some minutes and GB, once"
    step "1/4 virtual environment" "$python" -m venv "$venv"
    # First and with its own dependencies: where the index has only the CUDA build of torch, they come along.
    torch="$(grep -E '^torch==' "$lock" || true)"
    [[ -z "$torch" ]] || step "2/4 $torch" pip_install "$torch"
    # The lock is the whole closure, and overrules some of what its packages ask for (env/cpu.exceptions.txt).
    step "3/4 $(grep -c '==' "$lock") packages" pip_install --no-deps -r "$lock"
    [[ ! -f "$pinned" ]] || step "3/4 built here: $(grep -E '==' "$pinned" | xargs)" \
        pip_install --no-deps --no-build-isolation -r "$pinned"
    install_project
    echo "$wanted" >"$stamp.new"
    mv -- "$stamp.new" "$stamp"  # last: without it the next call starts again
    say "ready after $SECONDS s"
}

install_project() {
    rm -f -- "$project_stamp"
    step "4/4 nanoslime itself" pip_install --no-deps --no-build-isolation -e "$root"
    echo "$wanted_project" >"$project_stamp"
}

if ! environment_ready || ! project_ready; then
    [[ -f "$lock" ]] || die "no $lock"
    mkdir -p -- "$root/.venv"
    (
        flock --nonblock 9 || { say "waiting for another set-up of .venv/$target"; flock --timeout 3600 9; } ||
            die "another set-up has held $root/.venv/$target.setup for an hour"
        if ! environment_ready; then make_environment; elif ! project_ready; then install_project; fi
    ) 9>"$root/.venv/$target.setup"
fi

unset PYTHONHOME
export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
exec "$@"
