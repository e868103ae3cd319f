"""How samples are drawn: prompts per rollout, sampling parameters, engines."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from nanoslime.config.base import PathOrName, knobs
from nanoslime.plugins import target
from nanoslime.types import PauseMode

# Each names a subclass of `nanoslime.engine_kind.EngineKind`, in a file without torch.
ENGINES = {
    "sglang": "nanoslime.rollout.engines.sglang:SGLang",
    "embedded": "nanoslime.rollout.engines.embedded:Embedded",
}

# What makes the samples of a prompt; `nanoslime.rollout.environments` says what each is.
ENVIRONMENTS = {
    "single_turn": "nanoslime.rollout.environments.single_turn:run",
    "calculator": "nanoslime.rollout.environments.calculator:run",
    "self_check": "nanoslime.rollout.environments.self_check:run",
    "agent": "nanoslime.rollout.environments.agent:Agent",
    "verifiers": "nanoslime.rollout.environments.verifiers_adapter:Verifiers",
}


# SGLang takes a lower one for greedy sampling, and then reports logprobs of temperature 1.
LOWEST_TEMPERATURE = 1e-6
# Options of SGLang that bound prompt and response together.
TOKEN_LIMITS = ("context_length", "max_total_tokens")
# SGLang refuses requests with more.
_MAX_STOP_STRINGS = 32


def leaves_tokens(field: str) -> AfterValidator:
    """Refuses a value of the top_k `field` that leaves no token to sample."""

    def check(top_k: int) -> int:
        if top_k == 0 or top_k < -1:
            raise ValueError(
                f"{field}={top_k} leaves no token to sample; set 1 or more, or -1 for no limit"
            )
        return top_k

    return AfterValidator(check)


@knobs
class RolloutConfig:
    num_rollout: int = Field(default=100, ge=1)
    """Rollouts of the run: sample, train, sync weights."""
    rollout_batch_size: int = Field(default=32, ge=1)
    """Prompts per rollout."""
    dynamic_sampling_rounds: int = Field(default=1, ge=1)
    """A group that is filtered is replaced by a further prompt at once (dynamic sampling,
    arXiv 2503.14476, section 3.2), until the batch is full or so many times
    rollout_batch_size prompts were sampled for it. 1: off."""
    max_staleness: int = Field(default=0, ge=0)
    """By how many versions the policy that samples a token may be behind the one that
    trains on it. 0: strictly on-policy, engines and trainer take turns. 1: the next
    rollout is sampled during training. k: engines are up to k rollouts ahead."""
    overdue: Literal["wait", "regenerate", "drop"] = "wait"
    """What becomes of a group that still runs when its tokens may not get older: training
    waits for it, its prompt is sampled again by the current weights, or it is left out.
    Of the latter two the number is in the metrics."""
    n_samples_per_prompt: int = Field(default=8, ge=1)
    """Samples of each prompt: the group that GRPO compares."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """Tokens of a response at most."""
    temperature: float = Field(default=1.0, ge=LOWEST_TEMPERATURE)
    """Temperature of sampling, and of the logprobs that training takes."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that have this probability together; 1: from all."""
    top_k: Annotated[int, leaves_tokens("rollout.top_k")] = -1
    """Sample from so many of the likeliest tokens; -1: from all."""
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, max_length=_MAX_STOP_STRINGS
    )
    """Texts that end a response, in evaluations too; the text and its tokens stay in the
    response."""
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    """Tokens that end a response beside the model's own, in evaluations too."""
    engine: str = "sglang"
    """A name of the engine table, or "package.module:Class". sglang: servers. embedded:
    transformers in process, for machines without SGLang and for tests."""
    environment: str = "single_turn"
    """What a rollout of a prompt does: a name of the environment table, or
    "package.module:name" of a function `async (prompt, policy) -> list[Sample]` or of a class
    of such. single_turn: one response."""
    environment_options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the environment."""
    environment_timeout_s: float = Field(default=3600.0, gt=0)
    """An environment that takes longer gives its sample the status error. Waiting for the
    policy's tokens does not count: their deadline is request_deadline_s."""
    engine_tp_size: int = Field(default=1, ge=1)
    """GPUs per engine."""
    engines_per_node: int | None = Field(default=None, ge=1)
    """Engines on a node that has them; default: as many as its free GPUs (or slots) hold."""
    record: Literal["none", "text", "full"] = "full"
    """What is kept of each rollout in rollouts/: text, a line for each sample; full, also the
    arrays, with which load_rollouts trains."""
    record_keep: int = Field(default=0, ge=0)
    """The last so many rollouts are kept; 0: all."""
    mask_stale_tokens: bool = False
    """Tokens that older weights than the current ones sampled leave the loss and its
    denominators; a sample that has no others leaves the batch."""
    max_inflight: int = Field(default=512, ge=1)
    """Sequences that are sent to an engine at once, by each rollout worker; more wait, which
    does not count into request_deadline_s."""
    at_sync: PauseMode = "retract"
    """What a weight sync does to running requests. retract: they go on under the new weights
    and are computed again from their tokens. in_place: they go on with the old weights' cache.
    abort: they end, and are sent again with the tokens that they have. The embedded engine
    keeps no cache over a sync."""
    engine_restarts: int = Field(default=3, ge=0)
    """How often an engine that is lost is started again, each time after a longer pause; with
    cluster.colocate never."""
    load_rollouts: PathOrName = ""
    """Train on the rollouts that a run recorded (its directory, or the rollouts/ in
    it), without engines."""
    rollout_only: bool = False
    """Generate, score and record without a trainer: engines serve model.hf_checkpoint
    on all GPUs."""
    sglang: dict[str, Any] = Field(default_factory=dict)
    """SGLang server options as written there (mem_fraction_static: 0.8)."""
    start_deadline_s: float = Field(default=600.0, gt=0)
    """How long an engine may take to load its weights and to answer."""
    request_deadline_s: float = Field(default=1800.0, gt=0)
    """How long an engine may take to answer one request."""

    @field_validator("engine", "environment")
    @classmethod
    def _known(cls, name: str, info: ValidationInfo) -> str:
        table = ENGINES if info.field_name == "engine" else ENVIRONMENTS
        target(name, table, f"rollout.{info.field_name}")
        return name


@knobs
class WeightSyncConfig:
    transport: Literal["auto", "broadcast", "tensor", "disk", "in_process"] = "auto"
    """auto: an embedded engine takes in_process beside one rank, and disk beside
    several; SGLang takes broadcast, and with cluster.colocate tensor (handles of the
    trainer's memory, on a GPU or a CPU)."""
    bucket_bytes: int = Field(default=512 << 20, ge=1)
    """A rank holds at most twice as many bytes for weight sync: of a tensor that is larger than a
    bucket it sends rows."""
    compare_every: int = Field(default=50, ge=0)
    """In so many syncs one is made twice, as is the first, and that for an engine which comes
    back: the second time must not change a tensor in any engine. 0: only those."""
    probe_tokens: int = Field(default=64, ge=0)
    """After each sync engines and trainer give so many tokens of prompts their logprobs, which
    are compared; 0: none."""
    max_logprob_gap: float | None = Field(default=None, gt=0)
    """An engine whose logprobs of these tokens differ from the trainer's by more than this, in
    the mean, has other weights: it is lost and started again, and the run ends where all are. By
    default 0.01 where model.dtype is float32, and 0.3 otherwise."""
    deadline_s: float = Field(default=300.0, gt=0)
    """How long each step of a weight sync may take."""
