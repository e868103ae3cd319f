"""Small real runs in this process: every setting can be changed, and what the parts of the loop
were asked and gave can be seen.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import batched
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig

from nanoslime import train
from nanoslime.config import RunConfig
from nanoslime.config.load import read
from nanoslime.rehearsal import build_tokenizer
from nanoslime.rollout import recorder
from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.run_dir import DONE, RunDir
from nanoslime.training.backend import TrainBackend
from nanoslime.types import GenerateRequest, Generation, SampleGroup
from tests.models.hf import save_model

NUM_TRAIN = 11
NUM_HELD_OUT = 10
# Responses end with one of these: about one token in sixteen.
STOP_IDS = list(range(2, 320, 16))

BASE: dict[str, dict[str, Any]] = {
    "model": {"dtype": "float32"},
    "data": {"reward": "tests.orchestration.rewards:by_text_where_labelled"},
    "rollout": {
        "engine": "embedded",
        "num_rollout": 2,
        "rollout_batch_size": 4,
        "n_samples_per_prompt": 3,
        "max_new_tokens": 8,
    },
    # Neither a clip nor Adam's division hides the scale of a gradient.
    "training": {"backend": "fsdp", "lr": 0.02, "adam_eps": 0.03, "clip_grad": 0.0},
    "tracking": {"use_tensorboard": False},
}


@dataclass(frozen=True)
class Files:
    model: Path
    train: Path
    held_out: Path


@dataclass(frozen=True)
class Asked:
    """A request to the engine, and its answers."""

    request: GenerateRequest
    answers: list[Generation]

    @property
    def prompt(self) -> str:
        """The prompt: a token per byte, after four special ones."""
        return bytes(TOKENIZER_TEXT[token] for token in self.request.token_ids).decode()


@dataclass
class Seen:
    """What a run left behind, and what its parts were asked."""

    run: RunDir
    files: Files
    asked: list[Asked] = field(default_factory=list)
    # Whose weights gave logprobs, in order.
    passes: list[str] = field(default_factory=list)

    @property
    def config(self) -> RunConfig:
        return read(self.run.config)

    @property
    def rows(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in self.run.metrics.read_text().splitlines()]

    @property
    def evals(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in self.run.evals.read_text().splitlines()]

    @property
    def held_out(self) -> list[dict[str, Any]]:
        """The lines of the file of held-out prompts."""
        return [json.loads(line) for line in self.files.held_out.read_text().splitlines()]

    @property
    def weights(self) -> dict[str, Tensor]:
        num_rollout = self.config.rollout.num_rollout
        return load_file(self.run.hf(num_rollout) / "model.safetensors")

    def rollout(self, step: int) -> list[SampleGroup]:
        return recorder.load(self.run.rollouts, step)

    @property
    def of_training(self) -> list[Asked]:
        """For each group, in the order of their start."""
        return self._groups("t", self.config.rollout.n_samples_per_prompt)

    @property
    def of_evaluation(self) -> list[Asked]:
        return self._groups("h", self.config.eval.n_samples_per_prompt)

    def _groups(self, letter: str, num_samples: int) -> list[Asked]:
        """Each sample is a request of its own; those of a group are put together."""
        asked = [one for one in self.asked if one.prompt.startswith(letter)]
        groups = []
        for own in batched(asked, num_samples):
            assert len({one.prompt for one in own}) == 1
            answers = [answer for one in own for answer in one.answers]
            groups.append(Asked(replace(own[0].request, n=num_samples), answers))
        return groups


TOKENIZER = build_tokenizer()
TOKENIZER_TEXT = {
    token: byte
    for byte in range(128)
    for token in TOKENIZER(chr(byte), return_tensors=None)["input_ids"]
}


def make_files(directory: Path, family: str = "qwen3", **changes: Any) -> Files:
    """A random model of one layer, prompts of several lengths, and held-out ones; every third
    prompt of training has label 0, so that its rewards are all 1.
    """
    sizes = {"num_hidden_layers": 1, "vocab_size": 320, "max_position_embeddings": 4096, **changes}
    model = save_model(directory / "model", family, **sizes)
    TOKENIZER.save_pretrained(model)
    GenerationConfig(eos_token_id=STOP_IDS).save_pretrained(model)
    files = Files(model, directory / "train.jsonl", directory / "held_out.jsonl")
    _write(files.train, "t", NUM_TRAIN)
    _write(files.held_out, "h", NUM_HELD_OUT)
    return files


def _write(path: Path, letter: str, count: int) -> None:
    lines = []
    for number in range(count):
        prompt = f"{letter}{number}" + "+" * (number % 4) + "="
        lines.append(json.dumps({"prompt": prompt, "label": int(number % 3 > 0)}) + "\n")
    path.write_text("".join(lines))


def settings(files: Files, changes: Mapping[str, Any]) -> dict[str, Any]:
    """BASE on these files, with changes by dotted names: {"rollout.temperature": 0.7}."""
    made: dict[str, Any] = deepcopy(BASE)
    made["model"]["hf_checkpoint"] = str(files.model)
    made["data"]["prompts"] = str(files.train)
    made["data"]["eval_prompts"] = str(files.held_out)
    for name, value in changes.items():
        *path, last = name.split(".")
        section = made
        for key in path:
            section = section.setdefault(key, {})
        section[last] = value
    return made


def run(files: Files, root: Path, changes: Mapping[str, Any]) -> Seen:
    """A whole run, as `python -m nanoslime.train RECIPE` makes it."""
    root.mkdir(parents=True, exist_ok=True)
    recipe = root / "recipe.yaml"
    recipe.write_text(json.dumps(settings(files, changes)))  # JSON is YAML
    seen = Seen(RunDir(root / "run"), files)
    with pytest.MonkeyPatch.context() as patch:
        _watch(seen, patch)
        assert train.main([str(recipe), "--run-root", str(root), "--name", "run"]) == DONE
    return seen


def _watch(seen: Seen, patch: pytest.MonkeyPatch) -> None:
    generate = EmbeddedEngine.generate
    logprobs = TrainBackend.logprobs

    async def watched_generate(engine: Any, request: GenerateRequest) -> list[Generation]:
        asked = Asked(request, [])
        seen.asked.append(asked)
        asked.answers.extend(await generate(engine, request))
        return asked.answers

    def watched_logprobs(backend: Any, shard: Any, weights: Any) -> Any:
        seen.passes.append(weights)
        return logprobs(backend, shard, weights)

    patch.setattr(EmbeddedEngine, "generate", watched_generate)
    patch.setattr(TrainBackend, "logprobs", watched_logprobs)


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
