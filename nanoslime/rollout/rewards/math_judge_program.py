"""The program of MathJudge: it answers whether two texts are the same mathematics.

A line of its input is JSON, [label, answer]; a line of its output is 1 or 0. sympy may take
for ever (`9^{9^9}`) inside of one call that no signal handler and no thread can end. The
kernel therefore ends the process that judges once it has used CPU_LIMIT_S for one question.
The parent process then answers 0 and forks the next judge, which has sympy loaded already.
"""

import json
import logging
import os
import resource
import signal
import sys
from functools import lru_cache

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, MatrixBase

CPU_LIMIT_S = 1.0
MEMORY_LIMIT_BYTES = 4 << 30

# Units are off: math-verify takes any last letter for one, and makes 2 of 2t.
NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last"
)
EXTRACTION = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=NORMALIZATION)]
# ANTLR learns its grammar while it parses, and the forked judges know what it has learned.
EXAMPLES = ("\\frac{1}{2}", "2x + \\sqrt{3}", "(1, 2]", "x = 5", "0.25", "10^{3}", "\\{1, 2\\}")


def same(label: str, answer: str) -> bool:
    """Whether math-verify finds that `answer` is the mathematics of `label`."""
    wanted = _parse(label)
    given = _parse(answer)
    if not verify(wanted, given, timeout_seconds=None, allow_set_relation_comp=True):
        return False
    return not _differ_near_zero(wanted[0], given[0])


@lru_cache(maxsize=4096)
def _parse(text: str) -> list[Basic | MatrixBase | str]:
    return parse(f"\\boxed{{{text}}}", EXTRACTION, parsing_timeout=None)


def _differ_near_zero(one: Basic | MatrixBase | str, other: Basic | MatrixBase | str) -> bool:
    """Whether two small numbers differ by more than a hundredth.

    The tolerance of math-verify is absolute: it takes 1.6e-19 and 2e-19 for the same.
    """
    try:
        x = complex(one)
        y = complex(other)
    except (TypeError, ValueError, OverflowError):
        return False
    size = max(abs(x), abs(y))
    return size < 1e-4 and abs(x - y) > 0.01 * size


def serve() -> None:
    """Answers questions until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    for line in sys.stdin:
        label, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
        try:
            verdict = same(label, answer)
        except (Exception, MemoryError):
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        os.write(1, b"%d\n" % verdict)


def main() -> None:
    """Forks judges one after another, each until a question ends it."""
    # Ctrl-C in a terminal is meant for the driver, whose end closes the input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A verdict that nobody waits for ends the program without a word.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # math-verify warns that it has no time limit of its own.
    logging.disable(logging.WARNING)
    for example in EXAMPLES:
        same(example, example)
    while True:
        pid = os.fork()
        if pid == 0:
            serve()
            return
        _, status = os.waitpid(pid, 0)
        if status == 0:
            return
        os.write(1, b"0\n")


if __name__ == "__main__":
    main()
