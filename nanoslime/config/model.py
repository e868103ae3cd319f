"""Which model is trained, and on which data.

A model's shape comes from the checkpoint's config.json, never from flags.
"""

from typing import Literal

from pydantic import field_validator

from nanoslime.config.base import knobs
from nanoslime.plugins import target

REWARDS = {
    "exact_match": "nanoslime.rollout.rewards.exact_match:reward",
    "math_answer": "nanoslime.rollout.rewards.math_answer:reward",
}
"""A reward is `reward(text, label, metadata) -> float`.

It takes the text of the response, and label and metadata of the prompt. If it names a
parameter `status`, it gets that of the sample too (a nanoslime.types.Status); if it names
`prompt`, the text that the response goes on from.
"""


@knobs
class ModelConfig:
    hf_checkpoint: str = ""
    """Directory of a Hugging Face checkpoint, or a hub id; submission resolves an id to
    a local path."""
    revision: str = ""
    """Commit of the hub snapshot; filled in at submission."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype of trainers and engines. Main parameters, gradients and optimizer
    state are always float32."""
    trust_remote_code: bool = False


@knobs
class RehearsalConfig:
    """The tiny model and digits task of a run that has no checkpoint and no prompts."""

    enabled: bool = False
    task: str = "reverse"
    target_reward: float = 0.4
    """The supervised warm start ends when sampled exact match reaches this."""
    num_held_out: int = 400
    seed: int = 0


@knobs
class DataConfig:
    prompts: str = ""
    """JSONL or parquet file of training prompts."""
    eval_prompts: str = ""
    prompt_key: str = "prompt"
    label_key: str = "label"
    chat_template: Literal["auto", "on", "off"] = "auto"
    """auto: apply the tokenizer's chat template where it has one."""
    system_prompt: str = ""
    max_prompt_tokens: int = 1024
    over_long: Literal["error", "skip"] = "error"
    """What to do with a prompt of more than max_prompt_tokens."""
    shuffle: bool = True
    reward: str = "exact_match"
    """A name of the reward table, or "package.module:function"."""

    @field_validator("reward")
    @classmethod
    def _known_reward(cls, reward: str) -> str:
        target(reward, REWARDS, "data.reward")
        return reward
