# shellcheck shell=bash
# Sourced by env/uv.sh and env/make.sh: the Pythons of this machine.

# Prints the names and paths to try, one a line, the preferred one first.
python_candidates() {
    if [[ -n "${NANOSLIME_PYTHON-}" ]]; then
        echo "$NANOSLIME_PYTHON"
        return
    fi
    echo python3.12
    echo python3
    local versions="${PYENV_ROOT:-${HOME-}/.pyenv}/versions"
    printf '%s\n' "$versions"/3.12.*/bin/python3.12 | sort --version-sort --reverse
}

# first_python CODE: prints what CODE prints in the first Python that runs it without an error;
# fails if there is none. Each one is run, because a name on PATH proves little: pyenv puts
# python3.12 there even where it is not chosen.
first_python() {
    local code="$1"
    local candidate
    while IFS= read -r candidate; do
        if "$candidate" -I -c "$code" 2>/dev/null </dev/null; then
            return
        fi
    done < <(python_candidates)
    return 1
}
