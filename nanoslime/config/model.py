"""Which model is trained, and on which data.

A model's shape comes from the checkpoint's config.json, never from flags.
"""

from typing import Any, Literal

from pydantic import Field, field_validator

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
    hf_checkpoint: str = ""
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
    prompt_key: str = Field(default="prompt", min_length=1)
    """Where a row has its prompt: a text, or a list of {role, content} messages. Of this
    and the other keys, a dot leads into a struct or a list (reward_model.ground_truth,
    messages.0.content), unless the row has a key with that dot in its name."""
    label_key: str = "label"
    """Where a row has its label, a text or a number; empty: there are no labels."""
    metadata_key: str = "metadata"
    """Where a row may have an object, or its JSON text, that the reward gets."""
    chat_template: Literal["auto", "on", "off"] = "auto"
    """auto: apply the tokenizer's chat template where it has one."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template (enable_thinking: false)."""
    system_prompt: str = ""
    max_prompt_tokens: int = Field(default=1024, ge=1)
    over_long: Literal["error", "skip"] = "error"
    """What to do with a prompt of more than max_prompt_tokens."""
    deduplicate: bool = False
    """Keep a prompt that comes several times with the same label only once. False: it
    comes as often in each epoch as in the file."""
    shuffle: bool = True
    reward: str = "exact_match"
    """A name of the reward table, or "package.module:function"."""

    @field_validator("chat_template", mode="before")
    @classmethod
    def _yaml_switch(cls, value: Any) -> Any:
        """YAML reads the words on and off as true and false."""
        if isinstance(value, bool):
            return "on" if value else "off"
        return value

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
    def _known_reward(cls, reward: str) -> str:
        target(reward, REWARDS, "data.reward")
        return reward
