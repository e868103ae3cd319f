"""The prompts of a run, tokenized, and the order in which a run goes through them."""

import json
import logging
import math
import sys
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanoslime.config import RunConfig
from nanoslime.config.model import DataConfig
from nanoslime.rollout.chat import Chat
from nanoslime.storage.prompt_files import read_prompts
from nanoslime.storage.prompt_rows import Tally
from nanoslime.storage.prompt_text import check_length, check_template, none_left, prompt_text
from nanoslime.types import GroupReport, Prompt, RunError, SampleReport

logger = logging.getLogger(__name__)

_BATCH = 1024
_ROUNDING = 1e-9
_NO_TOKENS = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class LoadedSource:
    """The prompts of one source; `file` says in errors where they are from."""

    prompts: Sequence[Prompt]
    file: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class RunPrompts:
    """The tokenizer of a run and its prompts, read before any engine starts."""

    tokenizer: PreTrainedTokenizerBase
    # By name; under the empty name where data.sources names none.
    train: Mapping[str, LoadedSource]
    # By the title of the evaluation set.
    eval_sets: Mapping[str, Sequence[Prompt]]

    @classmethod
    def load(cls, config: RunConfig, model_dir: Path, *, for_training: bool = True) -> "RunPrompts":
        """Raises RunError as `load_prompts` does. for_training: beside the evaluation sets."""
        data = config.data
        tokenizer = AutoTokenizer.from_pretrained(
            model_dir, trust_remote_code=config.model.trust_remote_code
        )
        weights = {source.title: source.weight for source in data.sources}
        train = {}
        num_rows = 0
        sources = data.by_source() if for_training else {}
        for name, own in sources.items():
            prompts = load_prompts(tokenizer, own, name, num_rows)
            num_rows = prompts[-1].prompt_id + 1
            train[name] = LoadedSource(prompts, own.prompts, weights.get(name, 1.0))
        eval_sets = {}
        for one in config.eval_sets:
            eval_sets[one.title] = load_prompts(tokenizer, one.data(data))
        return cls(tokenizer, train, eval_sets)

    def stream(self, seed: int, shuffle: bool) -> "PromptStream":
        """The training prompts in the order in which the run goes through them."""
        sources = {
            name: PromptSource(loaded, seed, shuffle, index)
            for index, (name, loaded) in enumerate(self.train.items())
        }
        return PromptStream(sources, {name: self.train[name].weight for name in sources})

    def source_metrics(self, groups: Sequence[GroupReport]) -> dict[str, float]:
        """How many samples of a rollout each source has, and their mean reward; empty where
        there is one source."""
        if len(self.train) == 1:
            return {}
        names = list(self.train)
        first_ids = [loaded.prompts[0].prompt_id for loaded in self.train.values()]
        samples: dict[str, list[SampleReport]] = {name: [] for name in names}
        for group in groups:
            for sample in group.samples:
                samples[names[bisect_right(first_ids, sample.prompt_id) - 1]].append(sample)
        metrics = {}
        for name, found in samples.items():
            metrics[f"rollout/{name}/num_samples"] = float(len(found))
            rewards = [sample.reward for sample in found if sample.reward is not None]
            if rewards:
                metrics[f"rollout/{name}/reward_mean"] = math.fsum(rewards) / len(rewards)
        return metrics


def load_prompts(
    tokenizer: PreTrainedTokenizerBase, config: DataConfig, source: str = "", first_id: int = 0
) -> list[Prompt]:
    """Every prompt of `config.prompts`, tokenized. Its `prompt_id` is its position there, counted
    from `first_id`.

    Broken rows and over-long prompts are skipped, and repeated ones dropped, where the
    configuration says so; all are counted in the log. Raises RunError in one line that names
    file and line for what `read_prompts` refuses, for a chat template that fails, an empty
    prompt and an over-long one.
    """
    path = Path(config.prompts)
    use_template = check_template(bool(tokenizer.chat_template), config)
    render = Chat(tokenizer, config.chat_template_kwargs).render if use_template else None
    prompts: list[Prompt] = []
    # Rows with the same text share it and its tokens.
    known_texts: dict[str, tuple[str, np.ndarray]] = {}
    tally = Tally(config)
    num_records = 0
    for records in batched(read_prompts(path, config, tally), _BATCH):
        texts = [tally.unless_broken(prompt_text, record, config, render) for record in records]
        new = [text for text in dict.fromkeys(texts) if text and text not in known_texts]
        if new:
            # A chat template writes the special tokens itself.
            tokenized = tokenizer(new, add_special_tokens=not use_template)["input_ids"]
            for text, token_ids in zip(new, tokenized, strict=True):
                known_texts[text] = (text, np.asarray(token_ids, np.int32))
        for record, written in zip(records, texts, strict=True):
            prompt_id = first_id + num_records
            num_records += 1
            if written is None:
                continue
            text, token_ids = known_texts.get(written, ("", _NO_TOKENS))
            label = record.label
            if isinstance(label, str):
                label = sys.intern(label)
            if not len(token_ids):
                tally.broken(RunError(f"{record.place}: the prompt is empty"))
                continue
            if check_length(record.place, len(token_ids), tally) and tally.take((text, label)):
                content = (text, label, record.metadata)
                prompts.append(Prompt(prompt_id, token_ids, *content, source, config.reward))
    if not prompts:
        raise none_left(path, tally)
    # A file that repeats most of its prompts was hardly meant so.
    is_news = tally.num_left_out or 2 * tally.num_repeated > num_records
    logger.log(logging.WARNING if is_news else logging.INFO, "%s: %s", path, tally.text)
    return prompts


def digest(prompts: Iterable[Prompt]) -> str:
    """A hash of the prompts' texts, labels and metadata in their order."""
    hashed = xxhash.xxh3_128()
    for prompt in prompts:
        content = [prompt.text, prompt.label, prompt.metadata]
        hashed.update(json.dumps(content, sort_keys=True, default=str).encode())
    return hashed.hexdigest()


class PromptSource:
    """Goes through the prompts of one source again and again.

    The seed decides the order of each epoch, together with `index`, the number of the source
    among those of the run.
    """

    def __init__(self, loaded: LoadedSource, seed: int, shuffle: bool, index: int = 0) -> None:
        self._prompts = loaded.prompts
        self._file = loaded.file
        self._prompts_digest = digest(loaded.prompts)
        self._seed = seed
        self._shuffle = shuffle
        self._index = index
        # Over all epochs.
        self.num_taken = 0
        # Of the epoch from which prompts are taken.
        self._order = lru_cache(maxsize=1)(self._order_of)

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts; they go on into the next epoch."""
        taken: list[Prompt] = []
        for _ in range(n):
            epoch, position = divmod(self.num_taken, len(self._prompts))
            taken.append(self._prompts[self._order(epoch)[position]])
            self.num_taken += 1
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {"num_taken": self.num_taken, "prompts": self._prompts_digest, "file": self._file}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, with the same seed (storage/resume.py).

        Raises RunError when that was with other prompts.
        """
        saved = state["prompts"]
        if saved != self._prompts_digest:
            raise RunError(
                f"the data cursor was saved with the prompts of {state['file']} (hash {saved}), "
                f"this run has others of {self._file} (hash {self._prompts_digest}); "
                "resume with the prompts, labels and chat template of the run's start, or start "
                "a new run from its hf/ export"
            )
        self.num_taken = state["num_taken"]

    def _order_of(self, epoch: int) -> np.ndarray:
        """The prompts' positions in the order of an epoch."""
        if not self._shuffle:
            return np.arange(len(self._prompts))
        generator = np.random.default_rng([self._seed, epoch, self._index])
        return generator.permutation(len(self._prompts))


class PromptStream:
    """Takes prompts from one or several sources by their weights, each in its own epochs.

    After any number of prompts each source has given its share of them, to less than one
    prompt. The next prompt comes from the source whose turn ends first, of those whose turn
    has begun (R. Tijdeman, The chairman assignment problem, 1980).
    """

    def __init__(self, sources: Mapping[str, PromptSource], weights: Mapping[str, float]) -> None:
        total = math.fsum(weights.values())
        self._sources = sources
        self._shares = {name: weights[name] / total for name in sources}

    def next(self, n: int) -> list[Prompt]:
        return [prompt for _ in range(n) for prompt in self._next_source().next(1)]

    def state_dict(self) -> dict[str, Any]:
        return {name: source.state_dict() for name, source in self._sources.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken, with the same sources, weights and seed
        (storage/resume.py).

        Raises RunError when that was with other prompts.
        """
        for name, source in self._sources.items():
            source.load_state_dict(state[name])

    def _next_source(self) -> PromptSource:
        taken = {name: source.num_taken for name, source in self._sources.items()}
        number = sum(taken.values()) + 1
        slack = 1 / max(2 * len(taken) - 2, 1)
        # How many prompts a source is behind its share.
        behind = {name: share * number - taken[name] for name, share in self._shares.items()}
        eligible = [name for name in taken if behind[name] >= slack - _ROUNDING]
        chosen = min(eligible, key=lambda name: (1 - slack - behind[name]) / self._shares[name])
        return self._sources[chosen]
