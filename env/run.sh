#!/usr/bin/env bash
# Runs a command in nanoslime's virtual environment, which is made first if it is missing or its
# lock has changed.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: bash env/run.sh [--target cpu|cuda] COMMAND [ARGUMENT...]

Runs COMMAND, in the current directory, with the environment .venv/TARGET of this checkout first
in PATH. The environment is made from env/TARGET.lock if it is missing or its lock has changed.
A set-up that failed or was interrupted is continued by the next call.

  --target cpu    (default) rehearsals, tests, login nodes
  --target cuda   with SGLang's kernels and Transformer Engine: GPU nodes. Never guessed, because
                  a login node that submits GPU jobs often has no GPU. Needs glibc 2.34 and a
                  C++ compiler; MAX_JOBS says how many compilers may run at once.

Python 3.12 is taken from NANOSLIME_PYTHON, PATH (python3.12, python3) or pyenv's versions; where
none has it, uv fetches one. uv's own settings (UV_CACHE_DIR, UV_DEFAULT_INDEX, ...) hold.
The file .venv/TARGET/.nanoslime-target says from which target and lock an environment was made.
USAGE
}

wrong_call() {
    echo "env/run.sh: $*" >&2
    exit 2
}

target=cpu
while [[ "${1-}" == -* ]]; do
    case "$1" in
        --target=*)
            target="${1#*=}"
            shift
            ;;
        --target)
            target="${2-}"
            shift
            if [[ $# -gt 0 ]]; then
                shift
            fi
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        *)
            usage >&2
            wrong_call "unknown option $1"
            ;;
    esac
done
if [[ "$target" != cpu && "$target" != cuda ]]; then
    wrong_call "--target is '$target'; choose cpu or cuda"
fi
if [[ $# == 0 ]]; then
    usage >&2
    exit 2
fi

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
bash "$root/env/make.sh" "$target"

unset PYTHONHOME
export VIRTUAL_ENV="$root/.venv/$target"
export PATH="$VIRTUAL_ENV/bin:$PATH"
exec "$@"
