"""Rewards by name. A reward is `reward(text, label, metadata) -> float`: the response's text, the prompt's
label."""

REWARDS = {
    "exact_match": "nanoslime.rollout.rewards.exact_match:reward",
    "math_answer": "nanoslime.rollout.rewards.math_answer:reward",
}
