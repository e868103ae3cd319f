#!/usr/bin/env bash
# Refuses a machine on which the CUDA environment cannot be made or could not run, before anything
# is downloaded. Called by env/make.sh. A machine without a GPU, and without a CUDA toolkit, may
# build for others that have one.
set -euo pipefail

glibc_needed=2.34

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
# shellcheck source=env/pythons.sh
source "$root/env/pythons.sh"
failed=0

say() {
    echo "env/run.sh: $*" >&2
}

refuse() {
    say "--target cuda: $*"
    failed=1
}

# The CUDA release that torch is built for, as 13.0: torch asks for this cuda-toolkit.
cuda_of_lock() {
    sed -nE 's/^cuda-toolkit==([0-9]+\.[0-9]+).*/\1/p' "$root/env/cuda.lock"
}

# at_least FOUND NEEDED: compares versions such as 2.36 and 2.34.
at_least() {
    printf '%s\n%s\n' "$2" "$1" | sort --version-sort --check=silent
}

check_processor() {
    local found
    found="$(uname -m)"
    if [[ "$found" != x86_64 ]]; then
        refuse "the processor is $found, but env/cuda.lock is resolved for x86_64"
    fi
}

check_glibc() {
    local found
    found="$(getconf GNU_LIBC_VERSION 2>/dev/null | cut -d' ' -f2)" || true
    if [[ -z "$found" ]]; then
        refuse "this system has no glibc, and the wheels of env/cuda.lock need glibc $glibc_needed"
    elif ! at_least "$found" "$glibc_needed"; then
        refuse "glibc is $found, and the wheels of env/cuda.lock need $glibc_needed;" \
            "build on a newer system (Debian 12, Ubuntu 22.04, RHEL 9) or in a container of one"
    fi
}

# Triton compiles against Python's headers when it runs, and Transformer Engine when it is built.
check_python_headers() {
    local missing
    missing="$(first_python "
import os, sys, sysconfig
if sys.version_info[:2] != (3, 12):
    sys.exit(1)
header = os.path.join(sysconfig.get_path('include'), 'Python.h')
print('' if os.path.exists(header) else header)
")" || true
    if [[ -n "$missing" ]]; then
        refuse "Python 3.12 is here without its headers ($missing);" \
            "install them (Ubuntu: apt-get install python3.12-dev)"
    fi
}

check_compiler() {
    local compiler="${CXX:-c++}"
    if ! command -v "$compiler" >/dev/null; then
        refuse "there is no C++ compiler ($compiler), which Transformer Engine is built with;" \
            "install one (Debian: apt-get install g++) or name it in CXX"
    fi
}

find_nvcc() {
    if [[ -n "${CUDA_HOME-}" ]]; then
        echo "$CUDA_HOME/bin/nvcc"
    else
        command -v nvcc
    fi
}

# The environment brings an nvcc of its own. Libraries that compile kernels when they run prefer
# the machine's, though.
check_nvcc() {
    local nvcc
    local found
    if ! nvcc="$(find_nvcc)"; then
        say "no nvcc here: the one of env/cuda.lock is used"
        return
    fi
    found="$("$nvcc" --version 2>/dev/null | sed -nE 's/.*release ([0-9]+\.[0-9]+).*/\1/p')" || true
    if [[ -z "$found" ]]; then
        refuse "$nvcc does not say its release;" \
            "set CUDA_HOME to a CUDA $cuda toolkit, or take nvcc off PATH"
    elif [[ "${found%%.*}" != "${cuda%%.*}" ]]; then
        refuse "$nvcc is of CUDA $found, and torch of env/cuda.lock is built for CUDA $cuda;" \
            "load a CUDA ${cuda%%.*} toolkit, or none (the lock has its own nvcc)"
    fi
}

# The driver says the newest CUDA that it runs. A machine that only builds may have none.
check_driver() {
    local said
    local found
    if ! command -v nvidia-smi >/dev/null; then
        say "no NVIDIA driver here: GPU nodes need one that runs CUDA $cuda"
        return
    fi
    if ! said="$(nvidia-smi 2>&1)"; then
        say "nvidia-smi reaches no driver here (${said%%$'\n'*}):" \
            "GPU nodes need one that runs CUDA $cuda"
        return
    fi
    found="$(sed -nE 's/.*CUDA [A-Za-z ]*Version: *([0-9]+\.[0-9]+).*/\1/p' <<<"$said" | sed -n 1p)"
    if [[ -z "$found" ]]; then
        refuse "nvidia-smi does not say which CUDA its driver runs," \
            "and torch of env/cuda.lock needs CUDA $cuda"
    elif ! at_least "$found" "${cuda%%.*}.0"; then
        refuse "the NVIDIA driver runs CUDA $found at most," \
            "and torch of env/cuda.lock is built for CUDA $cuda;" \
            "update the driver, or build on a machine without a GPU for nodes with a newer one"
    fi
}

cuda="$(cuda_of_lock)"
check_processor
check_glibc
check_python_headers
check_compiler
check_nvcc
check_driver
exit "$failed"
