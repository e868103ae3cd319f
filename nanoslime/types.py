"""The nouns between rooms before anything becomes a tensor: prompts, samples, groups, engines.

One token axis `[T]` with a mask serves for everything; there is no second axis of response
lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:  # what the login node loads is quick without it
    import numpy as np


class Status(StrEnum):
    COMPLETED = "completed"  # the model ended its answer
    TRUNCATED = "truncated"  # the token limit ended it
    ABORTED = "aborted"  # the engine or a pause ended it
    ERROR = "error"  # no usable tokens; Sample.error says why


class RunError(RuntimeError):
    """An expected way for a run to fail, shown as one line: value, place, way out."""


class MachineFailure(RunError):
    """A process died or hangs, or a node or a filesystem is lost: it is not the fault of what the
    run was asked to do, and another attempt may go on.
    """


class RequestFailed(RunError):
    """A request got no usable answer, through no fault of its own; it may be tried again.

    Its engine may be gone or well: `Engine.health` tells.
    """


class EngineGone(MachineFailure):
    """An engine did not answer a control call: it is dead, or it hangs."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a source of prompts, already tokenized."""

    # The row's position in its source; those of later sources go on from there, so that no two
    # prompts of a run have the same. Stable over shuffles.
    prompt_id: int
    token_ids: np.ndarray  # int32 [P], P >= 1
    text: str
    label: Any
    metadata: dict[str, Any] = field(default_factory=dict)
    source: str = ""  # the name of its source, where data.sources names several
    reward: str = ""  # a name of the reward table, or "package.module:function"


@dataclass(kw_only=True, slots=True)
class SampleArrays:
    """What a trainer rank needs of a sample. Arrays are per token: [T], where T = prompt +
    response tokens.

    rollout_logprobs[t] is log p(token_ids[t] | token_ids[:t]) at the sampling temperature,
    under the policy that sampled the token. It is 0.0 where loss_mask[t] is False (prompt,
    tool output).

    policy_versions are (first token, version) spans: a sample may outlive a weight update.

    routed_experts are the experts that token t went to, by layer that has experts. They end
    one token early, because the engine never runs the last token.
    """

    token_ids: np.ndarray  # int32 [T]
    loss_mask: np.ndarray  # bool [T]
    rollout_logprobs: np.ndarray  # float32 [T]
    policy_versions: list[tuple[int, int]]
    # [T-1, num_moe_layers, topk]; uint8 up to 256 experts, else int16
    routed_experts: np.ndarray | None = None

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """(first token, token after the last one, version) of each span."""
        ends = [first for first, _ in self.policy_versions[1:]] + [len(self.token_ids)]
        for (first, version), end in zip(self.policy_versions, ends, strict=False):
            yield first, end, version


@dataclass(kw_only=True)
class SampleFacts:
    """What the driver knows of a sample, too."""

    group_id: int  # the prompt's group; advantages are relative within it
    rollout_id: int  # siblings of one fanned-out rollout share it, and one loss denominator
    policy_versions: list[tuple[int, int]]
    status: Status
    error: str | None = None
    reward: float | None = None  # set once, by the reward
    # Where the reward is a weighted sum, what each reward in it gave, by name.
    reward_parts: dict[str, float] = field(default_factory=dict)
    advantage: float | None = None  # set once, by the algorithm; never stored in `reward`


@dataclass(kw_only=True)
class Sample(SampleArrays, SampleFacts):
    """One sampled sequence."""

    text: str = ""  # the decoded response
    label: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_response_tokens(self) -> int:
        return int(self.loss_mask.sum())

    @property
    def arrays(self) -> SampleArrays:
        return SampleArrays(**{one.name: getattr(self, one.name) for one in fields(SampleArrays)})

    def report(self, arrays: SampleArrays | KeptArrays) -> SampleReport:
        """What the driver is told of the sample; `arrays` are its own, or say where they are.

        Raises ValueError for a sample on which no trainer could train.
        """
        self.check()
        expert_shape = None
        if self.routed_experts is not None:
            _, num_moe_layers, topk = self.routed_experts.shape
            expert_shape = (num_moe_layers, topk)
        counts: dict[int, int] = {}
        for first, end, version in self.spans():
            num_in_loss = int(self.loss_mask[first:end].sum())
            if num_in_loss:
                counts[version] = counts.get(version, 0) + num_in_loss
        facts = {one.name: getattr(self, one.name) for one in fields(SampleFacts)}
        return SampleReport(
            **facts,
            prompt_id=self.metadata.get("prompt_id", -1),
            num_tokens=self.num_tokens,
            num_response_tokens=self.num_response_tokens,
            loss_tokens_by_version=dict(sorted(counts.items())),
            expert_shape=expert_shape,
            arrays=arrays,
        )

    def check(self) -> None:
        """Raises ValueError for a sample on which no trainer could train."""
        name = f"sample of group {self.group_id}, rollout {self.rollout_id}"
        lengths = [len(self.token_ids), len(self.loss_mask), len(self.rollout_logprobs)]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"{name}: token_ids, loss_mask and rollout_logprobs must be equally long, but have"
                f" {lengths[0]}, {lengths[1]} and {lengths[2]} entries"
            )
        if self.loss_mask[0]:
            raise ValueError(
                f"{name}: token 0 is in the loss, but nothing precedes it to predict it"
            )


@dataclass(frozen=True, slots=True)
class KeptArrays:
    """Says where the arrays of a sample are: a rollout worker keeps them for the trainer ranks."""

    worker: int
    group_id: int
    index: int  # of the sample in its group


@dataclass(kw_only=True)
class SampleReport(SampleFacts):
    """What the driver knows of a sample: numbers, and where its arrays are."""

    prompt_id: int
    num_tokens: int
    num_response_tokens: int
    # Tokens in the loss by the version that sampled them, oldest version first.
    loss_tokens_by_version: dict[int, int]
    # (num_moe_layers, topk) where the sample has routed experts.
    expert_shape: tuple[int, int] | None
    arrays: SampleArrays | KeptArrays


Scored = Sample | SampleReport
"""What the algorithms see of a sample."""


@dataclass(slots=True)
class Group[S: Scored]:
    """The samples of one prompt; any size. Statistics are taken by `group_id`, never by
    reshape.
    """

    group_id: int
    samples: list[S]

    @property
    def rewards(self) -> list[float]:
        """Rewards of the samples, in order. Raises ValueError where one has not been set."""
        rewards = []
        for sample in self.samples:
            if sample.reward is None:
                raise ValueError(f"group {self.group_id} holds a sample without a reward")
            rewards.append(float(sample.reward))
        return rewards


SampleGroup = Group[Sample]
GroupReport = Group[SampleReport]


def local_reports(groups: Sequence[SampleGroup]) -> list[GroupReport]:
    """What the driver is told of groups whose arrays are in its own process."""
    return [
        Group(group.group_id, [sample.report(sample.arrays) for sample in group.samples])
        for group in groups
    ]


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A request for `n` samples of one prompt."""

    token_ids: Sequence[int]  # [P]
    n: int
    max_new_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = -1  # -1: off
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()  # texts; what ends a response stays in it
    seed: int | None = None  # same seed, same samples: honoured by the embedded engine only

    def check_tokens(self, vocab_size: int, engine: str) -> None:
        """Raises RunError for a prompt without tokens, which would cost those beside it their
        batch, and for a token id outside the vocabulary, which would kill a server.
        """
        if len(self.token_ids) == 0:
            raise RunError(f"engine {engine}: a prompt without a token cannot be continued")
        for position, token in enumerate(self.token_ids):
            if not 0 <= token < vocab_size:
                raise RunError(
                    f"engine {engine}: token id {token} at position {position} of a prompt is not "
                    f"in the vocabulary of {vocab_size}; is the tokenizer the checkpoint's own?"
                )


@dataclass(frozen=True, slots=True)
class Generation:
    """One continuation; `logprobs` are of the unfiltered distribution at the sampling
    temperature.
    """

    token_ids: list[int]  # [R], with the stop token where one ended it
    logprobs: list[float]  # [R]
    status: Status
    versions: list[tuple[int, int]]  # (first response token, policy version) spans
    error: str | None = None
    # [P+R-1, ...] as in Sample, where the engine was asked to report them
    routed_experts: np.ndarray | None = None
    # What reading the answer took that it is the first generation of.
    parse_s: float = field(default=0.0, compare=False)


# A tensor's name, its dtype as "torch.bfloat16", its shape.
TensorKind = tuple[str, str, Sequence[int]]

# What an engine holds on its device. With the weights alone it can be sent new ones.
MemoryPart = Literal["weights", "cache"]

# What a pause does to running requests. retract: they stay, and are computed again after
# `resume`, so that the cache can be flushed. in_place: they stay together with their cache.
# abort: they end, with status aborted and the tokens that they have.
PauseMode = Literal["retract", "in_place", "abort"]


@runtime_checkable
class Engine(Protocol):
    """What samples tokens. SGLang over HTTP and the embedded transformers engine look the
    same from outside.

    Control calls block, have a deadline, and raise RunError naming the engine and its log;
    it is EngineGone where the engine does not answer. `generate` raises RequestFailed for a
    request that another try may save. Weights change only between `pause()` and `resume()`;
    `policy_version` is what the engine itself reports.
    """

    name: str

    async def generate(self, request: GenerateRequest) -> list[Generation]: ...

    def health(self) -> bool:
        """Whether the engine generates; a hung one gives False after a deadline of its own."""

    def pause(self, mode: PauseMode = "retract") -> None:
        """Stops generating; requests wait until `resume`, new ones and those that stay."""

    def resume(self) -> None: ...

    def interrupt(self) -> None:
        """Ends all requests that it has, with status aborted and the tokens that they have.

        A request that is on its way may be missed.
        """

    def score(self, token_ids: Sequence[int]) -> tuple[list[float], int]:
        """The logprob of each token but the first, given those before it, at temperature 1; and
        the version of the weights that say so."""
        ...

    def agree(self, tensors: Sequence[TensorKind]) -> None:
        """Raises RunError where an update with these tensors is none of the model that the
        engine has loaded, or of another dtype."""

    def flush(self) -> None: ...
    def policy_version(self) -> int: ...

    def update_weights_from_disk(
        self, path: str, version: int, *, flush: bool = True, compares: bool = False
    ) -> None:
        """`flush` empties the prefix cache, which a pause in place forbids. An engine that has
        these weights `compares` them instead, and raises RunError where they differ.
        """

    def release_memory(self) -> None:
        """Frees weights and cache on the device; nothing may be running."""

    def resume_memory(self, part: MemoryPart) -> None:
        """Takes the memory of `part` again, with undefined contents: weights have to be
        sent anew.
        """


@dataclass(frozen=True, slots=True)
class WeightGroup:
    """A process group in which the ranks of engines receive weights from a trainer rank, its rank
    0, which listens at `address`.
    """

    name: str
    address: str
    port: int
    world_size: int
    backend: str


@runtime_checkable
class BroadcastEngine(Engine, Protocol):
    """An engine that receives weights from trainer ranks rather than from files.

    Either its `world_size` ranks join a process group with a sender, or processes on its
    own devices hand it one payload for each of its ranks.
    """

    world_size: int

    def join_weight_group(self, group: WeightGroup, first_rank: int) -> None: ...
    def begin_update(self) -> None: ...
    def receive_buckets(
        self, *, names: list[str], dtypes: list[str], shapes: list[list[int]], group: str
    ) -> None: ...
    def receive_payloads(self, payloads: list[bytes]) -> None: ...
    def end_update(self, version: int, *, flush: bool = True) -> None: ...

    def abandon_update(self, group: str) -> None:
        """Ends an update that was begun, and leaves the groups whose names begin with `group`,
        whatever became of them.

        The weights may be a mixture, so another update has to follow before `resume`.
        Raises EngineGone where what computes in the engine does not answer.
        """
