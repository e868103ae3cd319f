"""Flags: every short name resolves, sets its field and nothing else; others are refused with a suggestion."""

from typing import Any, Literal, get_args, get_origin

import pytest

from nanoslime.config import RunConfig, flags
from nanoslime.config.load import load
from nanoslime.types import RunError


def field(config: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        config = getattr(config, part)
    return config


BASE = {f: field(RunConfig(), f) for f in flags.field_types()}


def other_value(dotted: str) -> Any:
    """A valid value that differs from the default."""
    kind, default = flags.field_types()[dotted], BASE[dotted]
    kinds = get_args(kind) if type(None) in get_args(kind) else (kind,)
    if get_origin(kinds[0]) is Literal:
        return next(v for v in get_args(kinds[0]) if v != default)
    if kinds[0] is bool:
        return not default
    if kinds[0] is str:
        return "math_answer" if dotted == "data.reward" else "other"
    return (default or 0) * 2 + 2 * (not default) if kinds[0] is int else (default or 0) / 2 + 0.125


@pytest.mark.parametrize("alias", flags.ALIASES)
@pytest.mark.parametrize("form", ["--{} {}", "--{}={}", "underscore"])
def test_every_alias_sets_its_field_and_nothing_else(alias, form):
    dotted = flags.ALIASES[alias]
    value = other_value(dotted)
    if form == "underscore":
        args = [f"--{alias.replace('-', '_')}={value}"]
    elif isinstance(value, bool) and form == "--{} {}":
        args = [f"--{alias}" if value else f"--no-{alias}"]
    else:
        args = form.format(alias, value).split()
    needed = {"training.backend": "megatron", "algorithm.use_kl_loss": "true"}
    needed = {
        f: v for f, v in needed.items() if f != dotted and (f[0] == "t" or dotted.endswith("unbiased_kl"))
    }
    config = load(None, None, [*args, *(f"--{f}={v}" for f, v in needed.items())])
    changed = {f for f in BASE if field(config, f) != BASE[f]}
    assert changed - set(needed) == {dotted}
    assert field(config, dotted) == value


def test_the_names_the_field_knows_are_there():
    known = """hf-checkpoint backend num-gpus tp-size pp-size num-rollout rollout-batch-size
        n-samples-per-prompt kl-coef use-kl-loss kl-loss-coef kl-loss-type use-unbiased-kl
        use-rollout-logprobs use-tensorboard lr nodes run-root""".split()
    assert set(known) <= set(flags.ALIASES)


def test_an_alias_is_the_name_of_its_field():
    others = {"eval-interval": "eval.interval", "save-interval": "checkpoint.interval"}
    for alias, field_name in flags.ALIASES.items():
        assert others.get(alias, alias.replace("-", "_")) in (field_name, field_name.rpartition(".")[2])


def test_every_field_has_a_dotted_flag_unless_it_is_a_mapping_or_list():
    for dotted, kind in flags.field_types().items():
        if get_origin(kind) in (dict, list):
            with pytest.raises(RunError, match="YAML only"):
                flags.parse([f"--{dotted}", "x"])
        else:
            assert flags.parse([f"--{dotted}=x"]) == [flags.Flag(f"--{dotted}", dotted, "x")]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--tp-sice", "2"], "unknown flag --tp-sice; did you mean --tp-size"),
        (["--training.adam-beta", "0"], "did you mean --training.adam-beta2 or --training.adam-beta1"),
        (["--eval-prompt", "f"], "did you mean --eval-prompts"),
        (["--qqqq"], r"unknown flag --qqqq; --help lists all flags"),
        (["--lr"], "--lr needs a value"),
        (["--lr", "--nodes", "4"], "--lr needs a value"),
        (["--no-lr"], "training.lr is not a switch"),
        (["--no-use-kl-loss=true"], "takes no value"),
        (["4"], "'4' belongs to no flag"),
        (["--tp-size=x"], "flag --tp-size: training.tp_size='x': must be a valid integer"),
        (["--lr=nan"], "must be a finite number"),
        (["--backend", "deepspeed"], "must be 'megatron' or 'fsdp'"),
        (["--use-kl-loss=maybe"], "algorithm.use_kl_loss='maybe': must be a valid boolean"),
        (["--kl-coef", ".1", "--use-kl-loss"], "kl_coef .* exclude each other"),
        (["--name", "../x"], "name='../x': must match"),
        (
            ["--load-rollouts", "r", "--rollout-only"],
            "load_rollouts and rollout.rollout_only exclude each other",
        ),
        (
            ["--load-rollouts", "r", "--engine-gpus", "1"],
            "cluster.engine_gpus=1 makes no sense with rollout.lo",
        ),
        (["--load-rollouts", "r", "--rollout-nodes", "0"], "cluster.rollout_nodes=0 makes no sense with"),
        (
            ["--rollout-only", "--weight-sync.transport=disk"],
            "transport=disk makes no sense with rollout.rollo",
        ),
        (
            ["--rollout-only", "--num-gpus", "2"],
            "training.num_gpus=2 makes no sense with rollout.rollout_only",
        ),
        (["--reward", "mth"], "^data.reward='mth' is unknown; choose one of exact_match, math_answer, or"),
    ],
)
def test_a_wrong_flag_is_refused_in_one_line(args, says):
    with pytest.raises(RunError, match=says) as refused:
        load(None, None, args)
    assert "\n" not in str(refused.value)


def test_a_later_flag_wins_and_none_clears_an_optional_field():
    assert load(None, None, ["--lr", "1", "--lr", "2"]).training.lr == 2
    assert load(None, None, ["--rollout-nodes", "1", "--rollout-nodes=none"]).cluster.rollout_nodes is None
    assert load(None, None, ["--name", "none"]).name == "none"


def test_a_reward_is_a_name_of_the_table_or_a_function_of_the_user():
    for reward in ("math_answer", "my.module:score"):
        assert load(None, None, ["--reward", reward]).data.reward == reward


def test_help_shows_aliases_and_the_values_of_the_recipe(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("training: {tp_size: 16}")
    with pytest.raises(SystemExit) as ended:
        load(recipe, None, ["--nodes", "4", "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert "--tp-size" in shown and "--training.tp-size INT" in shown and "(default: 16)" in shown
