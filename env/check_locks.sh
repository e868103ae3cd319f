#!/usr/bin/env bash
# Checks that both locks still hold together; changes nothing. With --update it writes env/cuda.lock anew.
#   CUDA: env/cuda.in resolves without a conflict, to exactly env/cuda.lock. Metadata only, nothing is built or installed.
#   CPU:  the environment is exactly env/cpu.lock, and lacks nothing but what env/cpu.exceptions.txt lists.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd -- "$root"
work="$(mktemp -d)"
trap 'rm -rf -- "$work"' EXIT
failed=0
fail() { echo "env/check_locks.sh: $*" >&2; failed=1; }
in_venv() { bash env/run.sh --target cpu "$@"; }

# Versions already in the output file are kept, so a new release elsewhere does not turn this red.
[[ "${1-}" == --update ]] || cp env/cuda.lock "$work/cuda.lock"
if ! timeout 600 bash env/run.sh uv pip compile env/cuda.in --override env/overrides.txt --only-binary :all: \
    --python-version 3.11 --python-platform x86_64-manylinux_2_34 --quiet --no-header --no-annotate \
    -o "$work/cuda.lock"; then
    fail "env/cuda.in does not resolve (above); resolve the conflict there, or in env/overrides.txt with its reason"
elif [[ "${1-}" == --update ]]; then
    cp "$work/cuda.lock" env/cuda.lock
elif ! diff -u env/cuda.lock "$work/cuda.lock" >&2; then
    fail "env/cuda.lock is not what env/cuda.in resolves to; run: bash env/check_locks.sh --update"
fi

# Names as in PEP 503; local versions (torch's +cpu) dropped; pip itself comes with the virtual environment.
canonical() { sed -E '/==/!d; s/\+.*//' | awk -F== '{gsub(/[-_.]+/, "-", $1); print tolower($1) "==" $2}' | sort; }
in_venv python -m pip freeze --all --exclude pip --exclude-editable 2>/dev/null | canonical >"$work/installed"
canonical <env/cpu.lock >"$work/locked"
diff -u --label env/cpu.lock --label "the installed environment" "$work/locked" "$work/installed" >&2 ||
    fail "the CPU environment is not its lock: a package was added to .venv/cpu, or dependencies are missing in the lock"

in_venv python -m pip check >"$work/check" 2>/dev/null || true  # non-zero whenever it has anything to say
sed -nE 's/^(\S+) \S+ requires ([A-Za-z0-9._-]+), which is not installed\.$/\1 \2/p
         s/^(\S+) \S+ has requirement ([A-Za-z0-9._-]+).*, but you have .*$/\1 \2/p' "$work/check" | sort >"$work/lacking"
sed -E 's/ *#.*//; /^$/d' env/cpu.exceptions.txt | sort >"$work/known"
diff -u --label env/cpu.exceptions.txt --label "pip check" "$work/known" "$work/lacking" >&2 ||
    fail "env/cpu.lock does not cover itself: add what is missing (+), or list it with its reason; drop what is stale (-)"

[[ "$failed" == 1 ]] || echo "env/check_locks.sh: both locks hold together" >&2
exit "$failed"
