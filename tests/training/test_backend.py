"""How long ranks wait for one another: to meet by one deadline, in a collective by
another.
"""

import socket
from datetime import timedelta

import psutil
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
        RunError, match=r"0 of 2 did not meet .*start_deadline_s=1;.*trainer rank 1"
    ):
        join(world_size=2, start_deadline_s=1.0)
    assert not dist.is_initialized()


def test_ranks_meet_at_the_address_that_they_were_told_and_at_no_other():
    process = psutil.Process()
    before = process.net_connections()
    join(world_size=1, start_deadline_s=5.0)
    try:
        new = set(process.net_connections()) - set(before)
        listening = {one.laddr.ip for one in new if one.status == psutil.CONN_LISTEN}
        assert "127.0.0.1" in listening and not listening & {"0.0.0.0", "::"}
    finally:
        dist.destroy_process_group()


def test_a_port_that_somebody_has_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(RunError, match="did not meet the others at .*Address already in use"):
            init_process_group(RankEnv(0, 1, 0, "cpu", place), TrainingConfig())


def test_collectives_have_the_collective_deadline():
    join(world_size=1, start_deadline_s=5.0)
    try:
        assert dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout == timedelta(
            seconds=77
        )
    finally:
        dist.destroy_process_group()
