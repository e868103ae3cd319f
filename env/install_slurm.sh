#!/usr/bin/env bash
# Installs what the SLURM tests need on Debian or Ubuntu: slurm-wlm (slurmctld, slurmd and the commands) and munge.
# No daemon of the system is configured or started; tests bring up a cluster of their own (tests/slurm/cluster.py).
# No database either: without accounting `sacct` fails, which nanoslime has to bear.
set -euo pipefail

packages=(slurm-wlm munge)
say() { echo "env/install_slurm.sh: $*" >&2; }

PATH="$PATH:/usr/sbin:/sbin"
missing=()
for command in slurmctld slurmd sbatch srun scontrol munged munge; do
    command -v "$command" >/dev/null || missing+=("$command")
done
if [[ ${#missing[@]} == 0 ]]; then
    say "SLURM is installed: $(slurmctld -V)"
    exit 0
fi
command -v apt-get >/dev/null || { say "no apt-get here; install SLURM 22.05 or newer, and munge, by your system's means"; exit 1; }
if [[ $EUID != 0 ]]; then
    say "needs root; run: sudo bash $(printf %q "${BASH_SOURCE[0]}")"
    exit 1
fi

say "missing ${missing[*]}; installing ${packages[*]}"
export DEBIAN_FRONTEND=noninteractive
# A machine's other package sources may be unreachable; only a failed installation counts.
apt-get update -qq || say "apt-get update reported errors, going on"
# dpkg asks this before it starts a service: 101 is no
policy=/usr/sbin/policy-rc.d
if [[ ! -e "$policy" ]]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
say "installed: $(slurmctld -V)"
