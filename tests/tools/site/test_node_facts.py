"""The shell script that asks a node, on made /sys trees, and what is made of its words."""

import subprocess
from pathlib import Path

from tools.site.node_facts import SCRIPT, parse


def machine(root: Path) -> Path:
    """Two Ethernet ports, one of them down, IPoIB, and three HCAs, one of them not connected."""
    for name, kind, state, address in [
        ("lo", "772", "unknown", "127.0.0.1"),
        ("eno1", "1", "up", "10.0.0.7"),
        ("eno2", "1", "down", "10.0.1.7"),
        ("ib0", "32", "up", "10.1.0.7"),
        ("eno3", "1", "up", ""),
    ]:
        interface = root / "sys/class/net" / name
        interface.mkdir(parents=True)
        (interface / "type").write_text(f"{kind}\n")
        (interface / "operstate").write_text(f"{state}\n")
        (interface / "address4").write_text(address)
    for name, state, layer in [
        ("mlx5_0", "4: ACTIVE", "InfiniBand"),
        ("mlx5_1", "1: DOWN", "InfiniBand"),
        ("mlx5_2", "4: ACTIVE", "Ethernet"),
    ]:
        port = root / "sys/class/infiniband" / name / "ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "link_layer").write_text(f"{layer}\n")
    (root / "proc/net").mkdir(parents=True)
    route = "Iface\tDestination\tGateway\neno1\t00000000\t0100000A\neno1\t0000000A\t00000000\n"
    (root / "proc/net/route").write_text(route)
    return root


def ask(root: Path, **environ: str) -> str:
    done = subprocess.run(
        ["sh", "-c", SCRIPT, "sh", str(root)],
        env={"PATH": "/usr/bin:/bin", **environ},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout


def test_interfaces_and_hcas_are_those_that_are_up(tmp_path):
    facts = parse(ask(machine(tmp_path)), is_node=True)
    assert facts.interfaces == {"eno1": "ethernet", "ib0": "infiniband"}
    assert facts.default_interface == "eno1"
    assert facts.best_interface == "ib0"
    assert facts.hcas == {"mlx5_0": "InfiniBand", "mlx5_2": "Ethernet"}


def test_a_machine_without_any_of_it(tmp_path):
    """No InfiniBand: the interface of the default route is as good as any."""
    (tmp_path / "proc/net").mkdir(parents=True)
    (tmp_path / "proc/net/route").write_text("Iface\tDestination\n")
    facts = parse(ask(tmp_path), is_node=False, why_not="busy")
    assert (facts.interfaces, facts.hcas, facts.best_interface) == ({}, {}, "")
    assert (facts.is_node, facts.why_not, facts.gpu_memory_gib) == (False, "busy", None)


def test_scratch_is_the_largest_disk_of_the_nodes_own():
    facts = parse(
        "host n1\n"
        "disk /scratch lustre 99999999999\n"
        "disk /dev/shm tmpfs 999999999\n"
        "disk /tmp ext4 10485760\n"
        "disk /local xfs 1048576000\n"
        "disk /nfs nfs4 9999999999\n"
        "disk /odd\n",
        is_node=True,
    )
    assert facts.scratch == {"/tmp": 10, "/local": 1000}
    assert facts.best_scratch == "/local"


def test_a_jobs_own_directory_is_told_apart(tmp_path):
    """It has another name in each job, and is none for a file."""
    facts = parse(ask(tmp_path, SLURM_TMPDIR="/local/job.1"), is_node=True)
    assert facts.job_directory == "/local/job.1"
    assert "/local/job.1" not in facts.scratch


def test_gpus_are_told_by_nvidia_smi():
    facts = parse("host n1\ngpu 81559, NVIDIA H100 80GB HBM3\ngpu 81559, NVIDIA\n", is_node=True)
    assert round(facts.gpu_memory_gib or 0, 1) == 79.6
    assert facts.gpu_name == "NVIDIA H100 80GB HBM3"
    broken = parse("host n1\ngpu Failed to initialize NVML\n", is_node=True)
    assert broken.gpu_memory_gib is None
