#!/usr/bin/env bash
# Installs what the SLURM tests need on Debian or Ubuntu: slurm-wlm (slurmctld, slurmd and the
# commands), munge, and for accounting slurmdbd with MariaDB's server, of which only the programs are
# taken. No daemon of the system is configured or started; tests bring up clusters of their own
# (tests/slurm/cluster.py), most of them without accounting: `sacct` fails there, which nanoslime
# has to bear.
set -euo pipefail

packages=(slurm-wlm munge slurmdbd mariadb-server-core mariadb-client-core)
commands=(slurmctld slurmd sbatch srun scontrol munged munge slurmdbd mariadbd mariadb-install-db)
PATH="$PATH:/usr/sbin:/sbin"

say() {
    echo "env/install_slurm.sh: $*" >&2
}

die() {
    say "$*"
    exit 1
}

# Sets missing to the commands that are not on PATH.
find_missing() {
    local command
    missing=()
    for command in "${commands[@]}"; do
        if ! command -v "$command" >/dev/null; then
            missing+=("$command")
        fi
    done
}

# dpkg asks this program before it starts a service, and 101 means no. One that the system already
# has stays.
forbid_services() {
    local policy=/usr/sbin/policy-rc.d
    if [[ ! -e "$policy" ]]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
}

find_missing
if [[ ${#missing[@]} == 0 ]]; then
    say "SLURM is installed: $(slurmctld -V)"
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    die "no apt-get here; install SLURM 22.05 or newer with slurmdbd, munge and MariaDB by your system's means"
fi
if [[ $EUID != 0 ]]; then
    die "needs root; run: sudo bash $(printf %q "${BASH_SOURCE[0]}")"
fi

say "missing ${missing[*]}; installing ${packages[*]}"
export DEBIAN_FRONTEND=noninteractive
# A machine's other package sources may be unreachable; only a failed installation counts.
if ! apt-get update -qq; then
    say "apt-get update reported errors, going on"
fi
forbid_services
apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
say "installed: $(slurmctld -V)"
