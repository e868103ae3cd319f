"""A store where processes meet is reached at its own address only."""

import socket
from datetime import timedelta

import pytest
import torch.distributed as dist

from nanoslime.process_groups import listening_store, shared_store

DEADLINE = timedelta(seconds=10)


@pytest.mark.parametrize("make", [listening_store, shared_store])
def test_a_store_listens_at_its_address_alone(make) -> None:
    if make is shared_store:
        store = shared_store("127.0.0.77", DEADLINE.total_seconds())
    else:
        store = listening_store("127.0.0.77", 0, DEADLINE)
    store.set("key", "value")
    client = dist.TCPStore("127.0.0.77", store.port, is_master=False, timeout=DEADLINE)
    assert client.get("key") == b"value"
    for other in ("127.0.0.1", "127.0.0.78"):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((other, store.port), timeout=5)
