"""Which model is trained, and on which data.

A model's shape comes from the checkpoint's config.json, never from flags.
"""

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import PurePath
from typing import Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator, model_validator

from nanoslime.config.base import PathOrName, knobs
from nanoslime.plugins import target

REWARDS = {
    "exact_match": "nanoslime.rollout.rewards.exact_match:reward",
    "f1": "nanoslime.rollout.rewards.f1:reward",
    "gsm8k": "nanoslime.rollout.rewards.gsm8k:reward",
    "math_answer": "nanoslime.rollout.rewards.math_answer:reward",
    "multiple_choice": "nanoslime.rollout.rewards.multiple_choice:reward",
    "remote": "nanoslime.rollout.rewards.remote:reward",
    # The names that slime has for some of them.
    "gpqa": "nanoslime.rollout.rewards.multiple_choice:reward",
    "math": "nanoslime.rollout.rewards.math_answer:reward",
    "remote_rm": "nanoslime.rollout.rewards.remote:reward",
}
"""A reward is `reward(text, label, metadata) -> float`, a plain function or an async one.

It takes the text of the response, and label and metadata of the prompt. What it names besides
of the following, it gets by name:

    status      of the sample, a nanoslime.types.Status
    prompt      the text that the response goes on from
    sample      the nanoslime.types.Sample itself with its tokens, without routed experts
    reward_url  data.reward_url
    timeout_s   data.reward_timeout_s
"""

ONE_LABEL = frozenset({"gsm8k", "math", "math_answer", "multiple_choice", "gpqa"})
"""The rewards to which a list of labels, of which any is right, says nothing."""

WEIGHTED = "weighted"
"""The name of the weighted sum of data.rewards."""

# What the chat template is given besides data.chat_template_kwargs.
_TEMPLATE_ARGUMENTS = {
    "conversation",
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "return_dict",
    "return_tensors",
    "chat_template",
}


@knobs
class ModelConfig:
    hf_checkpoint: PathOrName = ""
    """Directory of a Hugging Face checkpoint, or a hub id; submission resolves an id to
    a local path."""
    revision: str = ""
    """Commit of the hub snapshot; filled in at submission."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype of trainers and engines. Main parameters, gradients and optimizer
    state are always float32."""
    trust_remote_code: bool = False
    """Whether Python code in the checkpoint (`auto_map`) may run: in transformers, in the
    tokenizer and in SGLang alike. Moonlight and Kimi need it for their tokenizer."""


@knobs
class RehearsalConfig:
    """The tiny model and digits task of a run that has no checkpoint and no prompts."""

    enabled: bool = False
    """Whether the run makes its own tiny model and prompts."""
    task: str = "reverse"
    """What the tiny model learns: to reverse four digits, or to sort them (reverse, sort)."""
    target_reward: float = 0.4
    """The supervised warm start ends when sampled exact match reaches this."""
    num_held_out: int = 400
    """Problems that are kept for evaluation."""
    seed: int = 0
    """Seed of the problems and of the model's first weights."""


@knobs
class PromptsConfig:
    """Prompts that are read and scored in their own way. What is left out is as in `data`."""

    _setting: ClassVar[str]
    prompts: PathOrName = Field(min_length=1)
    """In one of the forms of data.prompts."""
    name: str = Field(default="", pattern=r"^[\w.-]*$", max_length=100)
    """What metrics call them; by default the name of the file or of the data set."""
    reward: str | None = None
    """As data.reward, for these prompts."""
    prompt_key: str | None = Field(default=None, min_length=1)
    """As data.prompt_key, for these prompts."""
    label_key: str | None = None
    """As data.label_key, for these prompts."""
    metadata_key: str | None = None
    """As data.metadata_key, for these prompts."""
    system_prompt: str | None = None
    """As data.system_prompt, for these prompts."""

    @classmethod
    def from_text(cls, given: str) -> Any:
        """A text is the JSON of the settings, or the prompts alone.

        Raises ValueError for what begins as JSON and is none.
        """
        if not given.startswith("{"):
            return {"prompts": given}
        try:
            return json.loads(given)
        except ValueError as error:
            raise ValueError(f"{cls._setting}: {given!r} is not JSON ({error})") from error

    @field_validator("reward")
    @classmethod
    def _known_reward(cls, reward: str | None) -> str | None:
        if reward not in (None, WEIGHTED):
            target(reward, REWARDS, f"{cls._setting}.reward")
        return reward

    @property
    def title(self) -> str:
        """Their name, or that of the file or the data set, without what stands behind it."""
        path, _, _ = self.prompts.partition(":")
        return self.name or PurePath(path).name.partition(".")[0]

    def data(self, data: "DataConfig") -> "DataConfig":
        """`data` for these prompts alone."""
        own = {one.name: getattr(self, one.name) for one in fields(PromptsConfig)}
        del own["name"]
        if self.reward not in (None, WEIGHTED):
            own["rewards"] = {}
        set_here = {name: value for name, value in own.items() if value is not None}
        return replace(data, sources=[], **set_here)


def check_titles(listed: Sequence[PromptsConfig]) -> None:
    """Raises ValueError where two have the same title."""
    titles = [one.title for one in listed]
    for one in listed:
        if titles.count(one.title) > 1:
            raise ValueError(
                f"{one._setting}: {titles.count(one.title)} of them are called {one.title!r}; "
                "give each a `name` of its own"
            )


@knobs
class SourceConfig(PromptsConfig):
    """One of several sources of prompts."""

    _setting = "data.sources"
    weight: float = Field(default=1.0, gt=0)
    """Share of the prompts that come from here, relative to the weights of the others."""


@knobs
class DataConfig:
    prompts: PathOrName = ""
    """Training prompts: a file (JSON lines, also .gz or .zst, or parquet), a directory of such
    files or of what `datasets` saved, or a data set of the hub, OWNER/NAME[@REVISION].
    Behind the latter two may stand :SPLIT or :CONFIGURATION/SPLIT (openai/gsm8k:main/train)."""
    sources: list[SourceConfig] = Field(default_factory=list)
    """Several sources in place of `prompts`, each with its weight and what differs from the
    settings here: {prompts, weight, name, reward, prompt_key, label_key, metadata_key,
    system_prompt}. As flags, its prompts alone or such an object as JSON each."""
    eval_prompts: PathOrName = ""
    """Held-out prompts, in the same forms."""
    prompt_key: str = Field(default="prompt", min_length=1)
    """Where a row has its prompt: a text, or a list of {role, content} messages. Of this
    and the other keys, a dot leads into a struct or a list (reward_model.ground_truth,
    messages.0.content), unless the row has a key with that dot in its name."""
    label_key: str = "label"
    """Where a row has its label: a text or a number, or several texts of which any is right
    (for exact_match, f1 and rewards of your own); empty: there are no labels."""
    metadata_key: str = "metadata"
    """Where a row may have an object, or its JSON text, that the reward gets."""
    chat_template: Literal["auto", "on", "off"] = "auto"
    """auto: apply the tokenizer's chat template where it has one."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template (enable_thinking: false)."""
    system_prompt: str = ""
    """System message put before each prompt; empty: none."""
    max_prompt_tokens: int = Field(default=1024, ge=1)
    """Tokens of a prompt at most."""
    over_long: Literal["error", "skip"] = "error"
    """What to do with a prompt of more than max_prompt_tokens."""
    broken: Literal["error", "skip"] = "error"
    """What to do with a row that cannot be used: end the run, or leave it out and count it."""
    deduplicate: bool = False
    """Keep a prompt that comes several times with the same label only once. False: it
    comes as often in each epoch as in the file."""
    shuffle: bool = True
    """Draw the prompts in a new order each epoch; False: in that of the file."""
    rewards: dict[str, float] = Field(default_factory=dict)
    """Several rewards by name, with weights: their weighted sum takes the place of
    data.reward. One of weight 0 is only recorded. Each is a metric, rollout/reward_NAME_mean."""
    reward: str = "exact_match"
    """A name of the reward table, or "package.module:function"; "weighted" stands for
    data.rewards."""
    reward_url: str = ""
    """Where the reward "remote" sends samples by POST."""
    reward_timeout_s: float = Field(default=30.0, gt=0)
    """A reward that takes longer gives its sample the status error. Waiting for its turn
    does not count."""
    reward_processes: int = Field(default=0, ge=0)
    """How many processes at most run one plain function of a rollout worker, a sample each; 0:
    one a core, and 8 at most. An async function has one process for up to 128 samples."""

    @field_validator("chat_template_kwargs")
    @classmethod
    def _free_variables(cls, variables: dict[str, Any]) -> dict[str, Any]:
        taken = variables.keys() & _TEMPLATE_ARGUMENTS
        if taken:
            raise ValueError(
                f"data.chat_template_kwargs: {min(taken)} is set by nanoslime itself; remove it"
            )
        return variables

    @field_validator("reward")
    @classmethod
    def _known_reward(cls, reward: str, info: ValidationInfo) -> str:
        has_several = bool(info.data.get("rewards"))
        if has_several and reward in (WEIGHTED, cls.reward):
            return WEIGHTED
        if has_several:
            raise ValueError(
                f"data.reward={reward!r} and data.rewards exclude each other; name {reward!r} in "
                "data.rewards, with a weight"
            )
        if reward != WEIGHTED:
            target(reward, REWARDS, "data.reward")
        return reward

    @model_validator(mode="after")
    def _rewards_have_what_they_need(self) -> Self:
        named = {self.reward, *(source.reward for source in self.sources if source.reward)}
        if WEIGHTED in named and not self.rewards:
            raise ValueError(
                "data.reward='weighted' needs data.rewards: names of rewards, with weights"
            )
        if "@" in urlsplit(self.reward_url).netloc:
            raise ValueError(
                "data.reward_url holds a password, which would be written into the run's files; "
                "let its server answer without one, or write a reward that reads it elsewhere"
            )
        for name in sorted({part for reward in named for part in self.reward_weights(reward)}):
            place = target(name, REWARDS, "data.rewards")
            has_address = self.reward_url.startswith(("http://", "https://"))
            if place == REWARDS["remote"] and not has_address:
                raise ValueError(
                    f"data.reward={name!r} needs data.reward_url, the http:// or https:// address "
                    f"of its server, not {self.reward_url!r}"
                )
        return self

    def reward_weights(self, reward: str) -> dict[str, float]:
        """The weights of the rewards whose sum is the one that `reward` names, by name."""
        return self.rewards if reward == WEIGHTED else {reward: 1.0}

    @model_validator(mode="after")
    def _has_one_kind_of_prompts(self) -> Self:
        if self.prompts and self.sources:
            raise ValueError(
                f"data.prompts={self.prompts!r} and data.sources are both set; make the file one "
                "of the sources, or leave one of the two out"
            )
        check_titles(self.sources)
        return self

    def by_source(self) -> "dict[str, DataConfig]":
        """For each source by name the configuration as if there were no other; under the
        empty name this one, where there is only one."""
        if not self.sources:
            return {"": self}
        return {source.title: source.data(self) for source in self.sources}
