"""A command's output, and the sentence where it gives none in time."""

import pytest

from nanoslime.processes.command import ask
from nanoslime.types import RunError


def test_a_command_answers_with_its_output_and_exit_code() -> None:
    done = ask(["sh", "-c", 'cat; echo "$NAME"; exit 3'], 20, env={"NAME": "n"}, stdin="text\n")
    assert (done.returncode, done.stdout) == (3, "text\nn\n")


def test_a_command_without_an_answer_is_named() -> None:
    with pytest.raises(RunError, match="^sleep 60 did not answer within 0.1 s$"):
        ask(["sleep", "60"], 0.1)
    with pytest.raises(RunError, match="^torch on n1 did not answer within 0.1 s$"):
        ask(["sleep", "60"], 0.1, who="torch on n1")
