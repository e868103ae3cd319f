"""A checkout for each test of the scripts in env/."""

from pathlib import Path

import pytest

from tests.env.checkout import Checkout, real_uv


@pytest.fixture(scope="session")
def uv() -> Path:
    """The environment of the real uv, installed with the machine's own settings."""
    return real_uv()


@pytest.fixture
def checkout(tmp_path, uv, monkeypatch) -> Checkout:
    return Checkout(tmp_path, uv, monkeypatch)
