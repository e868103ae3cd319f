"""How long ranks wait for one another: to meet by one deadline, in a collective by
another.
"""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from nanoslime.config import TrainingConfig
from nanoslime.processes.ports import free_port
from nanoslime.training.backend import RankEnv, init_process_group
from nanoslime.types import RunError


def join(world_size, start_deadline_s):
    env = RankEnv(0, world_size, 0, "cpu", f"tcp://127.0.0.1:{free_port('127.0.0.1')}")
    init_process_group(
        env, TrainingConfig(start_deadline_s=start_deadline_s, collective_deadline_s=77.0)
    )


def test_a_rank_that_never_comes_is_missed_at_the_start_deadline():
    with pytest.raises(
        RunError, match=r"0 of 2 did not meet .*start_deadline_s=1;.*1/2 clients joined"
    ):
        join(world_size=2, start_deadline_s=1.0)
    assert not dist.is_initialized()


def test_collectives_have_the_collective_deadline():
    join(world_size=1, start_deadline_s=5.0)
    try:
        assert dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout == timedelta(
            seconds=77
        )
    finally:
        dist.destroy_process_group()
