"""Recorded samples as text for a terminal.

recorded rollout -> choice by reward -> prompt and response, token by token, with colours
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from nanoslime.config.load import read
from nanoslime.run_dir import RunDir
from nanoslime.types import RunError, Status
from tools.watch.recorded import RecordedSample, read_samples, recorded_steps

# From so many nats on, a token has the background of this number (of 256 colours).
_BACKGROUNDS = {1.0: 196, 0.1: 208, 0.01: 220, 0.001: 230}
_BLACK_ON = "\x1b[30;48;5;{}m"
_RESET = "\x1b[0m"
# Control characters (C0 and C1) are shown, so that no sample moves the cursor or rings a bell.
_CONTROL = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160))}
_SHOWN_AS = {code: text for code, text in _CONTROL.items() if chr(code) not in "\n\t"}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", type=int, help="the rollout, from 0 on; default: the last")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--worst", type=_number, metavar="N", default=5, help="of lowest reward (5)")
    order.add_argument("--best", type=_number, metavar="N", help="of highest reward")
    parser.add_argument("--group", type=int, metavar="ID", help="those of one group alone")
    parser.add_argument("--status", choices=list(Status), help="those of one status alone")
    on_terminal = sys.stdout.isatty()
    parser.add_argument("--color", action=argparse.BooleanOptionalAction, default=on_terminal)


def _number(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} samples cannot be shown; give 0 or more")
    return number


def show(asked: argparse.Namespace) -> Iterator[str]:
    """The samples that are asked for, line by line.

    The lowest reward comes first (--best: the highest), a sample without one before it; of
    equal rewards the larger gap between trainer and engine. Raises RunError where nothing was
    recorded, or nothing is left by the choice.
    """
    run = RunDir.open(asked.run)
    step = max(recorded_steps(run.rollouts), default=0) if asked.step is None else asked.step
    samples = read_samples(run.rollouts, step)
    left = [
        sample
        for sample in samples
        if asked.group in (None, sample.line["group"])
        and asked.status in (None, sample.line["status"])
    ]
    if not left:
        raise RunError(f"none of the {len(samples)} samples of step {step} is of this choice")
    sign = 1 if asked.best is None else -1
    left.sort(key=lambda sample: (sign * reward_of(sample), -sample.largest_gap))
    chosen = left[: asked.worst if asked.best is None else asked.best]
    tokenizer = tokenizer_of(run)
    rule = "─" * min(80, shutil.get_terminal_size().columns)
    yield f"{run.path}: step {step}, {len(chosen)} of {len(samples)} samples"
    if asked.color:
        shades = [_colored(f" {least:g} ", least) for least in reversed(_BACKGROUNDS)]
        yield (f"|trainer - engine| of a token's logprob, from {' '.join(shades)} nats on")
    for sample in chosen:
        yield from [rule, *_described(sample), *turns(sample, tokenizer, asked.color)]


def tokenizer_of(run: RunDir) -> Tokenizer | None:
    """That of the run's model; None where it has gone."""
    # A run without a checkpoint of its own is a rehearsal.
    named = read(run.config).model.hf_checkpoint
    file = Path(named or run.model / "model") / "tokenizer.json"
    return Tokenizer.from_file(str(file)) if file.is_file() else None


def reward_of(sample: RecordedSample) -> float:
    reward = sample.line["reward"]
    return -math.inf if reward is None else float(reward)


def _described(sample: RecordedSample) -> Iterator[str]:
    line = sample.line
    versions = sorted({version for _, version in line["versions"]})
    num_tokens, num_response = line["tokens"]
    yield (
        f"reward {line['reward']}  {line['status']}  group {line['group']}  "
        f"rollout {line['rollout']}  prompt {line['prompt']}  policy versions {versions}  "
        f"{num_tokens - num_response} + {num_response} tokens"
    )
    yield f"label {_plain(json.dumps(line['label'], ensure_ascii=False))}"
    if line["error"]:
        yield f"error {_plain(line['error'])}"
    if sample.gaps is None:
        yield "gap   unknown: it was not trained on, or only texts were recorded"
    else:
        mean = np.nanmean(np.abs(sample.gaps.astype(np.float64)))
        yield f"gap   {mean:.2g} on average, {sample.largest_gap:.2g} at most"


def turns(sample: RecordedSample, tokenizer: Tokenizer | None, color: bool) -> Iterator[str]:
    """The prompt, then what the policy said and what it was told, each with a heading."""
    if sample.token_ids is None or tokenizer is None:
        yield _plain(sample.line["text"])
        return
    heading = "prompt"
    for is_response, turn in groupby(_pieces(sample, tokenizer), lambda piece: piece[1]):
        yield f"── {'response' if is_response else heading}"
        yield "".join(_colored(text, gap if color else 0.0) for text, _, gap in turn)
        heading = "observed"


def _pieces(sample: RecordedSample, tokenizer: Tokenizer) -> Iterator[tuple[str, bool, float]]:
    """The text of each token, whether it is in the loss, and the size of its gap, 0 where unknown.

    Tokens that are a character only together are one piece, with the largest of their gaps.
    """
    assert sample.token_ids is not None and sample.loss_mask is not None
    gaps = np.zeros(len(sample.token_ids)) if sample.gaps is None else sample.gaps
    sizes = np.nan_to_num(np.abs(gaps.astype(np.float64)))
    stream = DecodeStream(skip_special_tokens=False)
    text: str | None = ""
    size = 0.0
    for position, token in enumerate(sample.token_ids.tolist()):
        is_response = bool(sample.loss_mask[position])
        size = max(size, float(sizes[position]))
        text = stream.step(tokenizer, token)
        if text is not None:
            yield text, is_response, size
            size = 0.0
    if text is None:  # the last token ends within a character
        yield "\ufffd", is_response, size


def _colored(text: str, gap: float) -> str:
    for least, shade in _BACKGROUNDS.items():
        if gap >= least:
            start = _BLACK_ON.format(shade)
            # The background ends at the end of a line, not at the terminal's edge.
            ends = _plain(text).replace("\n", f"↵{_RESET}\n{start}")
            return f"{start}{ends}{_RESET}"
    return _plain(text)


def _plain(text: str) -> str:
    """`text` without what a terminal would obey."""
    return text.translate(_SHOWN_AS)
