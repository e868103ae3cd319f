"""The prompt file, tokenized, and the order in which a run goes through it."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from nanoslime.config.model import DataConfig
from nanoslime.storage.prompt_files import read_prompt_file
from nanoslime.types import Prompt, RunError

logger = logging.getLogger(__name__)


def load_prompts(
    path: Path, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> list[Prompt]:
    """Every prompt of a JSONL or parquet file, tokenized; `prompt_id` is its position in the file.

    Raises RunError in one line naming file and line for what cannot be used: a broken line, a missing key, an
    empty prompt, one over `max_prompt_tokens` (unless those are skipped, with a count), a file without any.
    """
    use_template = _use_template(tokenizer, config)
    rows = []
    for record in read_prompt_file(path, config.prompt_key, config.label_key):
        prompt = record.fields[config.prompt_key]
        text = _text(prompt, record.place, tokenizer, config, use_template)
        rows.append((record.place, record.fields, text))
    token_ids = tokenizer([text for _, _, text in rows], add_special_tokens=not use_template)[
        "input_ids"
    ]
    prompts, limit = [], config.max_prompt_tokens
    for i, ((place, record, text), ids) in enumerate(zip(rows, token_ids, strict=True)):
        if not ids:
            raise RunError(f"{place}: the prompt is empty")
        if len(ids) > limit:
            if config.over_long == "skip":
                continue
            what = f"a prompt of {len(ids)} tokens is over data.max_prompt_tokens={limit}"
            raise RunError(f"{place}: {what}; raise it, or set data.over_long=skip")
        label = record[config.label_key] if config.label_key else None
        prompts.append(
            Prompt(i, np.asarray(ids, np.int32), text, label, record.get("metadata") or {})
        )
    if not prompts:
        raise RunError(f"{path}: every prompt is over data.max_prompt_tokens={limit}")
    if skipped := len(rows) - len(prompts):
        logger.warning(
            "%s: skipped %d of %d prompts with over %d tokens", path, skipped, len(rows), limit
        )
    return prompts


class PromptSource:
    """Goes through the prompts again and again, each epoch in an order of its own that the seed decides."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool) -> None:
        self._prompts, self._seed, self._shuffle = prompts, seed, shuffle
        self._epoch = self._position = 0

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts; goes on into the next epoch."""
        taken: list[Prompt] = []
        while len(taken) < n:
            if self._position == len(self._prompts):
                self._epoch, self._position = self._epoch + 1, 0
            indices = self._epoch_order()[self._position : self._position + n - len(taken)]
            taken += [self._prompts[i] for i in indices]
            self._position += len(indices)
        return taken

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "position": self._position, **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken. Raises RunError when that was with other prompts or another seed."""
        for name, value in self._identity().items():
            if state[name] != value:
                what = f"the data cursor was saved with {name}={state[name]}, this run has {name}={value}"
                raise RunError(
                    f"{what}; resume with the prompt file and the seed of the run's start"
                )
        self._epoch, self._position = state["epoch"], state["position"]

    def _identity(self) -> dict[str, int]:
        return {
            "num_prompts": len(self._prompts),
            "seed": self._seed,
            "shuffle": int(self._shuffle),
        }

    def _epoch_order(self) -> list[int]:
        if not self._shuffle:
            return list(range(len(self._prompts)))
        return (
            np.random.default_rng([self._seed, self._epoch])
            .permutation(len(self._prompts))
            .tolist()
        )


def _use_template(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> bool:
    has_template = bool(tokenizer.chat_template)
    if config.chat_template == "on" and not has_template:
        raise RunError(
            "data.chat_template=on, but the tokenizer has no chat template; use auto or off"
        )
    use = has_template and config.chat_template != "off"
    if config.system_prompt and not use:
        raise RunError(
            "data.system_prompt needs a chat template: there is none, or data.chat_template=off"
        )
    return use


def _text(
    prompt: Any,
    place: str,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    use_template: bool,
) -> str:
    """What the model sees: the prompt itself, or the chat template over it, ready for the answer."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    is_list = isinstance(messages, list)
    if not is_list or not all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
    ):
        raise RunError(f"{place}: a prompt is a string or a list of {{role, content}} messages")
    if not use_template:
        if isinstance(prompt, str):
            return prompt
        needed = "a prompt of chat messages needs a chat template"
        raise RunError(f"{place}: {needed}; the tokenizer's is missing or off")
    if config.system_prompt:
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
