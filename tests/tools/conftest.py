"""Fixtures that several files of tests share: small checkpoints, refusals, hostile pickles."""

import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nanoslime.storage import manifest
from tests.tools.checkpoints import contents, make, to_huggingface, to_megatron, turn_into_old_form


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Whether a conversion of `source` is refused with this message, before anything is written."""

    def check(convert: Callable[..., int], source: Path, message: str, *options: object) -> None:
        before = contents(source)
        capsys.readouterr()
        assert convert(source, tmp_path / "out", *options) == 2, message
        error = capsys.readouterr().err
        last = error.strip().splitlines()[-1]
        assert re.search(message, last), (message, error)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
        assert contents(source) == before

    return check


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A directory with hf without a manifest, and with megatron, old_megatron and back with one.

    old_megatron has the form of megatron-core 0.16.
    """
    directory = tmp_path_factory.mktemp("llama")
    make(directory / "hf", "llama", shards=True)
    assert to_megatron(directory / "hf", directory / "megatron") == 0
    shutil.copytree(directory / "megatron", directory / "old_megatron")
    turn_into_old_form(directory / "old_megatron/release")
    (directory / "old_megatron/manifest.json").unlink()
    manifest.write(directory / "old_megatron")
    assert to_huggingface(directory / "megatron", directory / "back") == 0
    assert to_huggingface(directory / "old_megatron", directory / "old_back") == 0
    assert contents(directory / "old_back") == contents(directory / "back")
    return directory


class Evil:
    """Executes code when its pickle is loaded: makes the file `witness`."""

    def __init__(self, call: Callable[..., object], witness: Path) -> None:
        self.call = call
        self.witness = witness

    def __reduce__(self) -> tuple[object, ...]:
        if self.call is exec:
            return exec, (f"open({str(self.witness)!r}, 'w')",)
        return os.system, (f"touch {self.witness}",)


@pytest.fixture(params=[exec, os.system], ids=["exec", "system"])
def evil(request, tmp_path: Path) -> Iterator[bytes]:
    """A pickle that makes a file when it is loaded, and the check that it was not."""
    witness = tmp_path / "witness"
    pickled = pickle.dumps({"args": Evil(request.param, witness)}, 2)
    pickle.loads(pickled)
    assert witness.exists()
    witness.unlink()
    yield pickled
    assert not witness.exists()
