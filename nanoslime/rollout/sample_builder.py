"""Puts a sample together from what was generated and what was observed, token by token.

Tokens are never decoded and tokenized again: what is trained on is what was sampled.
"""

from collections.abc import Sequence
from copy import copy

import numpy as np

from nanoslime.rollout.policy import Policy
from nanoslime.types import Generation, Prompt, Sample, Status


class SampleBuilder:
    """One sequence of a rollout: a prompt, then generations and observations in turn.

    `token_ids` is what the policy is asked to continue next.
    """

    def __init__(
        self, prompt: Prompt, policy: Policy, token_ids: Sequence[int] | None = None
    ) -> None:
        """`token_ids` are the tokens to begin with, where they are not those of the prompt."""
        start = prompt.token_ids if token_ids is None else token_ids
        self.token_ids: list[int] = [int(token) for token in start]
        self._prompt = prompt
        self._policy = policy
        self._logprobs = [0.0] * len(self.token_ids)
        self._mask = [False] * len(self.token_ids)
        self._versions: list[tuple[int, int]] = []
        self._texts: list[str] = []
        self._experts: np.ndarray | None = None
        self._last: Generation | None = None
        # Where the last generated token ends, or the prompt.
        self._end = len(self.token_ids)

    @property
    def text(self) -> str:
        """What the model wrote; each turn begins on a new line."""
        return "\n".join(self._texts)

    def generated(self, generation: Generation) -> None:
        """Adds what the policy made of `token_ids`; these tokens are in the loss.

        The experts of a request are those of all tokens before it, too. Raises ValueError
        where they are those of another sequence.
        """
        start = len(self.token_ids)
        self._last = generation
        if not generation.token_ids:
            return
        experts = generation.routed_experts
        num_rows = start + len(generation.token_ids) - 1
        if experts is not None and len(experts) != num_rows:
            raise ValueError(
                f"a generation with the experts of {len(experts)} tokens cannot follow "
                f"{start} tokens; ask the policy to continue the builder's token_ids"
            )
        self._experts = experts
        self.token_ids += generation.token_ids
        self._logprobs += generation.logprobs
        self._mask += [True] * len(generation.token_ids)
        self._versions += [(start + first, version) for first, version in generation.versions]
        self._texts.append(self._policy.decode(generation.token_ids))
        self._end = len(self.token_ids)

    def observed(self, token_ids: Sequence[int]) -> None:
        """Adds tokens that others wrote, a tool or a user; they are not in the loss."""
        self.token_ids += [int(token) for token in token_ids]
        self._logprobs += [0.0] * len(token_ids)
        self._mask += [False] * len(token_ids)

    def fork(self) -> "SampleBuilder":
        """Another builder with the same tokens so far."""
        other = copy(self)
        for name in ("token_ids", "_logprobs", "_mask", "_versions", "_texts"):
            setattr(other, name, list(getattr(self, name)))
        return other

    def build(
        self, status: Status | None = None, error: str | None = None, loss_from: int = 0
    ) -> Sample:
        """The sample so far; its status is that of the last generation unless one is given.

        What was observed after the last generated token is left out: nothing depends on it.
        Tokens before `loss_from` are not in the loss: they are in that of another sample.
        """
        if self._last is not None:
            status = status or self._last.status
            error = error or self._last.error
        if status is None:
            status = Status.ERROR
            error = error or "the environment generated nothing"
        end = self._end
        prompt = self._prompt
        mask = np.asarray(self._mask[:end], np.bool_)
        mask[:loss_from] = False
        logprobs = np.asarray(self._logprobs[:end], np.float32)
        logprobs[:loss_from] = 0.0
        return Sample(
            group_id=self._policy.group_id,
            rollout_id=self._policy.rollout_id,
            token_ids=np.asarray(self.token_ids[:end], np.int32),
            loss_mask=mask,
            rollout_logprobs=logprobs,
            policy_versions=[span for span in self._versions if span[0] >= loss_from],
            status=status,
            text=self.text,
            label=prompt.label,
            metadata={**prompt.metadata, "prompt_id": prompt.prompt_id},
            error=error,
            routed_experts=self._experts,
        )
