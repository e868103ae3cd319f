#!/usr/bin/env bash
# uv.sh ARGUMENT...: runs the one version of uv that nanoslime uses. Where it is missing, pip
# installs it from PyPI into a small environment of its own, .venv/uv-VERSION.
set -euo pipefail

version=0.13.9

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
home="$root/.venv/uv-$version"
log="$root/.venv/uv-$version.log"
# shellcheck source=env/pythons.sh
source "$root/env/pythons.sh"

say() {
    echo "env/uv.sh: $*" >&2
}

find_python_with_venv() {
    first_python "
import ensurepip, sys, venv
if sys.version_info < (3, 9):
    sys.exit(1)
print(sys.executable)
"
}

install_into() {
    local directory="$1"
    "$python" -I -m venv --clear "$directory" &&
        "$directory/bin/python" -I -m pip install --disable-pip-version-check "uv==$version"
}

install() {
    if [[ -x "$home/bin/uv" ]]; then
        return
    fi
    if ! python="$(find_python_with_venv)"; then
        say "needs a Python of 3.9 or newer with venv to install uv $version, and found none;" \
            "install one (Debian: apt-get install python3 python3-venv)" \
            "or name it in NANOSLIME_PYTHON"
        exit 1
    fi
    say "installing uv $version into .venv/uv-$version ..."
    rm -rf -- "$home.new"
    if ! install_into "$home.new" >"$log" 2>&1; then
        tail -n 25 -- "$log" >&2
        say "could not install uv $version with $python; the whole log is $log"
        exit 1
    fi
    # uv is a program without paths of its own, so its environment may be moved. A rename leaves no
    # half of it.
    rm -rf -- "$home"
    mv -- "$home.new" "$home"
}

if [[ ! -x "$home/bin/uv" ]]; then
    mkdir -p -- "$root/.venv"
    (
        flock 8
        install
    ) 8>"$root/.venv/uv.setup"
fi

# Paths of other environments must not count as installed.
unset PYTHONPATH PYTHONHOME
exec "$home/bin/uv" "$@"
