"""The prompts of a run, tokenized, and the order in which a run goes through them."""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from nanoslime.config.model import DataConfig
from nanoslime.storage.prompt_files import PromptRecord, read_prompt_file
from nanoslime.types import Prompt, RunError

logger = logging.getLogger(__name__)


def load_prompts(
    path: Path, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> list[Prompt]:
    """Every prompt of a JSONL or parquet file, tokenized; `prompt_id` is its position
    in the file.

    Raises RunError in one line that names file and line for a broken line, a missing
    key, an empty prompt, and one over `max_prompt_tokens` (unless over-long prompts are
    skipped, with a count); and for a file without any prompt.
    """
    use_template = _use_template(tokenizer, config)
    records = list(read_prompt_file(path, config.prompt_key, config.label_key))
    texts = [_text(record, tokenizer, config, use_template) for record in records]
    # A chat template writes the special tokens itself.
    tokenized = tokenizer(texts, add_special_tokens=not use_template)["input_ids"]

    prompts = []
    rows = zip(records, texts, tokenized, strict=True)
    for prompt_id, (record, text, token_ids) in enumerate(rows):
        if not token_ids:
            raise RunError(f"{record.place}: the prompt is empty")
        if len(token_ids) > config.max_prompt_tokens:
            if config.over_long == "skip":
                continue
            raise RunError(
                f"{record.place}: a prompt of {len(token_ids)} tokens is over "
                f"data.max_prompt_tokens={config.max_prompt_tokens}; raise it, or set "
                "data.over_long=skip"
            )
        prompts.append(_prompt(prompt_id, record, text, token_ids, config))

    if not prompts:
        raise RunError(
            f"{path}: every prompt is over data.max_prompt_tokens={config.max_prompt_tokens}; "
            "raise it"
        )
    num_skipped = len(records) - len(prompts)
    if num_skipped:
        logger.warning(
            "%s: skipped %d of %d prompts with over %d tokens",
            path,
            num_skipped,
            len(records),
            config.max_prompt_tokens,
        )
    return prompts


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
            taken.extend(self._prompts[i] for i in indices)
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

    def _epoch_order(self) -> list[int]:
        """The prompts' positions in the order of the current epoch."""
        if not self._shuffle:
            return list(range(len(self._prompts)))
        generator = np.random.default_rng([self._seed, self._epoch])
        return generator.permutation(len(self._prompts)).tolist()


def _prompt(
    prompt_id: int, record: PromptRecord, text: str, token_ids: list[int], config: DataConfig
) -> Prompt:
    label = None
    if config.label_key:
        label = record.fields[config.label_key]
    metadata = record.fields.get("metadata") or {}
    return Prompt(prompt_id, np.asarray(token_ids, np.int32), text, label, metadata)


def _use_template(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> bool:
    """Whether the chat template is applied. Raises RunError where the configuration
    needs one."""
    has_template = bool(tokenizer.chat_template)
    if config.chat_template == "on" and not has_template:
        raise RunError(
            "data.chat_template=on, but the tokenizer has no chat template; use auto or off"
        )
    use_template = has_template and config.chat_template != "off"
    if config.system_prompt and not use_template:
        raise RunError(
            "data.system_prompt needs a chat template: there is none, or data.chat_template=off"
        )
    return use_template


def _text(
    record: PromptRecord,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    use_template: bool,
) -> str:
    """The text that the model sees: the prompt itself, or the chat template over it,
    which ends where the answer begins."""
    prompt = record.fields[config.prompt_key]
    is_text = isinstance(prompt, str)
    if not is_text and not _is_chat(prompt):
        raise RunError(
            f"{record.place}: a prompt is a string or a list of {{role, content}} messages"
        )
    if not use_template:
        if not is_text:
            raise RunError(
                f"{record.place}: a prompt of chat messages needs a chat template; the "
                "tokenizer's is missing or off"
            )
        return prompt
    messages = [{"role": "user", "content": prompt}] if is_text else prompt
    if config.system_prompt:
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _is_chat(prompt: Any) -> bool:
    """Whether the prompt is a list of messages, each with a role and a content."""
    if not isinstance(prompt, list):
        return False
    return all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in prompt
    )
