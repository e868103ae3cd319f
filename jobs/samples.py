"""Recorded samples as text for a terminal.

recorded rollout -> choice by reward -> prompt and response, token by token, with colours
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from nanoslime.config.load import read
from nanoslime.run_dir import RunDir
from nanoslime.storage.recorded_samples import RecordedSample, read_samples, recorded_steps
from nanoslime.types import RunError

_NUM_SHOWN = 5
# From so many nats on, a token has the background of this number (of 256 colours).
_BACKGROUNDS = ((1.0, 196), (0.1, 208), (0.01, 220), (0.001, 230))
_RESET = "\x1b[0m"
_DIM = "\x1b[2m"
_BOLD = "\x1b[1m"
_BLACK_ON = "\x1b[30;48;5;{}m"
_RULE = "─" * 80
# Control characters (C0 and C1) are shown, so that no sample moves the cursor or rings a bell.
_CONTROL = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160))}
_SHOWN_AS = {code: text for code, text in _CONTROL.items() if chr(code) not in "\n\t"}


@dataclass(frozen=True, slots=True)
class Choice:
    """Which samples of a rollout to show; without `worst` and `best`, all that are left by
    `group` and `status`, or the worst where neither is asked for."""

    worst: int | None = None
    best: int | None = None
    group: int | None = None
    status: str | None = None

    def of(self, samples: Sequence[RecordedSample]) -> list[RecordedSample]:
        """The lowest reward comes first (`best`: the highest), a sample without one before it;
        of equal rewards the larger gap between trainer and engine."""
        left = [
            sample
            for sample in samples
            if self.group in (None, sample.line["group"])
            and self.status in (None, sample.line["status"])
        ]
        sign = 1 if self.best is None else -1
        ordered = sorted(left, key=lambda sample: (sign * _reward(sample), -sample.largest_gap))
        limit = self.worst if self.best is None else self.best
        if limit is None and self.group is None and self.status is None:
            limit = _NUM_SHOWN
        return ordered[:limit]


def _reward(sample: RecordedSample) -> float:
    reward = sample.line["reward"]
    return -math.inf if reward is None else float(reward)


def show(run: RunDir, step: int | None, choice: Choice, *, color: bool) -> str:
    """The chosen samples of rollout `step` (None: the last one recorded) as text.

    Raises RunError where nothing was recorded, or nothing is left by the choice.
    """
    steps = recorded_steps(run.rollouts)
    if step is None and steps:
        step = steps[-1]
    samples = read_samples(run.rollouts, step or 0)
    chosen = choice.of(samples)
    if not chosen:
        raise RunError(f"none of the {len(samples)} samples of step {step} is of this choice")
    tokenizer = _tokenizer(run)
    lines = [f"{run.path}: step {step}, {len(chosen)} of {len(samples)} samples"]
    if color:
        lines.append(_legend())
    for sample in chosen:
        lines += [_RULE, *_describe(sample, tokenizer, color)]
    return "\n".join(lines)


def _tokenizer(run: RunDir) -> Tokenizer | None:
    """That of the run's model; None where there is none without transformers."""
    named = read(run.config).model.hf_checkpoint
    directory = Path(named) if named else run.model / "model"
    file = directory / "tokenizer.json"
    return Tokenizer.from_file(str(file)) if file.is_file() else None


def _legend() -> str:
    shades = [f"{_BLACK_ON.format(shade)} {least:g} {_RESET}" for least, shade in _BACKGROUNDS]
    return f"|trainer's - engine's logprob| of a token, from {' '.join(reversed(shades))} nats on"


def _describe(sample: RecordedSample, tokenizer: Tokenizer | None, color: bool) -> Iterator[str]:
    line = sample.line
    bold = _BOLD if color else ""
    reset = _RESET if color else ""
    reward = "none" if line["reward"] is None else f"{line['reward']:g}"
    versions = ", ".join(str(version) for version in dict.fromkeys(v for _, v in line["versions"]))
    num_tokens, num_response = line["tokens"]
    yield (
        f"{bold}reward {reward}{reset}  {line['status']}  group {line['group']}  "
        f"rollout {line['rollout']}  prompt {line['prompt']}  policy version {versions or 'none'}  "
        f"{num_tokens - num_response} + {num_response} tokens"
    )
    yield f"label {_plain(json.dumps(line['label'], ensure_ascii=False))}"
    if line["error"]:
        yield f"error {_plain(str(line['error']))}"
    yield _gap_line(sample)
    if sample.token_ids is None or tokenizer is None:
        yield _plain(line["text"])
        return
    yield from _turns(sample, tokenizer, color)


def _gap_line(sample: RecordedSample) -> str:
    if sample.gaps is None:
        return "gap   unknown: it was not trained on, or only texts were recorded"
    gaps = np.abs(sample.gaps[np.isfinite(sample.gaps)].astype(np.float64))
    if not len(gaps):
        return "gap   none of its tokens is in the loss"
    return f"gap   {gaps.mean():.2g} on average, {gaps.max():.2g} at most"


def _turns(sample: RecordedSample, tokenizer: Tokenizer, color: bool) -> Iterator[str]:
    """The prompt, then what the policy said and what it was told, each with a heading."""
    pieces = list(_pieces(sample, tokenizer))
    for is_response, turn in groupby(pieces, attrgetter("is_response")):
        own = list(turn)
        heading = "response" if is_response else "observed"
        if own[0] is pieces[0] and not is_response:
            heading = "prompt"
        dim = _DIM if color else ""
        reset = _RESET if color else ""
        yield f"{dim}── {heading}{reset}"
        if is_response and color:
            yield "".join(map(_colored, own))
        else:
            text = "".join(_plain(piece.text) for piece in own)
            yield f"{dim}{text}{reset}"


@dataclass(frozen=True, slots=True)
class _Piece:
    """The text of a token, or of several that are characters only together."""

    text: str
    is_response: bool
    # By absolute value the largest gap of its tokens; 0 where none is known.
    gap: float


def _pieces(sample: RecordedSample, tokenizer: Tokenizer) -> Iterator[_Piece]:
    assert sample.token_ids is not None and sample.loss_mask is not None
    gaps = np.zeros(len(sample.token_ids))
    if sample.gaps is not None:
        gaps = np.nan_to_num(np.abs(sample.gaps.astype(np.float64)))
    stream = DecodeStream(skip_special_tokens=False)
    gap = 0.0
    is_response = False
    is_pending = False
    tokens = zip(sample.token_ids.tolist(), sample.loss_mask.tolist(), gaps.tolist(), strict=True)
    for token, is_response, of_token in tokens:
        gap = max(gap, of_token)
        text = stream.step(tokenizer, token)
        is_pending = text is None
        if text is not None:
            yield _Piece(text, is_response, gap)
            gap = 0.0
    if is_pending:
        yield _Piece("\ufffd", is_response, gap)


def _colored(piece: _Piece) -> str:
    text = _plain(piece.text)
    for least, shade in _BACKGROUNDS:
        if piece.gap >= least:
            start = _BLACK_ON.format(shade)
            # The background ends at the end of a line, not at the terminal's edge.
            ends = text.replace("\n", f"↵{_RESET}\n{start}")
            return f"{start}{ends}{_RESET}"
    return text


def _plain(text: str) -> str:
    """`text` without what a terminal would obey."""
    return text.translate(_SHOWN_AS)
