"""One line says what went wrong, whoever raised it and however it came here."""

import concurrent.futures
import errno
import logging
import pickle
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from nanoslime.failures import append_traceback, is_of_machine, summary, told_in_one_line
from nanoslime.types import EngineGone, MachineFailure, RunError

CUDA = (
    "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously "
    "reported\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)


class OfAnotherPackage(Exception):
    def __init__(self, one: str, two: str):
        super().__init__(one)

    def __str__(self) -> str:
        raise ValueError("no text")


def look_up(_: int = 0) -> None:
    {}["reward_model"]


def with_cause() -> None:
    try:
        look_up()
    except KeyError as error:
        raise ValueError("no such setting\nand more") from error


def run_error_with_cause() -> None:
    try:
        look_up()
    except KeyError as error:
        raise RunError("the reward failed\nwith a second line") from error


def failing_clean_up() -> None:
    try:
        raise RunError("the disk is full")
    finally:
        look_up()


def two_failing_clean_ups() -> None:
    try:
        failing_clean_up()
    finally:
        raise RunError("engine 3 does not end")


def raised(error: BaseException) -> Callable[[], Any]:
    def function() -> None:
        raise error

    return function


def caused_by_itself() -> None:
    try:
        look_up()
    except KeyError as error:
        raise error from error


def other_state_dict() -> None:
    torch.nn.Linear(2, 2).load_state_dict(torch.nn.Linear(2, 3).state_dict())


def in_another_process() -> None:
    with concurrent.futures.ProcessPoolExecutor(1) as pool:
        pool.submit(look_up).result()


def in_a_rank() -> None:
    torch.multiprocessing.spawn(look_up, nprocs=1)


def in_ls() -> None:
    subprocess.run(["ls", "/none"], check=True, capture_output=True, env={"LC_ALL": "C"})


def in_a_template() -> None:
    jinja2.Environment(undefined=jinja2.StrictUndefined).from_string("{{ x.y }}").render()


def failing_save() -> None:
    raise OSError(28, "No space left on device")


def made_failed_save() -> CheckpointException:
    with pytest.raises(OSError, match="No space") as caught:
        failing_save()
    frames = traceback.extract_tb(caught.value.__traceback__)
    return CheckpointException("save", {0: (caught.value, frames)})


failed_save = made_failed_save()
failed_child = ChildFailedError("train.py", {1: ProcessFailure(1, 9, 1, "/none")})


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (look_up, "KeyError: 'reward_model'"),
        (raised(MemoryError()), "MemoryError"),
        (raised(RuntimeError(CUDA)), "RuntimeError: CUDA error: device-side assert triggered"),
        (raised(RuntimeError("\n\n=====\nreal\n")), "RuntimeError: real"),
        (raised(OSError(28, "No space", "/a b/c")), "OSError: [Errno 28] No space: '/a b/c'"),
        (with_cause, "ValueError: no such setting; cause: KeyError: 'reward_model'"),
        (run_error_with_cause, "the reward failed with a second line"),
        (failing_clean_up, "the disk is full"),
        (two_failing_clean_ups, "the disk is full"),
        (caused_by_itself, "KeyError: 'reward_model'"),
        (in_another_process, "KeyError: 'reward_model'"),
        (in_a_rank, "KeyError: 'reward_model'"),
        (raised(ExceptionGroup("several", [KeyError("a")])), "KeyError: 'a'"),
        (raised(failed_child), "ChildFailedError: train.py FAILED"),
        (raised(OfAnotherPackage("a", "b")), "OfAnotherPackage: its message cannot be shown"),
        (in_a_template, "UndefinedError: 'x' is undefined"),
        (raised(failed_save), "OSError: [Errno 28] No space left on device"),
        (raised(SystemExit(3)), "SystemExit: 3"),
    ],
)
def test_the_first_telling_line_is_told(function: Callable[[], Any], line: str) -> None:
    with pytest.raises(BaseException) as caught:
        function()
    assert summary(caught.value) == line


class TaskError(RunError):
    """As Ray makes it of an error of a task: of the same class, with the traceback as message."""

    def __init__(self, cause: RunError) -> None:
        super().__init__(f"ray::RankActor.call() (pid=1)\n  File x, line 1\nRunError: {cause}")
        self.cause = cause


def test_of_an_error_that_came_over_ray_the_run_error_itself_is_told() -> None:
    assert summary(TaskError(RunError("the arrays are gone"))) == "the arrays are gone"
    try:
        raise TaskError(RunError("the arrays are gone"))
    except TaskError as error:
        failure = RuntimeError("a hook failed")
        failure.__cause__ = error
    assert summary(failure) == "the arrays are gone"


def test_a_line_that_announces_is_told_with_the_next() -> None:
    with pytest.raises(RuntimeError) as caught:
        other_state_dict()
    line = summary(caught.value)
    assert line.startswith("RuntimeError: Error(s) in loading state_dict for Linear: size mismatch")
    assert "torch.Size([3, 2])" in line


def test_a_failed_command_says_its_own_reason() -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        in_ls()
    assert summary(caught.value).endswith("ls: cannot access '/none': No such file or directory")


def test_a_traceback_goes_into_the_log_unless_the_line_says_it_all(tmp_path: Path) -> None:
    log = tmp_path / "driver-0.log"
    append_traceback(log, RunError("expected"))
    assert not log.exists()
    for function in (look_up, run_error_with_cause):
        with pytest.raises(Exception) as caught:
            function()
        append_traceback(log, caught.value)
    assert log.read_text().count('{}["reward_model"]') == 2
    append_traceback(tmp_path / "gone" / "driver-0.log", caught.value)


def test_what_cannot_be_pickled_reaches_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RunError) as caught, told_in_one_line(logging.getLogger("rank"), "train"):
        raise OfAnotherPackage("a", "b")
    assert str(pickle.loads(pickle.dumps(caught.value))).startswith("OfAnotherPackage")
    assert "failed to train" in caplog.text
    assert 'raise OfAnotherPackage("a", "b")' in caplog.text


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "of_machine"),
    [
        (MachineFailure("trainer rank 1 died"), True),
        (EngineGone("engine 0 does not answer"), True),
        (OSError(errno.ENOSPC, "No space left"), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (caused(RunError("failed to save"), OSError(errno.EIO, "Input/output error")), True),
        (ExceptionGroup("threads", [MachineFailure("an engine is gone")]), True),
        (RunError("data.reward: no module"), False),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (ZeroDivisionError("in the user's own reward"), False),
    ],
)
def test_a_failure_of_a_machine_is_known_also_in_another_process(
    error: BaseException, of_machine: bool
) -> None:
    assert is_of_machine(error) == of_machine
    with pytest.raises(RunError) as told, told_in_one_line(logging.getLogger("rank"), "train"):
        raise error
    assert is_of_machine(pickle.loads(pickle.dumps(told.value))) == of_machine
