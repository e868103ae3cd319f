"""The environment of ranks, by facts; and that of a real Ray rank."""

from pathlib import Path

import pytest

from nanoslime.orchestration.rank_environment import (
    flight_recorder_files,
    interface_names,
    interface_of,
    nccl_defaults,
    num_threads,
)


@pytest.mark.parametrize(
    ("sglang", "cumem", "nvls"),
    [
        ({}, "0", "0"),
        ({"enable_symm_mem": True}, "1", "1"),
        ({"enable_nccl_nvls": True}, "0", "1"),
        ({"enable_symm_mem": False}, "0", "0"),
    ],
)
def test_nccl_is_set_as_sglang_sets_it(sglang, cumem, nvls):
    expected = {"NCCL_CUMEM_ENABLE": cumem, "NCCL_NVLS_ENABLE": nvls}
    assert nccl_defaults({}, sglang) == expected
    users = {"NCCL_CUMEM_ENABLE": "1", "NCCL_NVLS_ENABLE": "1"}
    needed = {name: on for name, on in expected.items() if on == "1"}
    assert nccl_defaults(users, sglang) == needed
    off = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
    assert nccl_defaults(off, sglang) == needed, "SGLang sets these as well"


def test_the_flight_recorder_of_nccl_writes_beside_the_logs_unless_the_user_says_where():
    files = flight_recorder_files({"TORCH_FR_DUMP_TEMP_FILE": "/scratch/nccl"}, Path("/run/logs"))
    assert files == {"TORCH_NCCL_DEBUG_INFO_PIPE_FILE": "/run/logs/nccl-"}


def test_the_interface_is_the_one_with_the_published_address():
    addresses = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.5"], "ib0": ["10.1.0.5", "10.1.0.6"]}
    assert interface_of("10.1.0.6", addresses) == "ib0"
    assert interface_of("127.0.1.3", addresses) == "lo"
    assert interface_of("10.9.9.9", addresses) == ""
    named = {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib0"}
    assert interface_names({}, "ib0") == named
    assert interface_names({"NCCL_SOCKET_IFNAME": "^lo"}, "ib0") == {"GLOO_SOCKET_IFNAME": "ib0"}
    assert interface_names({}, "") == {}


def test_ranks_share_the_cores_of_their_machine_unless_the_user_says_so():
    assert num_threads(None, 64, 8) == 8
    assert num_threads("3", 64, 8) == 3
    assert num_threads(None, 2, 8) == 1
    assert num_threads("", 16, 0) == 16
    assert num_threads("0", 64, 8) == 8
    assert num_threads("4,2", 64, 8) == 8
