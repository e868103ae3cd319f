"""A prepared run directory without a model: configuration and plan, as submission leaves them."""

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.cluster_env import scratch_root, tag
from nanoslime.config.cluster import ClusterConfig
from nanoslime.config.load import dump
from nanoslime.config.run import RunConfig
from nanoslime.layout import EnginePlace, Layout, TrainerPlace
from nanoslime.models.parallel_sizes import ParallelDims
from nanoslime.run_dir import RunDir

HOSTILE = 'it\'s a; echo "$HOME" run'
HERE = Path(__file__).parent


@dataclass(frozen=True)
class MadeRun:
    config: RunConfig
    layout: Layout
    run: RunDir

    @property
    def end(self) -> tuple[int, str]:
        attempt = self.run.latest_attempt()
        assert attempt is not None
        end = attempt.ended()
        assert end is not None, f"attempt {attempt.number} has no end"
        return end


def make_run(root: Path, num_nodes: int, device: str = "cpu", **cluster: Any) -> MadeRun:
    """Trainers on the first half of the nodes (at least one), one engine on each of the others."""
    num_trainer_nodes = max(1, num_nodes // 2)
    num_engines = num_nodes - num_trainer_nodes
    trainers = [TrainerPlace(rank, *divmod(rank, 2)) for rank in range(2 * num_trainer_nodes)]
    engines = [EnginePlace(i, num_trainer_nodes + i, (0,)) for i in range(num_engines)]
    layout = Layout(
        num_nodes=num_nodes,
        slots_per_node=2,
        device=device,
        backend="megatron",
        parallel=ParallelDims(tp=2, pp=num_trainer_nodes, cp=1, ep=1, dp=1),
        trainers=tuple(trainers),
        engines=tuple(engines),
    )
    config = RunConfig(name="jobs-test", cluster=ClusterConfig(nodes=num_nodes, **cluster))
    run = RunDir.create(root, "run")
    run.config.write_text(dump(config))
    run.plan.write_text(layout.to_json())
    return MadeRun(config, layout, run)


def make_venv_with_fake_ray(venv: Path) -> Path:
    """An environment with the packages of this one; its `ray` is a stand-in that starts at once."""
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").write_text(f"home = {sys.base_prefix}/bin\n")
    (venv / "lib").symlink_to(Path(sys.prefix) / "lib")
    python = venv / "bin" / "python"
    python.symlink_to(sys.executable)
    ray = venv / "bin" / "ray"
    ray.write_text(f'#!/bin/sh\nexec "{python}" "{HERE / "fake_ray.py"}" "$@"\n')
    ray.chmod(0o755)
    return venv


def scratches(root: Path) -> list[Path]:
    """Scratch directories of every attempt of the runs below `root`."""
    found = []
    for file in root.rglob("attempt.json"):
        attempt = file.parent
        if attempt.name.isdigit():
            found += scratch_root(os.environ).glob(f"ns-*-{tag(attempt):08x}")
    return found


def driver(mode: str) -> str:
    """Command of the stand-in driver that ends as `mode` says; `ray` looks at Ray's nodes."""
    if mode == "ray":
        return shlex.join([sys.executable, str(HERE / "ray_driver_program.py")])
    return shlex.join([sys.executable, str(HERE / "driver_program.py"), mode])
