"""The prompts of a run, tokenized, and the order in which a run goes through them."""

import json
import logging
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import batched
from pathlib import Path
from typing import Any, overload

import numpy as np
import xxhash
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanoslime.config import RunConfig
from nanoslime.config.model import DataConfig
from nanoslime.storage.prompt_files import PromptRecord, read_prompt_file
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


def load_prompts(path: Path, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> "Prompts":
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
    prompts = Prompts()
    num_records = num_repeated = 0
    for records in batched(read_prompt_file(path, config), _BATCH):
        texts = [prompt_text(record, config, render) for record in records]
        new = [text for text in dict.fromkeys(texts) if text not in prompts]
        if new:
            # A chat template writes the special tokens itself.
            tokenized = tokenizer(new, add_special_tokens=not use_template)["input_ids"]
            prompts.add_texts(new, tokenized)
        for record, text in zip(records, texts, strict=True):
            prompt_id = num_records
            num_records += 1
            num_tokens = prompts.num_tokens(text)
            if num_tokens == 0:
                raise RunError(f"{record.place}: the prompt is empty")
            if not check_length(record.place, num_tokens, config):
                continue
            is_repeated = prompts.has(text, record.label)
            num_repeated += is_repeated
            if not (is_repeated and config.deduplicate):
                prompts.add(prompt_id, text, record)
    if not len(prompts):
        raise none_short_enough(path, config)
    prompts.freeze()
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


class Prompts(Sequence[Prompt]):
    """The prompts of a file in little memory: a text and its tokens are held once, however
    often they come, and metadata as JSON. A `Prompt` is made where one is asked for."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        # Of all texts, end to end; text i ends at self._ends[i].
        self._token_ids = array("i")
        self._ends = array("q")
        # By prompt.
        self._prompt_ids = array("q")
        self._text_of = array("q")
        self._labels: list[str | int | float | None] = []
        self._metadata: list[bytes] = []
        # While it is filled: where a text is, and which prompts there are.
        self._position: dict[str, int] = {}
        self._known: set[tuple[int, str | int | float | None]] = set()

    def __contains__(self, text: object) -> bool:
        return text in self._position

    def add_texts(self, texts: Sequence[str], tokenized: Sequence[Sequence[int]]) -> None:
        for text, token_ids in zip(texts, tokenized, strict=True):
            self._position[text] = len(self._texts)
            self._texts.append(text)
            self._token_ids.extend(token_ids)
            self._ends.append(len(self._token_ids))

    def num_tokens(self, text: str) -> int:
        first, end = self._span(self._position[text])
        return end - first

    def has(self, text: str, label: str | int | float | None) -> bool:
        return (self._position[text], label) in self._known

    def add(self, prompt_id: int, text: str, record: PromptRecord) -> None:
        """Adds a prompt whose text has been added."""
        position = self._position[text]
        label = record.label
        if isinstance(label, str):
            label = sys.intern(label)
        self._known.add((position, label))
        self._prompt_ids.append(prompt_id)
        self._text_of.append(position)
        self._labels.append(label)
        metadata = b""
        if record.metadata:
            metadata = json.dumps(record.metadata, default=str, ensure_ascii=False).encode()
        self._metadata.append(metadata)

    def freeze(self) -> None:
        """Gives back what only filling needs."""
        self._position.clear()
        self._known.clear()

    def __len__(self) -> int:
        return len(self._text_of)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        position = self._text_of[index]
        first, end = self._span(position)
        metadata = self._metadata[index]
        return Prompt(
            self._prompt_ids[index],
            np.array(self._token_ids[first:end], np.int32),
            self._texts[position],
            self._labels[index],
            json.loads(metadata) if metadata else {},
        )

    def _span(self, position: int) -> tuple[int, int]:
        first = self._ends[position - 1] if position else 0
        return first, self._ends[position]


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
