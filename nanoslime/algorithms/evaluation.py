"""What an evaluation says of a policy: mean@k and pass@k with their standard errors.

    rewards of samples -> one score per rollout -> one value per prompt -> mean over prompts

The samples of one prompt are not independent of one another. A standard error is therefore
that of the mean of one value per prompt, so that prompts are the clusters (arXiv 2411.00640,
sections 2.1 and 2.2).
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence

from nanoslime.types import Group, Scored, Status

# A weighted sum of rewards may be so much below 1 where all of its parts are 1.
_ROUNDING = 1e-9


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """The chance that one of `k` samples passes, estimated from `num_samples` of which
    `num_passed` did.

    It is 1 - C(n - c, k) / C(n, k), which is unbiased (arXiv 2107.03374, equation 1). Raises
    ValueError unless 1 <= k <= num_samples.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} cannot be estimated from {num_samples} samples")
    return 1.0 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def standard_error(values: Sequence[float]) -> float | None:
    """That of the mean of `values`: s / sqrt(n), where s has n - 1 in its denominator.

    None for a single value, which says nothing of how values differ.
    """
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def evaluation_metrics[S: Scored](
    groups: Sequence[Group[S]], pass_reward: float = 1.0
) -> dict[str, float]:
    """Describes the groups of one evaluation set, a group for each of its prompts.

    reward_mean is the mean reward, in which each prompt weighs the same; it is called mean@n
    too, where n is the number of rollouts of a prompt. pass@k is the chance that one of k
    passes, for n and each power of two k below it; a rollout passes with a reward of at least
    `pass_reward`. <name>_se is the standard error, which a single prompt does not have.

    Siblings (samples with one rollout_id) are one rollout, with the mean of their rewards. A
    sample without a reward counts as reward 0. Raises ValueError where there are no samples.
    """
    scores = [_rollout_scores(group) for group in groups]
    num_rollouts = min(map(len, scores), default=0)
    if num_rollouts == 0:
        raise ValueError("an evaluation needs a sample of each of its prompts")
    values = {f"mean@{num_rollouts}": [statistics.fmean(own) for own in scores]}
    num_passed = [sum(score >= pass_reward - _ROUNDING for score in own) for own in scores]
    powers = {2**i for i in range(num_rollouts.bit_length())}
    for k in sorted(powers | {num_rollouts}):
        values[f"pass@{k}"] = [
            pass_at_k(len(own), passed, k) for own, passed in zip(scores, num_passed, strict=True)
        ]
    metrics = {"reward_mean": math.fsum(values[f"mean@{num_rollouts}"]) / len(groups)}
    for name, of_prompts in values.items():
        metrics[name] = statistics.fmean(of_prompts)
        error = standard_error(of_prompts)
        if error is not None:
            metrics[f"{name}_se"] = error
    samples = [sample for group in groups for sample in group.samples]
    statuses = [sample.status for sample in samples]
    metrics["truncated_ratio"] = statuses.count(Status.TRUNCATED) / len(samples)
    metrics["error_ratio"] = statuses.count(Status.ERROR) / len(samples)
    total_length = sum(sample.num_response_tokens for sample in samples)
    metrics["response_tokens_mean"] = total_length / len(samples)
    return metrics


def _rollout_scores[S: Scored](group: Group[S]) -> list[float]:
    """One score for each rollout of a group."""
    rewards: dict[int, list[float]] = defaultdict(list)
    for sample in group.samples:
        rewards[sample.rollout_id].append(sample.reward or 0.0)
    return [statistics.fmean(own) for own in rewards.values()]
