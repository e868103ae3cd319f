#!/usr/bin/env bash
# make.sh cpu|cuda: makes the virtual environment .venv/TARGET from env/TARGET.lock, or does
# nothing if it is there. Called by env/run.sh. A set-up that failed or was interrupted is
# continued; one of another lock begins anew.
set -euo pipefail

target="$1"

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv/$target"
lock="$root/env/$target.lock"
# Packages that are built on this machine; only the CUDA target has any.
pinned="$root/env/$target.pinned.txt"
log="$root/.venv/$target.log"
# shellcheck source=env/pythons.sh
source "$root/env/pythons.sh"

# The first two files hold the target, the lock and the place of an environment: the first one from
# the beginning of its set-up on, the second one from its end on. The third one says which
# pyproject.toml the project was installed from.
begun_stamp="$venv/.nanoslime-begun"
ready_stamp="$venv/.nanoslime-target"
project_stamp="$venv/.nanoslime-project"

say() {
    echo "env/run.sh: $*" >&2
}

die() {
    say "$*"
    exit 1
}

sha256() {
    cat -- "$@" | sha256sum | cut -d' ' -f1
}

if [[ ! -f "$lock" ]]; then
    die "there is no $lock"
fi
lock_files=("$lock")
if [[ -f "$pinned" ]]; then
    lock_files+=("$pinned")
fi
wanted="target=$target
lock_sha256=$(sha256 "${lock_files[@]}")
checkout=$root"
wanted_project="pyproject_sha256=$(sha256 "$root/pyproject.toml")"

# holds FILE TEXT: whether FILE exists and is TEXT.
holds() {
    [[ -f "$1" && "$(<"$1")" == "$2" ]]
}

# write FILE TEXT: FILE is there with all of TEXT, or not at all.
write() {
    echo "$2" >"$1.new"
    mv -- "$1.new" "$1"
}

environment_is_ready() {
    holds "$ready_stamp" "$wanted" && [[ -x "$venv/bin/python" ]]
}

project_is_ready() {
    holds "$project_stamp" "$wanted_project"
}

find_python() {
    first_python "
import sys
if sys.version_info[:2] != (3, 12):
    sys.exit(1)
print(sys.executable)
"
}

version_of() {
    "$1" --version 2>/dev/null </dev/null || echo "not usable"
}

# uv ARGUMENT...: runs uv, whose messages go to the log. A busy machine may let a connection wait
# for longer than the 30 seconds that uv grants.
uv() {
    UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-180}" bash "$root/env/uv.sh" "$@" 2>>"$log"
}

install_packages() {
    uv pip install --python "$venv/bin/python" --no-deps "$@"
}

fetch_python() {
    export UV_PYTHON_INSTALL_DIR="$root/.venv/python"
    say "no Python 3.12 on PATH or among pyenv's versions; uv fetches one into .venv/python ..."
    uv python install --no-bin 3.12 >&2 && uv python find --managed-python 3.12
}

# run_step WHAT COMMAND...: one line of progress, and the end of the log if COMMAND fails.
run_step() {
    local what="$1"
    local begin=$SECONDS
    shift
    say "$what ..."
    if ! "$@" >>"$log"; then
        tail -n 25 -- "$log" >&2
        die "failed: $what (after $((SECONDS - begin)) s)." \
            "The whole log is $log; the next call goes on with this step."
    fi
}

# run_step_once NAME WHAT COMMAND...: the same, unless it succeeded in an earlier call.
run_step_once() {
    local done_stamp="$venv/.nanoslime-done-$1"
    local begin=$SECONDS
    shift
    if [[ -f "$done_stamp" ]]; then
        say "$1: done before"
        return
    fi
    run_step "$@"
    write "$done_stamp" "$((SECONDS - begin)) s"
}

# The lock is the whole closure, and overrules some of what its packages ask for
# (env/cpu.exceptions.txt): --no-deps. The environment is made in this step too, because an
# interrupted installation may leave halves of packages. Whole downloads lie in uv's cache, so that
# the second try does not repeat them. Bytecode is compiled here, once, because a hundred processes
# that import torch at the same time would each compile it for themselves.
install_lock() {
    uv venv --clear --python "$python" "$venv" &&
        write "$begun_stamp" "$wanted" &&
        install_packages --compile-bytecode --requirement "$lock"
}

# Transformer Engine is compiled with the compiler and the headers of the lock, whatever CUDA this
# machine has, and never replaced by a wheel that its set-up script finds elsewhere. uv's cache for
# it belongs to the environment, because a wheel that was built against one torch does not fit
# another.
build_pinned() (
    export CUDA_HOME="$venv/lib/python3.12/site-packages/nvidia/cu13"
    export NVTE_BUILD_USE_NVIDIA_WHEELS=1
    export NVTE_PYTORCH_FORCE_BUILD=TRUE
    export UV_CACHE_DIR="$venv/.built"
    export PATH="$venv/bin:$PATH"
    install_packages --no-build-isolation --requirement "$pinned"
)

# In the project's directory, because uv reads a semicolon in a path as the beginning of a marker.
install_project() (
    cd -- "$root" &&
        install_packages --no-build-isolation --editable .
)

# Sets python to a Python 3.12.
choose_python() {
    if python="$(find_python)"; then
        return
    fi
    if [[ -n "${NANOSLIME_PYTHON-}" ]]; then
        die "needs Python 3.12, but NANOSLIME_PYTHON=$NANOSLIME_PYTHON" \
            "is $(version_of "$NANOSLIME_PYTHON")"
    fi
    if ! python="$(fetch_python)"; then
        die "needs Python 3.12, which is neither on PATH nor among pyenv's versions," \
            "and uv could not fetch it (see $log); install it" \
            "(Ubuntu 24.04: apt-get install python3.12-dev; elsewhere: pyenv install 3.12)" \
            "or name one in NANOSLIME_PYTHON"
    fi
}

make_environment() {
    if [[ "$target" == cuda ]]; then
        bash "$root/env/check_cuda.sh"
    fi
    if holds "$begun_stamp" "$wanted" && [[ -x "$venv/bin/python" ]]; then
        say "going on with the set-up of .venv/$target"
    else
        say "making .venv/$target from env/$target.lock: some minutes and GB, once"
        rm -rf -- "$venv"
        : >"$log"
    fi
    if [[ ! -f "$venv/.nanoslime-done-packages" ]]; then
        choose_python
    fi
    run_step_once packages "$(grep -c '==' "$lock") packages" install_lock
    if [[ -f "$pinned" ]]; then
        run_step_once pinned "building $(grep '==' "$pinned" | xargs)" build_pinned
    fi
    make_project
    write "$ready_stamp" "$wanted"
    say "ready after $SECONDS s"
}

make_project() {
    rm -f -- "$project_stamp"
    run_step "nanoslime itself" install_project
    write "$project_stamp" "$wanted_project"
}

# One set-up at a time: the lock is held by this process and by all that it starts, until the last
# of them has ended, however it ends.
wait_for_other_set_ups() {
    if flock --nonblock 9; then
        return
    fi
    say "waiting for another set-up of .venv/$target"
    if ! flock --timeout 7200 9; then
        die "another set-up has held $root/.venv/$target.setup for two hours"
    fi
}

if environment_is_ready && project_is_ready; then
    exit 0
fi
mkdir -p -- "$root/.venv"
exec 9>"$root/.venv/$target.setup"
wait_for_other_set_ups
if ! environment_is_ready; then
    make_environment
elif ! project_is_ready; then
    make_project
fi
