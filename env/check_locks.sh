#!/usr/bin/env bash
# Checks that both locks still hold together, and changes nothing.
#   CUDA: env/cuda.in resolves without a conflict, and to exactly env/cuda.lock. Only metadata is
#         read, nothing is built. With --update env/cuda.lock is written anew instead.
#   CPU:  the environment is exactly env/cpu.lock, and lacks nothing but what
#         env/cpu.exceptions.txt lists.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd -- "$root"
work="$(mktemp -d)"
trap 'rm -rf -- "$work"' EXIT
failed=0

fail() {
    echo "env/check_locks.sh: $*" >&2
    failed=1
}

# resolve OUTPUT: versions that already stand in OUTPUT are kept, so that a new release elsewhere
# turns nothing red.
resolve() {
    timeout 600 bash env/uv.sh pip compile env/cuda.in \
        --override env/overrides.txt --only-binary :all: \
        --python-version 3.12 --python-platform x86_64-manylinux_2_34 \
        --quiet --no-header --no-annotate --output-file "$1" >/dev/null
}

check_cuda_lock() {
    cp env/cuda.lock "$work/cuda.lock"
    if ! resolve "$work/cuda.lock"; then
        fail "env/cuda.in does not resolve (above); resolve the conflict there," \
            "or in env/overrides.txt with its reason"
    elif ! diff -u env/cuda.lock "$work/cuda.lock" >&2; then
        fail "env/cuda.lock is not what env/cuda.in resolves to;" \
            "run: bash env/check_locks.sh --update"
    fi
}

update_cuda_lock() {
    if resolve "$work/cuda.lock"; then
        cp "$work/cuda.lock" env/cuda.lock
    else
        fail "env/cuda.in does not resolve (above); env/cuda.lock is left as it is"
    fi
}

# The lines NAME==VERSION of the input, sorted, with names as in PEP 503 and without local versions
# (+cpu, +cu130).
canonical() {
    sed -E '/==/!d; s/\+.*//' |
        awk -F== '{gsub(/[-_.]+/, "-", $1); print tolower($1) "==" $2}' |
        sort
}

check_cpu_environment() {
    canonical <env/cpu.lock >"$work/locked"
    bash env/uv.sh pip freeze --quiet --python .venv/cpu --exclude-editable >"$work/frozen"
    canonical <"$work/frozen" >"$work/installed"
    if ! diff -u --label env/cpu.lock --label "the installed environment" \
        "$work/locked" "$work/installed" >&2; then
        fail "the CPU environment is not its lock:" \
            "make it anew (remove .venv/cpu), or correct env/cpu.lock"
    fi
}

# From `uv pip check`, the lines "PACKAGE REQUIREMENT" of what is not installed, or installed in
# another version.
lacking() {
    sed -nE "s/^The package \`([^\`]+)\` requires \`([A-Za-z0-9._-]+).*\`, but .*$/\1 \2/p" | sort
}

check_cpu_exceptions() {
    # uv ends with an error whenever it has anything to say.
    bash env/uv.sh pip check --python .venv/cpu >"$work/check" 2>&1 || true
    if ! grep -q "^Checked " "$work/check"; then
        cat "$work/check" >&2
        fail "uv could not check the CPU environment (above)"
    fi
    lacking <"$work/check" >"$work/lacking"
    sed -E 's/ *#.*//; /^$/d' env/cpu.exceptions.txt | sort >"$work/known"
    if ! diff -u --label env/cpu.exceptions.txt --label "uv pip check" \
        "$work/known" "$work/lacking" >&2; then
        fail "env/cpu.lock does not cover itself: add what is missing (+)," \
            "or list it with its reason; drop what is stale (-)"
    fi
}

bash env/run.sh --target cpu true
if [[ "${1-}" == --update ]]; then
    update_cuda_lock
else
    check_cuda_lock
fi
check_cpu_environment
check_cpu_exceptions
if [[ "$failed" == 0 ]]; then
    echo "env/check_locks.sh: both locks hold together" >&2
fi
exit "$failed"
