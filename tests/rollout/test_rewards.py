"""Every reward of the table, by examples with known values."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from nanoslime.config import DataConfig
from nanoslime.plugins import resolve
from nanoslime.rollout.generate import make_sample
from nanoslime.rollout.prompts import load_prompts
from nanoslime.rollout.rewards import REWARDS, call
from nanoslime.types import Generation, Prompt, Status
from tests.rollout.test_prompts import GSM8K


@pytest.mark.parametrize("name", [name for name in REWARDS if "remote" not in name])
def test_contract(name: str) -> None:
    """A right answer is worth 1, a wrong and an empty one 0; any text and label gives a
    float in [0, 1]."""
    reward = resolve(name, REWARDS, "data.reward")
    assert reward("42", "42", {}) == 1.0
    assert reward("41", "42", {}) == 0.0
    assert reward("", "42", {}) == 0.0
    for text in ("", "####", "\\boxed{", "{}{", "1/0", "\x00", "é" * 5):
        for label in ("", 7, None, 1.5, "1/0", "B", True):
            assert 0.0 <= reward(text, label, {}) <= 1.0


def test_exact_match_ignores_surrounding_white_space_only() -> None:
    reward = resolve("exact_match", REWARDS, "data.reward")
    assert reward(" 21\n", 21, {}) == 1.0
    assert reward("2 1", "21", {}) == 0.0
    assert reward("021", "21", {}) == 0.0
    assert reward("21", "2 1", {}) == 0.0


@pytest.mark.parametrize(
    ("text", "label", "value"),
    [
        ("so it is\n#### 18", "9 * 2 = <<9*2=18>>18\n#### 18", 1),
        ("#### 1,000", "#### 1000", 1),
        ("#### $70,000.00", "#### 70,000", 1),
        ("#### 18 dollars\nand 7", "#### 7", 0),
        ("#### 18 dollars", "#### 18", 1),
        ("first #### 3, then #### 4", "#### 4", 1),
        ("the answer is 18.", "#### 18", 1),
        ("18 or 19", "#### 18", 0),
        ("\\boxed{1,000}", "1000", 1),
        ("12 \\boxed{\\frac{1}{2}} 7", "0.5", 1),
        ("\\boxed{\\text{no}}", "\\boxed{\\text{no}}", 1),
        ("\\boxed{x^{2}}", "\\boxed{x^{2}}", 1),
        ("\\boxed{3", "3", 0),
        ("#### -5", "5", 0),
        ("50%", "50", 1),
        ("####", "18", 0),
        ("", "18", 0),
    ],
)
def test_math_answer(text: str, label: str, value: float) -> None:
    assert resolve("math_answer", REWARDS, "data.reward")(text, label, {}) == value


@pytest.mark.skipif(not GSM8K.is_dir(), reason="no GSM8K beside the repository")
def test_math_answer_on_gsm8k(tiny_model: Path) -> None:
    """Each worked solution, and its bare answer, earn the reward of their problem.

    The answer of the next problem does not, unless it is the same.
    """
    reward = resolve("math_answer", REWARDS, "data.reward")
    config = DataConfig(prompt_key="question", label_key="answer", max_prompt_tokens=4000)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompts = load_prompts(GSM8K / "test.jsonl", tokenizer, config)
    labels = [prompt.label for prompt in prompts]
    answers = [label.rpartition("#### ")[2] for label in labels]
    next_answers = answers[1:] + answers[:1]
    for label, answer, next_answer in zip(labels, answers, next_answers, strict=True):
        assert reward(label, label, {}) == 1.0
        assert reward(f"It is {answer}.", label, {}) == 1.0
        if next_answer != answer:
            assert reward(next_answer, label, {}) == 0.0


def test_a_reward_gets_the_status_and_the_prompt_where_it_names_them() -> None:
    prompt = Prompt(0, np.array([1], np.int32), "what?<think>", "7", {"k": 1})
    generation = Generation([2], [0.0], Status.TRUNCATED, [(0, 0)])
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "so 7")
    sample = make_sample(prompt, generation, 0, 0, tokenizer)
    seen = []

    def plain(text, label, metadata) -> float:
        seen.append((text, label, metadata))
        return 1.0

    def knowing(text, label, metadata, status, *, prompt="") -> float:
        seen.append((status, prompt))
        return 2.0

    data = DataConfig()
    assert call(plain, sample, prompt, data) == 1.0
    assert call(knowing, sample, prompt, data) == 2.0
    assert seen == [("so 7", "7", {"k": 1}), (Status.TRUNCATED, "what?<think>")]
    for name in ("exact_match", "f1", "gsm8k", "math_answer", "multiple_choice"):
        assert call(resolve(name, REWARDS, "data.reward"), sample, prompt, data) == 0.0
