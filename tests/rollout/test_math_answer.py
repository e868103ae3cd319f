"""The reward of mathematical answers: what a data set's own answers look like, right and wrong."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from nanoslime.rollout.rewards import math_judge
from nanoslime.rollout.rewards.math_answer import final_answer, label_answer, reward
from nanoslime.types import Status

# label, right answers, wrong answers: the kinds that MATH-500 has
LABELS = [
    (
        r"\frac{3}{4}",
        [r"\dfrac{3}{4}", r"\frac34", "3/4", "0.75", r"\tfrac{6}{8}", "½+1/4"],
        ["4", "3", r"\frac{4}{3}"],
    ),
    (
        "4",
        ["4.0", r"\frac{8}{2}", "x = 4", "4.", r"\$4", "2^2"],
        [r"\frac{3}{4}", "x^2+4", "-4", "44", "4t"],
    ),
    (r"-\frac{1}{2}", [r"\frac{-1}{2}", "-0.5", r"-\tfrac12"], [r"\frac12", "0.5", "-2"]),
    ("0.5", [r"\frac12", ".5", r"50\%"], ["5", "0.05"]),
    (
        r"\left( 3, \frac{\pi}{2} \right)",
        [r"(3, \pi/2)", r"(3,\frac{\pi}{2})"],
        [r"(\frac{\pi}{2}, 3)", "3", r"\frac{\pi}{2}"],
    ),
    ("p - q", ["-q+p", "p-q"], ["q - p", "p+q"]),
    (r"\frac{14}{3}", [r"4\frac{2}{3}", r"4 \tfrac{2}{3}"], ["14", "3", "4.67"]),
    (
        r"\text{Evelyn}",
        ["Evelyn", r"\text{Evelyn}", r"\textbf{Evelyn}"],
        ["Briana", r"\text{Debra}", "Evylen", ""],
    ),
    (r"\text{(C)}", ["C", "(C)", r"\text{C}", r"\textbf{(C)}"], ["D", r"\text{(B)}", "3"]),
    (r"\text{even}", ["even", r"\textit{even}"], ["odd", r"\text{neither}"]),
    ("no", [r"\text{no}", "no"], ["yes", r"\text{yes}"]),
    ("Alice", ["Alice!", r"\text{Alice.}", '"alice"'], ["Alicia!"]),
    (r"\frac{3}{2}", ["1 1/2", r"1\frac{1}{2}"], ["11/2", "1"]),
    (r"\emptyset", ["∅", r"\varnothing"], ["0"]),
    ("6x^2", ["6x²", "2·3x²"], ["6x³", "6x"]),
    ("1000000", [r"1\ 000\ 000", "1 000 000", r"1000000\ "], ["1"]),
    (r"\text{June 20}", [r"\text{June 20}"], ["20", r"\text{June 21}"]),
    (r"6+9i", ["6 + 9i", "9i + 6", "6+9 i"], ["6-9i", "9+6i", "15"]),
    (r"3\sqrt{13}", [r"\sqrt{117}", r"3 \sqrt{13}", "3√13"], [r"\sqrt{13}", r"13\sqrt{3}", "10.8"]),
    (r"\sqrt{51}", [r"\sqrt{51}", "51^{1/2}"], ["7.14", "51"]),
    (r"\pi", ["π", "pi"], ["3.14", "2\\pi"]),
    (r"27", ["27", r"27\text{ cm}^2", "27 square inches", r"27^\circ"], ["72", "28"]),
    (r"90^\circ", ["90", "90^{\\circ}", "90°", r"90\text{ degrees}", "90 degrees"], ["45", "9"]),
    (r"5.4 \text{ cents}", ["5.4", r"5.4\text{ cents}", "5.4 cents"], ["54", "0.54"]),
    (r"864 \mbox{ inches}^2", ["864", r"864\text{ in}^2"], ["846"]),
    (r"\$32,\!348", ["32348", "32,348", r"\$32,348"], ["32", "348", "32349"]),
    ("10,080", ["10080", r"10,\!080", r"10{,}080"], ["10", "80", "10081"]),
    (r"50\%", ["50", "0.5", r"50 \%", "50 percent"], ["5", "0.05", r"5\%"]),
    ("1,-2", ["-2, 1", r"1 \text{ and } -2", "x=1,-2", r"\{1,-2\}"], ["1", "-2", "1, 2", "1,-2,3"]),
    ("(0,9) \\cup (9,36)", [r"(0, 9)\cup(9, 36)"], ["(0,36)", "[0,9) \\cup (9,36)", "9"]),
    (
        "[-2,7]",
        [r"x \in [-2,7]", r"[-2, 7]", r"-2 \le x \le 7"],
        ["(-2,7)", "[-2,7)", "7", "[2,7]"],
    ),
    (r"(-\infty, 5]", [r"x \le 5", r"(-\infty,5]"], [r"(-\infty,5)", r"x < 5", r"x \ge 5"]),
    ("x^3+3x-6", ["x^3 + 3x - 6", "3x + x^3 - 6"], ["x^3-3x-6", "-6"]),
    ("(x-5)(x+5)", ["(x+5)(x-5)", "x^2-25"], ["x^2+25", "(x-5)^2"]),
    ("y = 2x + 3", ["2x+3", "y=2x+3", "y = 3 + 2x"], ["y=2x-3", "3", "2x"]),
    ("2k+2", ["2(k+1)", "2k + 2"], ["2k", "2"]),
    ("2t", ["2t", "2 t"], ["2", "2s", "t"]),
    ("x=5", ["5", "x = 5"], ["x=6", "-5"]),
    (
        r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}",
        [
            r"\begin{pmatrix} -\frac{1}{3} \\ \frac{2}{3} \\ \frac{5}{3} \end{pmatrix}",
            r"\begin{bmatrix} -1/3 \\ 2/3 \\ 5/3 \end{bmatrix}",
        ],
        [r"\begin{pmatrix} 1/3 \\ 2/3 \\ 5/3 \end{pmatrix}", "5/3"],
    ),
    (
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        [r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"],
        [r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", "4"],
    ),
    ("(3,4)", ["(3, 4)", r"\left(3,4\right)"], ["(4,3)", "3", "4", "34"]),
    ("(2,-1,5)", ["(2, -1, 5)"], ["(2,1,5)", "(2,-1)"]),
    (r"\{1,2,3\}", ["\\{3,2,1\\}", "1, 2, 3"], [r"\{1,2\}", "123"]),
    (r"4210_{5}", ["4210_5", "4210"], ["4210_7", "421_5"]),
    ("-5", ["-5", "−5"], ["5", "--5"]),
    (
        "1.6 \\times 10^{-19}",
        [r"1.6\times10^{-19}", "1.6e-19", r"1.60 \times 10^{-19}"],
        [r"2.0 \times 10^{-19}", "0", "1.6", "-19"],
    ),
    (r"2 \times 10^{8}", ["200000000", "2e8", r"2\cdot 10^8"], ["2", "8", r"2\times10^7"]),
    ("1 \\pm \\sqrt{19}", [r"1+\sqrt{19}, 1-\sqrt{19}"], [r"1 + \sqrt{19}", "19"]),
    (
        r"\frac{\sqrt{3}}{3}",
        [r"\frac{1}{\sqrt{3}}", r"\dfrac{\sqrt3}{3}"],
        [r"\frac{\sqrt{3}}{2}", "3", r"\sqrt{3}"],
    ),
    (r"\frac{1}{2} \ln 2", [r"\frac{\ln 2}{2}", r"\ln \sqrt{2}"], [r"\ln 2", "2"]),
    (r"\frac{3}{56}", [r"\frac{3}{56}", "3/56"], ["56", "3", r"\frac{56}{3}"]),
    ("(5,100)", ["(5, 100)"], ["(5100)", "5100", "(100,5)"]),
    ("x=2,125", ["2125", "x = 2,125"], ["2", "125"]),
    ("\\infty", [r"\infty", "∞"], [r"-\infty", "0"]),
    ("3^{100}", [r"3^{100}", "9^{50}"], ["3^{101}", "100"]),
    ("120", ["5!", "120", r"\binom{10}{3}"], ["5", "10"]),
    ("12:30", ["12:30"], ["12", "30"]),
    ("18", [18], ["18 or 19", "81"]),
]

FORMS = [
    r"Thus \boxed{{{}}}.",
    "#### {}",
    "The answer is ${}$.",
    r"The final answer is: \({}\)",
    "Final answer:\n\n\\[ {} \\]\n\nI hope it is right.",
    r"**Answer:** $\boxed{{{}}}$",
    "#### Final Answer\n$$\\boxed{{{}}}$$",
    "<think>Is it \\boxed{{7}}?</think>\n\\boxed{{{}}}",
]


@pytest.mark.parametrize("form", FORMS)
def test_right_answers_of_math_are_paid_and_wrong_ones_are_not(form: str) -> None:
    lost = []
    paid = []
    for label, right, wrong in LABELS:
        lost += [(label, answer) for answer in right if not reward(form.format(answer), label, {})]
        paid += [(label, answer) for answer in wrong if reward(form.format(answer), label, {})]
    assert (lost, paid) == ([], [])


@pytest.mark.parametrize("label", [label for label, _, _ in LABELS])
def test_a_label_earns_its_own_reward_in_every_way_to_store_it(label: str) -> None:
    for stored in (
        label,
        f"It is so.\n#### {label}",
        f"We find $\\boxed{{{label}}}$.",
        f"${label}$",
    ):
        assert reward(f"The answer is $\\boxed{{{label}}}$", stored, {}) == 1.0
        assert reward(r"The answer is $\boxed{-7771}$", stored, {}) == 0.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 18, as was to be shown.", "18"),
        ("The answer to question 3 is 18. It took 2 steps.", "18"),
        ("The final answer is 18. I hope it is correct.", "18"),
        ("The answer is 18. A check: 9 * 2 = 18.", "18"),
        ("The answer is 18 (not 19).", "18"),
        ("The answer is 3 (mod 7).", "3 (mod 7)"),
        ("The train leaves at 12:30.", "12:30"),
        ("**Answer: 18**", "18"),
        ("**Final Answer:** $18$ dollars", "18"),
        ("Answer: she has 18 eggs", "18"),
        ("The answer is Evelyn.", "Evelyn"),
        ("The correct answer is (C).", "(C)"),
        ("So the answer is 18 or 19.", "18 or 19"),
        ("She pays $5 and earns $18 so that $13 are left", "$13"),
        ("It is $\\frac{3}{4}$.", "\\frac{3}{4}"),
        ("It is \\frac{3}{4}.", "\\frac{3}{4}"),
        ("He has 3/4 of the cake, as x^2 says", "3/4"),
        ("so 2 + 3 = 5", "5"),
        ("It has 1,234 and 5,678.", "5,678"),
        ("Evelyn", "Evelyn"),
        ("\\boxed{18}\n\n#### Verification\nAll is well.", "18"),
        ("#### Step 2\nso\n#### 18", "18"),
        ("\\boxed{1} or \\boxed{ \\frac{1}{2} }", "\\frac{1}{2}"),
        ("\\boxed{\\boxed{3}}", "3"),
        ("\\boxed{\\text{Answer: }3}", "3"),
        ("first \\boxed{3}, then \\boxed{}", ""),
        ("the answer is 3, \\boxed{4", ""),
        ("", ""),
    ],
)
def test_the_final_answer_of_a_response(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_a_label_without_a_mark_is_the_answer_itself() -> None:
    assert label_answer(r"\frac{3}{4}") == r"\frac{3}{4}"
    assert label_answer("3 of 4") == "3 of 4"
    assert label_answer("so\n#### 7") == label_answer("so \\boxed{7}") == "7"


@pytest.mark.parametrize(
    ("text", "prompt", "value"),
    [
        ("<think>so</think> \\boxed{4}", "", 1),
        ("<think>\\boxed{4}</think> \\boxed{5}", "", 0),
        ("<think>\\boxed{4}</think> I do not know", "", 0),
        ("<think>it is \\boxed{4}", "", 0),
        ("<think>a</think> no <think> \\boxed{4}", "", 0),
        ("it is \\boxed{4}", "<|assistant|>\n<think>\n", 0),
        ("so</think>\\boxed{4}", "<|assistant|>\n<think>\n", 1),
        ("\\boxed{4}", "<think>\n\n</think>\n\n", 1),
        ("\\boxed{4}", "Put thoughts in <think> and </think>.", 1),
    ],
)
def test_thoughts_are_no_answer(text: str, prompt: str, value: float) -> None:
    for status in Status:
        assert reward(text, "4", {}, status=status, prompt=prompt) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("\\boxed{4}. Let us", 1),
        ("#### 4\nNext: 1", 1),
        ("The answer is 4.\nNext", 1),
        ("#### 4", 0),
        ("The answer is 4", 0),
        ("3 + 1 = 4\nwhich", 0),
        ("\\boxed{4", 0),
    ],
)
def test_the_cut_off_end_of_a_response_is_no_answer(text: str, value: float) -> None:
    """The 4 may be the first digit of 42."""
    assert reward(text, "4", {}, status=Status.TRUNCATED) == value


HOSTILE = [
    "9^{9^9}",
    "99999999!",
    "(x+y+z)^{300}",
    "1 a" * 130 + "!",
    "1e999999999",
    "\x00",
    "é" * 50,
    r"\frac{1}{0}",
    "}{",
    "\\",
]


def test_no_answer_holds_up_a_run() -> None:
    """Each hostile answer is judged in seconds, in a thread too, and the next verdict is right."""
    start = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        texts = [f"\\boxed{{{answer}}}" for answer in HOSTILE]
        assert not any(pool.map(lambda text: reward(text, "18", {}), texts))
    assert reward(r"\boxed{\frac{36}{2}}", "18", {}) == 1.0
    assert time.monotonic() - start < 120


@pytest.mark.parametrize(
    "text",
    [
        "$" * 100_000,
        "\\boxed{" * 30_000,
        "\\[" * 50_000,
        "answer is " * 30_000,
        "####" * 50_000,
        "<think>" * 20_000,
        "$\\a{" * 2_000,
        "1" * 200_000,
        "\n" * 100_000 + "x",
        "1 dollars " * 20_000,
    ],
)
def test_a_long_text_is_read_once(text: str) -> None:
    start = time.monotonic()
    assert reward(text, "18", {}) == 0.0
    assert time.monotonic() - start < 2


def test_a_batch_of_answers_takes_seconds() -> None:
    """Verdicts of which each needs math-verify: 8,192 of them would take well under a minute."""
    reward(r"\boxed{\frac{1}{7}}", r"\frac{2}{7}", {})
    start = time.monotonic()
    for i in range(512):
        assert reward(rf"\boxed{{\frac{{{i}}}{{7}} x}}", rf"\frac{{{i % 64}}}{{7}} x", {}) == (
            i < 64
        )
    per_verdict = (time.monotonic() - start) / 512
    print(f"{1000 * per_verdict:.2f} ms a verdict")
    assert per_verdict < 4 * 60 / 8192


def test_the_judge_ends_with_its_driver_also_amid_a_question() -> None:
    code = """
from nanoslime.rollout.rewards.math_answer import _judge, reward
reward(r"\\boxed{\\frac{1}{2} x}", "x", {})
print(_judge._process.pid, flush=True)
reward(r"\\boxed{9^{9^9}}", "x", {})
input()
"""
    driver = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    judge = psutil.Process(int(driver.stdout.readline()))
    family = psutil.Process(driver.pid).children(recursive=True)
    assert judge in family
    driver.kill()
    driver.communicate()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive


def test_a_judge_that_cannot_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_judge, "_PROGRAM", "nanoslime.no_such_program")
    with pytest.raises(RuntimeError, match="needs math-verify"):
        math_judge.MathJudge().same("x", "y")
