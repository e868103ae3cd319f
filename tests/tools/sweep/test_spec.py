"""What a sweep file means, and what is refused in it."""

import pytest

from nanoslime.types import RunError
from tools.sweep import spec


def elements(content) -> list[tuple[str, int | None]]:
    return [(one.setting, one.seed) for one in spec.parse(content, "sweep").elements]


def test_a_grid_is_every_combination_with_every_seed():
    content = {"grid": {"lr": ["1e-6", 2e-6], "tp_size": [1, 2]}, "seeds": 2}
    assert elements(content) == [
        ("lr=1e-6, tp_size=1", 0),
        ("lr=1e-6, tp_size=1", 1),
        ("lr=1e-6, tp_size=2", 0),
        ("lr=1e-6, tp_size=2", 1),
        ("lr=2e-06, tp_size=1", 0),
        ("lr=2e-06, tp_size=1", 1),
        ("lr=2e-06, tp_size=2", 0),
        ("lr=2e-06, tp_size=2", 1),
    ]


def test_points_stand_beside_the_grid_and_seeds_are_a_number_or_a_list():
    content = {
        "points": [{"kl_coef": 0.0}, {"use_kl_loss": True}],
        "grid": {"lr": [1]},
        "seeds": [7],
    }
    assert elements(content) == [("kl_coef=0.0, lr=1", 7), ("use_kl_loss=true, lr=1", 7)]
    assert elements({"points": [{"lr": 1}]}) == [("lr=1", None)]


def test_values_become_the_flags_that_set_them():
    point = {
        "use_kl_loss": False,
        "rollout.stop": ["a b", "c"],
        "rollout.top_k": None,
        "environment_options": {"max_tries": 2},
    }
    [element] = spec.parse({"points": [point], "seeds": [3]}, "sweep").elements
    assert element.flags == (
        "--use-kl-loss=false",
        "--rollout.stop",
        "a b",
        "c",
        "--rollout.top-k=none",
        '--environment-options={"max_tries": 2}',
        "--seed=3",
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "a sweep is a mapping of name, grid, points, seeds"),
        ([1], "a sweep is a mapping"),
        ({"lr": [1]}, "unknown key 'lr'"),
        ({}, "nothing is tried"),
        ({"seeds": 3}, "nothing is tried"),
        ({"grid": [1]}, "grid is a mapping of fields to lists"),
        ({"grid": {"lr": 1}}, "grid.lr=1 is no list of values; write [1]"),
        ({"grid": {"lr": []}}, "grid.lr=[] is no list of values"),
        ({"grid": {"lr": [1, 1]}}, "grid.lr has 1 twice"),
        ({"grid": {"lr": ["1e-6", 0.000001]}}, "grid.lr has 1e-6 twice"),
        ({"grid": {"lr": [1], "training.lr": [2]}}, "grid: lr and training.lr are both training"),
        ({"points": [{"lr": 1, "training.lr": 2}]}, "points[0]: lr and training.lr are both"),
        (
            {"points": [{"lr": 1, "tp_size": 2}, {"lr": 2}, {"tp_size": 2, "training.lr": 1}]},
            "tp_size=2, training.lr=1 stands twice in points; more runs of it are more seeds",
        ),
        ({"points": [{"lr": 1}, {"lr": 1}], "grid": {"tp_size": [1, 2]}}, "lr=1, tp_size=1 stands"),
        ({"points": [{}, {}], "grid": {"lr": [1]}}, "lr=1 stands twice in points"),
        ({"points": [{}, {}]}, "a point without fields stands twice in points"),
        ({"grid": {"seed": [1, 2]}}, "grid.seed: seeds have a place of their own"),
        ({"grid": {"name": ["a"]}}, "grid.name: each run of a sweep has its own name"),
        ({"points": [{"run_root": "a"}]}, "points[0].run_root: each run of a sweep has its own"),
        ({"points": {"lr": 1}}, "points is a list of mappings"),
        ({"points": [1]}, "points is a list of mappings"),
        (
            {"points": [{"lr": 1}], "grid": {"training.lr": [2]}},
            "training.lr stands in grid and in",
        ),
        ({"grid": {"lr": [1]}, "seeds": 0}, "seeds=0 is neither"),
        ({"grid": {"lr": [1]}, "seeds": True}, "seeds=True is neither"),
        ({"grid": {"lr": [1]}, "seeds": "many"}, "seeds='many' is neither"),
        ({"grid": {"lr": [1]}, "seeds": [1, 1]}, "names a seed twice"),
        ({"grid": {"lr": [1]}, "name": "a/b"}, "name='a/b' cannot be the name"),
    ],
)
def test_what_makes_no_sense_is_refused(content, says):
    with pytest.raises(RunError) as refusal:
        spec.parse(content, "sweep")
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seeds: 1\ngrid: {lr: [1]}\nseeds: 3\n", "key 'seeds' stands twice"),
        ("grid:\n  lr: [1]\n  tp_size: [1]\n  lr: [2]\n", "key 'lr' stands twice"),
        ("grid: {lr: 1e-6}\n", "grid.lr=1e-6 is no list of values; write [1e-6]"),
        ("points: &points [*points]\n", "holds itself"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(tmp_path, text, says):
    file = tmp_path / "lr.yaml"
    file.write_text(text)
    with pytest.raises(RunError) as refusal:
        spec.read(file)
    assert str(refusal.value).startswith(str(file))
    assert says in str(refusal.value)


def test_values_of_a_file_are_shown_as_they_were_written(tmp_path):
    file = tmp_path / "lr.yaml"
    file.write_text(
        "seeds: 1\ngrid: {lr: [1e-6, 2.50e-6], use_kl_loss: [off], rollout.top_k: [~]}\n"
        "points: [{environment_options: {rate: 1e-6, tries: 2}}]\n"
    )
    first, second = spec.read(file).elements
    assert first.flags == (
        '--environment-options={"rate": 1e-06, "tries": 2}',
        "--lr=1e-6",
        "--use-kl-loss=false",
        "--rollout.top-k=none",
        "--seed=0",
    )
    assert "lr=2.50e-6" in second.setting
