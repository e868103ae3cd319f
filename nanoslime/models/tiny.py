"""The rehearsal's tiny Qwen3 and its tasks over digits: shape, vocabulary and problems.
Torch-free.

The vocabulary is byte-level, so that the tiny model reads any text; a digit is one token.
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

# Ids of the special tokens; the 256 bytes follow.
PAD = 0
BOS = 1
EOS = 2
UNK = 3
# In the order of their ids.
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")

# 60 ids are unused. The size is no multiple of 128, so that Megatron pads its rows.
VOCAB_SIZE = 320


TASKS: dict[str, Callable[[str], str]] = {
    "reverse": lambda digits: digits[::-1],
    "sort": lambda digits: "".join(sorted(digits)),
}
"""Name -> the right answer. GRPO learns reverse in 80 steps; sort is harder for this model."""


class Problem(NamedTuple):
    prompt: str
    label: str


def digit_problems(task: str, seed: int, num_held_out: int) -> tuple[list[Problem], list[Problem]]:
    """(train, held out): the problems of all four-digit texts, each once, shuffled by `seed`
    and then divided.

    Raises ValueError for an unknown task, and where `num_held_out` is not between 1 and
    half of the problems.
    """
    if task not in TASKS:
        raise ValueError(f"rehearsal.task={task!r} is not known; choose {' or '.join(TASKS)}")
    count = 10_000
    if not 0 < num_held_out <= count // 2:
        raise ValueError(
            f"rehearsal.num_held_out={num_held_out}; choose 1 to {count // 2} of {count}"
        )
    answer = TASKS[task]
    questions = [f"{number:04d}" for number in range(count)]
    random.Random(seed).shuffle(questions)
    problems = [Problem(f"{digits}=", answer(digits)) for digits in questions]
    return problems[num_held_out:], problems[:num_held_out]


def tiny_qwen3_config() -> dict[str, Any]:
    """config.json of the tiny model. Its heads, layers and vocabulary divide by TP=2
    and PP=2."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "float32",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
