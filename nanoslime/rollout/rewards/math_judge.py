"""Asks a process apart whether two answers are the same mathematics.

sympy may take for ever (`9^{9^9}`) inside of one call that no signal handler and no thread can
end. The kernel therefore ends the process that judges once a question has used its time, and a
server that has sympy loaded already forks the next one. Both end with this process.
"""

from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from threading import Lock

from nanoslime.plugins import resolve

_PROGRAM = "nanoslime.rollout.rewards.math_judge_program"


class MathJudge:
    """The process that judges, started with the first question; safe for threads."""

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._lock = Lock()

    def same(self, label: str, answer: str) -> bool:
        """Whether `answer` is the mathematics of `label`; both are LaTeX or plain text.

        False where that cannot be told within the time and memory that the program allows.
        Raises RuntimeError when the program cannot be started.
        """
        with self._lock:
            if self._process is None:
                self._start()
            try:
                self._questions.send((label, answer))
                return self._questions.recv()
            except (EOFError, ConnectionError):
                process = self._process
                self._process = None
                process.join()
        if process.exitcode < 0:  # the question has ended it by a signal
            return False
        raise RuntimeError(
            f"the process that compares mathematical answers ended with exit code "
            f"{process.exitcode}; its error stands above, and it needs math-verify"
        )

    def _start(self) -> None:
        processes = get_context("forkserver")
        processes.set_forkserver_preload([_PROGRAM])
        self._questions, theirs = processes.Pipe()
        process = processes.Process(target=_serve, args=(_PROGRAM, theirs), daemon=True)
        process.start()
        theirs.close()
        self._process = process


def _serve(program: str, questions: Connection) -> None:
    """Only the process that judges loads sympy."""
    resolve(f"{program}:serve", {}, "data.reward")(questions)
