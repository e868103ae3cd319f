"""The prompts of a run, tokenized, and the order in which a run goes through them."""

import json
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanoslime.config import RunConfig
from nanoslime.config.model import DataConfig
from nanoslime.storage.prompt_files import read_prompt_file
from nanoslime.storage.prompt_text import (
    check_length,
    check_template,
    none_short_enough,
    prompt_text,
)
from nanoslime.types import Prompt, RunError

logger = logging.getLogger(__name__)

_BATCH = 1024


@dataclass(frozen=True, slots=True)
class RunPrompts:
    """The tokenizer of a run and its prompts, read before any engine starts."""

    tokenizer: PreTrainedTokenizerBase
    train: Sequence[Prompt]
    held_out: Sequence[Prompt]

    @classmethod
    def load(cls, config: RunConfig, model_dir: Path) -> "RunPrompts":
        """Raises RunError as `load_prompts` does."""
        data = config.data
        tokenizer = AutoTokenizer.from_pretrained(
            model_dir, trust_remote_code=config.model.trust_remote_code
        )
        train = load_prompts(Path(data.prompts), tokenizer, data)
        held_out: Sequence[Prompt] = []
        if data.eval_prompts:
            held_out = load_prompts(Path(data.eval_prompts), tokenizer, data)
        return cls(tokenizer, train, held_out)


def load_prompts(
    path: Path, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> list[Prompt]:
    """Every prompt of a JSONL or parquet file, tokenized; `prompt_id` is its position
    in the file.

    Over-long prompts are skipped, and repeated ones dropped, where the configuration says
    so; both are counted in the log. Raises RunError in one line that names file and line for
    what `read_prompt_file` refuses, for a chat template that fails, an empty prompt and an
    over-long one.
    """
    render = None
    use_template = check_template(bool(tokenizer.chat_template), config)
    if use_template:
        render = partial(
            tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=True,
            **config.chat_template_kwargs,
        )
    prompts: list[Prompt] = []
    # Rows with the same text share it and its tokens.
    known_texts: dict[str, tuple[str, np.ndarray]] = {}
    known: set[tuple[str, Any]] = set()
    num_records = num_repeated = 0
    for records in batched(read_prompt_file(path, config), _BATCH):
        texts = [prompt_text(record, config, render) for record in records]
        new = [text for text in dict.fromkeys(texts) if text not in known_texts]
        if new:
            # A chat template writes the special tokens itself.
            tokenized = tokenizer(new, add_special_tokens=not use_template)["input_ids"]
            for text, token_ids in zip(new, tokenized, strict=True):
                known_texts[text] = (text, np.asarray(token_ids, np.int32))
        for record, written in zip(records, texts, strict=True):
            prompt_id = num_records
            num_records += 1
            text, token_ids = known_texts[written]
            label = record.label
            if isinstance(label, str):
                label = sys.intern(label)
            if not len(token_ids):
                raise RunError(f"{record.place}: the prompt is empty")
            if not check_length(record.place, len(token_ids), config):
                continue
            is_repeated = (text, label) in known
            num_repeated += is_repeated
            if is_repeated and config.deduplicate:
                continue
            known.add((text, label))
            prompts.append(Prompt(prompt_id, token_ids, text, label, record.metadata))
    if not prompts:
        raise none_short_enough(path, config)
    _warn_of_left_out(path, config, num_records, num_repeated, len(prompts))
    return prompts


def _warn_of_left_out(
    path: Path, config: DataConfig, num_records: int, num_repeated: int, num_kept: int
) -> None:
    num_dropped = num_repeated if config.deduplicate else 0
    num_skipped = num_records - num_dropped - num_kept
    if num_skipped:
        logger.warning(
            "%s: skipped %d of %d prompts with over %d tokens",
            path,
            num_skipped,
            num_records,
            config.max_prompt_tokens,
        )
    if num_repeated:
        # A file that repeats most of its prompts was hardly meant so.
        is_news = config.deduplicate or 2 * num_repeated > num_records
        logger.log(
            logging.WARNING if is_news else logging.INFO,
            "%s: %d of %d prompts repeat an earlier one with its label; data.deduplicate=%s %s",
            path,
            num_repeated,
            num_records,
            str(config.deduplicate).lower(),
            "drops them" if config.deduplicate else "keeps them",
        )


def digest(prompts: Iterable[Prompt]) -> str:
    """A hash of the prompts' texts, labels and metadata in their order."""
    hashed = xxhash.xxh3_128()
    for prompt in prompts:
        content = [prompt.text, prompt.label, prompt.metadata]
        hashed.update(json.dumps(content, sort_keys=True, default=str).encode())
    return hashed.hexdigest()


class PromptSource:
    """Goes through the prompts again and again; the seed decides the order of each epoch.

    `file` says in errors where the prompts are from.
    """

    def __init__(
        self, prompts: Sequence[Prompt], seed: int, shuffle: bool, file: str = "no file"
    ) -> None:
        self._prompts = prompts
        self._file = file
        self._prompts_digest = digest(prompts)
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._position = 0

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts; they go on into the next epoch."""
        taken: list[Prompt] = []
        while len(taken) < n:
            if self._position == len(self._prompts):
                self._epoch += 1
                self._position = 0
            num_missing = n - len(taken)
            indices = self._epoch_order()[self._position : self._position + num_missing]
            taken.extend(self._prompts[i] for i in indices.tolist())
            self._position += len(indices)
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "position": self._position,
            "prompts": self._prompts_digest,
            "file": self._file,
            **self._order(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises RunError when that was with other prompts or another seed.
        """
        for name, value in self._order().items():
            if state[name] != value:
                raise RunError(
                    f"the data cursor was saved with {name}={state[name]}, this run has "
                    f"{name}={value}; resume with the prompt file and the seed of the run's start"
                )
        saved = state.get("prompts")
        if saved is None:
            logger.warning(
                "the checkpoint was made before prompts were hashed, so that nothing tells "
                "whether these %d prompts are those of the run's start",
                len(self._prompts),
            )
        elif saved != self._prompts_digest:
            raise RunError(
                f"the data cursor was saved with the prompts of {state['file']} (hash {saved}), "
                f"this run has as many others of {self._file} (hash {self._prompts_digest}); "
                "resume with the prompts, labels and chat template of the run's start, or start "
                "a new run from its hf/ export"
            )
        self._epoch = state["epoch"]
        self._position = state["position"]

    def _order(self) -> dict[str, int]:
        """The numbers that decide the order of the prompts."""
        return {
            "num_prompts": len(self._prompts),
            "seed": self._seed,
            "shuffle": int(self._shuffle),
        }

    def _epoch_order(self) -> np.ndarray:
        """The prompts' positions in the order of the current epoch."""
        if not self._shuffle:
            return np.arange(len(self._prompts))
        generator = np.random.default_rng([self._seed, self._epoch])
        return generator.permutation(len(self._prompts))
