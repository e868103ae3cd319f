"""Asks a process apart whether two answers are the same mathematics."""

import atexit
import json
import subprocess
import sys
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
            verdict = self._answer(self._process, json.dumps([label, answer]))
            if not verdict:
                exit_code = self._process.wait()
                self._process = None
                raise RuntimeError(
                    f"the process that compares mathematical answers ended with exit code "
                    f"{exit_code}; its error stands above, and it needs math-verify"
                )
        return verdict == "1\n"

    @staticmethod
    def _answer(process: subprocess.Popen[str], question: str) -> str:
        """The line that the program answers; "" where it has ended."""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(question + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return ""
        return process.stdout.readline()

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(process.communicate)
        return process
