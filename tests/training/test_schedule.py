import pytest

from nanoslime.config.training import TrainingConfig
from nanoslime.training.schedule import lr_at


def rates(steps, **knobs):
    config = TrainingConfig(lr=1.0, lr_warmup_steps=2, min_lr=0.2, **knobs)
    return [lr_at(step, config=config, total_steps=6) for step in steps]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        (
            "cosine",
            [0.5, 1, 1, 0.2 + 0.8 * (2 + 2**0.5) / 4, 0.6, 0.2 + 0.8 * (2 - 2**0.5) / 4, 0.2],
        ),
    ],
)
def test_rates_by_hand(schedule, expected):
    assert rates(range(7), lr_schedule=schedule) == pytest.approx(expected)


def test_beyond_the_end_the_rate_stays():
    assert rates([6, 100], lr_schedule="linear") == pytest.approx([0.2, 0.2])


def test_warmup_longer_than_the_run_never_divides_by_zero():
    config = TrainingConfig(lr=1.0, lr_warmup_steps=10, lr_schedule="cosine")
    assert [lr_at(s, config=config, total_steps=3) for s in (0, 2)] == pytest.approx([0.1, 0.3])
