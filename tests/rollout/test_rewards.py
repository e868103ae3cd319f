"""Every reward of the table, by examples with known values."""

import json
import time

import numpy as np
import pytest

from nanoslime.config import DataConfig
from nanoslime.plugins import resolve
from nanoslime.rollout.rewards import REWARDS, asked_names, call, known, make
from nanoslime.types import Prompt, Sample, Status
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
def test_every_reference_answer_of_gsm8k_scores_1_and_a_wrong_number_0() -> None:
    """Each worked solution, and its bare answer; the answer of the next problem does not, unless
    it is the same."""
    labels = [
        json.loads(line)["answer"]
        for file in ("train.jsonl", "test.jsonl")
        for line in (GSM8K / file).read_text().splitlines()
    ]
    assert len(labels) == 7473 + 1319
    answers = [label.rpartition("#### ")[2] for label in labels]
    for name in ("gsm8k", "math_answer"):
        reward = resolve(name, REWARDS, "data.reward")
        for label, answer, next_answer in zip(labels, answers, answers[1:] + answers, strict=False):
            assert reward(label, label, {}) == 1.0
            assert reward(f"It is {answer}.", label, {}) == 1.0
            assert reward(next_answer, label, {}) == (next_answer == answer)


# {n} is the answer, as models write it.
FORMS = [
    "#### {n}",
    "#### ${n} dollars.",
    "#### **{n}**",
    "#### Total cost: ${n}",
    "#### Therefore, the total is {n}.",
    "#### = {n}",
    "#### Final Answer\n\n**{n}**",
    "#### {n}\n\n#### Verification\n3 ok",
    "#### Step 1: add them up\nso 3 + 4\n\nThe result: \\boxed{{{n}}}",
    "#### Step 1\n3 + 4 = 7\n#### Step 2\n7 * 2\n\nThe answer is {n}.",
    "#### 1. First step\n2 eggs\n#### 2. Second step\n3 eggs\nSo in total {n} eggs.",
    "\\boxed{{{n}}}\n\n#### Step 3: check\nall 5 fine",
    "<think>9</think><answer>{n} dollars</answer>",
    "<answer> \\boxed{{{n}}} </answer>",
    "The final answer is **{n}**.",
    "**Final Answer:** \\({n}\\)",
    "Answer: \n\n{n}",
    "Therefore, she makes **${n}** every day at the market.",
    "\\boxed{{\\${n}.00}}",
    "\\boxed{{{n}}}\\text{{ dollars}}",
    "\\boxed{{{n}\\ \\text{{miles per hour}}}}",
    "\\boxed{{3+4={n}}}",
    "3 + 4 = {n}",
]


@pytest.mark.parametrize("name", ["gsm8k", "math_answer"])
@pytest.mark.parametrize("form", FORMS)
def test_numbers_as_models_write_them(form: str, name: str) -> None:
    reward = resolve(name, REWARDS, "data.reward")
    for number, label in (("18", "#### 18"), ("1,080", "1080"), ("1080", "1,080"), ("-3", "-3")):
        assert reward(form.format(n=number), label, {}) == 1.0
    for wrong in ("1", "8", "81", "2", "3", "9", "-18"):
        assert reward(form.format(n=wrong), "so\n#### 18", {}) == 0.0
        assert reward(form.format(n="18"), wrong, {}) == 0.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("\\boxed{\\frac{36}{2}}", 1),
        ("36/2", 1),
        ("18 or 19", 0),
        ("#### 18 ($5 more)", 1),
        ("\\boxed{1/0}", 0),
    ],
)
def test_gsm8k_compares_numbers(text: str, value: float) -> None:
    assert resolve("gsm8k", REWARDS, "data.reward")(text, "#### 18", {}) == value


CAPITALS = {"choices": ["Rome", "Oslo", "Paris", "Bonn"]}


@pytest.mark.parametrize(
    "text",
    [
        "C",
        "(C)",
        "C) Paris",
        "**C. Paris**\n\nA is a dog, and B is no capital.",
        "The correct answer is: **C**",
        "The answer is (C), and A is wrong.",
        "The answer is C, not option B.",
        "The answer to the question is option C.",
        "A is wrong and so is B. Answer: C",
        "Option C is correct.",
        "So the best choice is $\\textbf{(C)}$ Paris.",
        "(C) is the correct answer.",
        "The answer is \\(C\\).",
        "The answer is 'C'.",
        "Answer：C",
        "C!",
        "The answer is Paris.",
        "(A) is no. (B) is no. (C) fits.",
        "$\\boxed{\\text{C}}$",
        "\\boxed{\\textbf{(C) } Paris}",
        "#### (C) Paris",
        "<think>A</think><answer>C</answer>",
        "paris.",
    ],
)
def test_the_choice_that_a_response_names(text: str) -> None:
    reward = resolve("multiple_choice", REWARDS, "data.reward")
    for label in ("C", "(C)", "c", "Paris", "C. Paris", 2):
        assert reward(text, label, CAPITALS) == 1.0
    for label in ("A", "B", "Rome", 0):
        assert reward(text, label, CAPITALS) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A or C",
        "The answer is A or C.",
        "\\boxed{A, C}",
        "\\boxed{AC}",
        "The answer is not C",
        "The answer is Canada",
        "Cats are nice",
        "<think>C",
        "Answer: A\n\nC is wrong",
        "Rome",
    ],
)
def test_no_choice_or_another_one(text: str) -> None:
    reward = resolve("multiple_choice", REWARDS, "data.reward")
    assert reward(text, "C", CAPITALS) == 0.0
    assert reward("The answer is C", "C", {}, status=Status.TRUNCATED) == 0.0


@pytest.mark.parametrize("mark", ["\\boxed{%s}", "<answer>%s</answer>", "#### %s"])
def test_an_answer_without_end_does_not_hold_up_the_event_loop(mark: str) -> None:
    reward = resolve("multiple_choice", REWARDS, "data.reward")
    start = time.process_time()
    for repeated in (" ", "*", "(", "- "):
        assert reward(mark % (repeated * 20_000), "C", CAPITALS) == 0.0
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("text", "label", "value"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1),
        ("in Paris, France", "Paris", 0.5),
        ("Paris Paris", "Paris", 2 / 3),
        ("a", "Paris", 0),
        ("the", "an", 1),
        ("London", ["Paris", "London"], 1),
        ("<think>Paris</think>London", "Paris", 0),
        ("1,000 men", "1000 men", 1),
        ("x", None, 0),
    ],
)
def test_f1_is_that_of_squad(text: str, label: object, value: float) -> None:
    assert resolve("f1", REWARDS, "data.reward")(text, label, {}) == pytest.approx(value)


def test_a_reward_gets_the_status_and_the_prompt_where_it_names_them() -> None:
    prompt = Prompt(0, np.array([1], np.int32), "what?<think>", "7", {"k": 1})
    sample = Sample(
        group_id=0,
        rollout_id=0,
        token_ids=np.array([1, 2], np.int32),
        loss_mask=np.array([False, True]),
        rollout_logprobs=np.zeros(2, np.float32),
        policy_versions=[(1, 0)],
        status=Status.TRUNCATED,
        text="so 7",
        label=prompt.label,
        metadata=prompt.metadata,
    )
    seen = []

    def plain(text, label, metadata) -> float:
        seen.append((text, label, metadata))
        return 1.0

    def knowing(text, label, metadata, status, *, prompt="") -> float:
        seen.append((status, prompt))
        return 2.0

    arguments = (sample.text, sample.label, prompt.metadata)
    named = known(sample, prompt, DataConfig())
    assert call(plain, asked_names(plain), arguments, named) == 1.0
    assert call(knowing, asked_names(knowing), arguments, named) == 2.0
    assert seen == [("so 7", "7", {"k": 1}), (Status.TRUNCATED, "what?<think>")]
    for name in ("exact_match", "f1", "gsm8k", "math_answer", "multiple_choice"):
        reward = make(name)
        assert call(reward, asked_names(reward), arguments, named) == 0.0
