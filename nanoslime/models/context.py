"""Whether a prompt and its response fit the model's context, and stop tokens its vocabulary."""

from nanoslime.config import RunConfig
from nanoslime.config.rollout import TOKEN_LIMITS
from nanoslime.models.shape import ModelShape
from nanoslime.types import RunError


def context_limit(config: RunConfig, shape: ModelShape) -> int:
    """The most tokens that a prompt and its response can have together."""
    return min([shape.context_length, *_limits_of_engine(config).values()])


def _limits_of_engine(config: RunConfig) -> dict[str, int]:
    """The options of the engine that bound prompt and response together."""
    options = config.rollout.sglang if config.rollout.engine == "sglang" else {}
    return {name: options[name] for name in TOKEN_LIMITS if options.get(name)}


def check_context(config: RunConfig, shape: ModelShape) -> None:
    """Raises RunError where a prompt and a response of the allowed lengths exceed the context,
    or a token that shall end responses is none of the model's.

    Engines refuse such a long request, so that no sample would be made. Recorded rollouts
    have their samples already.
    """
    rollout = config.rollout
    if rollout.load_rollouts:
        return
    last_stop_token = max(rollout.stop_token_ids, default=0)
    if last_stop_token >= shape.vocab_size:
        raise RunError(
            f"rollout.stop_token_ids has {last_stop_token}, which no response can hold: the "
            f"model's vocab_size is {shape.vocab_size}; take ids of the checkpoint's tokenizer"
        )
    asked = _limits_of_engine(config).get("context_length", 0)
    if asked > shape.context_length:
        raise RunError(
            f"rollout.sglang.context_length={asked} is more than the {shape.context_length} that "
            "the model reads (its max_position_embeddings and rope scaling), so that no engine "
            "would start; lower it, or leave it out"
        )
    limit = context_limit(config, shape)
    source = "the model reads (its max_position_embeddings and rope scaling)"
    for name, of_engine in _limits_of_engine(config).items():
        if of_engine == limit < shape.context_length:
            source = f"rollout.sglang.{name} allows"
    prompt = config.data.max_prompt_tokens
    lengths = {"rollout.max_new_tokens": rollout.max_new_tokens}
    for number, one in enumerate(config.eval.sets):
        lengths[f"eval.sets.{number}.max_new_tokens"] = one.max_new_tokens or 0
    for field, length in lengths.items():
        needed = prompt + length
        if needed > limit:
            raise RunError(
                f"data.max_prompt_tokens={prompt} and {field}={length} are {needed} tokens "
                f"together, more than the {limit} that {source}; lower one of them"
            )
