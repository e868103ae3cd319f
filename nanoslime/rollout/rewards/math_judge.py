"""Asks a process apart whether two answers are the same mathematics."""

import atexit
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Lock

_PROGRAM = Path(__file__).with_name("math_judge_program.py")


class MathJudge:
    """The process of math_judge_program.py, started with the first question; safe for threads.

    It ends where its input ends, and so with this process, however that ends.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = Lock()

    def same(self, label: str, answer: str) -> bool:
        """Whether `answer` is the mathematics of `label`; both are LaTeX or plain text.

        False where that cannot be told within the time and memory that the program allows.
        Raises RuntimeError when the program has ended.
        """
        with self._lock:
            if self._process is None:
                self._process = self._start()
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            with suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps([label, answer]) + "\n")
                self._process.stdin.flush()
            verdict = self._process.stdout.readline()
            if not verdict:  # the program has ended
                exit_code = self._process.wait()
                self._process = None
                raise RuntimeError(
                    f"the process that compares mathematical answers ended with exit code "
                    f"{exit_code}; its error stands above, and it needs math-verify"
                )
        return verdict == "1\n"

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(process.communicate)
        return process
