"""Flags: every short name resolves, sets its field and nothing else; others are refused
with a suggestion."""

import json
from typing import Any, Literal, get_args, get_origin

import pytest

from nanoslime.config import RunConfig, flags
from nanoslime.config.load import dump, load, read
from nanoslime.types import RunError


def field(config: Any, dotted: str) -> Any:
    """The value of a field; None where the chosen algorithm has no such field."""
    for name in dotted.split("."):
        config = getattr(config, name, None)
    return config


def values_of(config: RunConfig) -> dict[str, Any]:
    return {dotted: field(config, dotted) for dotted in flags.field_types()}


DEFAULTS = values_of(RunConfig())


def other_value(dotted: str) -> Any:
    """A valid value that differs from the default."""
    if dotted == "data.reward":
        return "math_answer"
    if dotted == "rollout.engine":
        return "embedded"
    if dotted == "rollout.environment":
        return "package.module:run"
    if dotted == "rollout.stop_token_ids":
        return [7]
    if dotted == "algorithm.eps_clip_c":
        # It has to be above 1.
        return 3.0
    if dotted == "rollout.top_k":
        return 2
    if dotted == "cluster.exclusive":
        return True
    kind = flags.field_types()[dotted]
    default = DEFAULTS[dotted]
    if type(None) in get_args(kind):
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != default)
    if get_origin(kind) is list:
        return ["other"]
    if get_origin(kind) is dict:
        return {"other": 1}
    if kind is bool:
        return not default
    if kind is str:
        return "other"
    if kind is int:
        return 2 * default if default else 2
    return (default or 0) / 2 + 0.125


# Flags without which the field is refused, or more than the field would change.
NEEDED = {
    "training.backend": ["--nodes", "2"],
    "cluster.nodes": ["--backend", "megatron"],
    "training.tp_size": ["--backend", "megatron"],
    "training.pp_size": ["--backend", "megatron"],
    "training.vpp_size": ["--backend", "megatron"],
    "training.cp_size": ["--backend", "megatron"],
    "training.ep_size": ["--backend", "megatron"],
    "training.etp_size": ["--backend", "megatron"],
    "training.sequence_parallel": ["--backend", "megatron"],
    "training.num_layers_in_first_pipeline_stage": ["--backend", "megatron"],
    "training.num_layers_in_last_pipeline_stage": ["--backend", "megatron"],
    "algorithm.use_unbiased_kl": ["--use-kl-loss", "--kl-loss-coef", "1"],
    "algorithm.kl_loss_coef": ["--use-kl-loss", "--kl-loss-coef", "1"],
    "algorithm.eps_clip_high": ["--eps-clip", "0.1"],
    "algorithm.correction.tis_level": ["--use-tis"],
    "algorithm.correction.tis_clip": ["--use-tis"],
    "algorithm.correction.tis_clip_low": ["--use-tis"],
    "algorithm.correction.opsm_delta": ["--use-opsm"],
    "algorithm.gamma": ["--algorithm", "reinforce_plus_plus"],
}

ALIASES_OF_A_VALUE = [
    alias
    for alias, dotted in flags.ALIASES.items()
    # KL in the loss needs its coefficient.
    if dotted not in ("algorithm.name", "algorithm.use_kl_loss")
]


def words_of(alias: str, value: Any, form: str) -> list[str]:
    """The alias with this value, as a user may write it."""
    if isinstance(value, list):
        (value,) = value
    if isinstance(value, dict):
        value = json.dumps(value)
    if form == "underscore":
        return [f"--{alias.replace('-', '_')}={value}"]
    if form == "equals sign":
        return [f"--{alias}={value}"]
    if value is True:
        return [f"--{alias}"]
    if value is False:
        return [f"--no-{alias}"]
    return [f"--{alias}", str(value)]


@pytest.mark.parametrize("alias", ALIASES_OF_A_VALUE)
@pytest.mark.parametrize("form", ["two words", "equals sign", "underscore"])
def test_every_alias_sets_its_field_and_nothing_else(alias, form):
    dotted = flags.ALIASES[alias]
    value = other_value(dotted)
    needed = NEEDED.get(dotted, [])
    before = values_of(load(None, None, needed))
    after = values_of(load(None, None, [*needed, *words_of(alias, value, form)]))
    assert [name for name in before if after[name] != before[name]] == [dotted]
    assert after[dotted] == value


@pytest.mark.parametrize("alias", ["algorithm", "advantage-estimator", "algorithm.name"])
@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "rloo", "reinforce_plus_plus"])
def test_the_algorithm_is_chosen_by_name_whatever_the_order_of_flags(alias, name):
    name_first = [f"--{alias}", name, "--eps-clip", "1e-4"]
    name_last = ["--eps-clip", "1e-4", f"--{alias}={name}"]
    for args in (name_first, name_last):
        algorithm = load(None, None, args).algorithm
        assert algorithm.name == name
        assert algorithm.eps_clip == 1e-4


@pytest.mark.parametrize(
    ("args", "dotted", "value"),
    [
        (["--use-rollout-logprobs"], "algorithm.old_logprobs", "rollout"),
        (["--use_rollout_logprobs"], "algorithm.old_logprobs", "rollout"),
        (["--use-rollout-logprobs=true"], "algorithm.old_logprobs", "rollout"),
        (
            ["--use-rollout-logprobs", "--no-use-rollout-logprobs"],
            "algorithm.old_logprobs",
            "auto",
        ),
        (["--use-rollout-logprobs=false"], "algorithm.old_logprobs", "auto"),
        (["--use-rollout-logprobs=False"], "algorithm.old_logprobs", "auto"),
        (["--use-kl-loss", "--kl-loss-coef", "1"], "algorithm.use_kl_loss", True),
        (["--use_kl_loss=TRUE", "--kl-loss-coef", "1"], "algorithm.use_kl_loss", True),
        (["--disable-grpo-std-normalization"], "algorithm.normalize_by_std", False),
        (["--no-calculate-per-token-loss"], "algorithm.denominator", "sequences"),
        (["--algorithm", "gspo", "--calculate-per-token-loss"], "algorithm.denominator", "tokens"),
    ],
)
def test_switches_known_elsewhere_set_their_field(args, dotted, value):
    assert field(load(None, None, args), dotted) == value


@pytest.mark.parametrize(
    ("args", "value"),
    [
        (["--exclusive"], True),
        (["--exclusive", "--nodes", "2"], True),
        (["--exclusive", "user"], "user"),
        (["--exclusive=mcs"], "mcs"),
        (["--exclusive=false"], False),
        (["--no-exclusive"], False),
    ],
)
def test_a_switch_that_has_other_values_too_needs_none(args, value):
    assert load(None, None, args).cluster.exclusive == value


def test_the_names_the_field_knows_are_there():
    known = """hf-checkpoint backend num-gpus tp-size pp-size num-rollout rollout-batch-size
        n-samples-per-prompt kl-coef use-kl-loss kl-loss-coef kl-loss-type use-unbiased-kl
        use-rollout-logprobs use-tensorboard lr nodes run-root""".split()
    assert set(known) <= flags.spellings().keys()


def test_an_alias_is_the_name_of_its_field():
    others = {
        "eval-interval": "eval.interval",
        "save-interval": "checkpoint.interval",
        "algorithm": "algorithm.name",
        "advantage-estimator": "algorithm.name",
        "decoder-first-pipeline-num-layers": "training.num_layers_in_first_pipeline_stage",
        "decoder-last-pipeline-num-layers": "training.num_layers_in_last_pipeline_stage",
        "input-key": "data.prompt_key",
        "apply-chat-template-kwargs": "data.chat_template_kwargs",
        "rm-type": "data.reward",
        "rm-url": "data.reward_url",
        "rollout-stop": "rollout.stop",
        "rollout-stop-token-ids": "rollout.stop_token_ids",
    }
    for alias, dotted in flags.ALIASES.items():
        if alias in others:
            assert others[alias] == dotted
        else:
            _, _, last_word = dotted.rpartition(".")
            assert alias.replace("-", "_") == last_word


def test_every_field_has_a_dotted_flag():
    for dotted, kind in flags.field_types().items():
        text = "x"
        value: Any = "x"
        if get_origin(kind) is dict:
            text = '{"x": 1}'
            value = {"x": 1}
        elif get_origin(kind) is list:
            value = ["x"]
        assert flags.parse([f"--{dotted}={text}"]) == [flags.Flag(f"--{dotted}", dotted, value)]


def test_a_list_takes_the_words_up_to_the_next_flag():
    args = ["--rollout-stop", "</a>", "b c", "--rollout.stop-token-ids", "7", "8", "--top-k", "5"]
    rollout = load(None, None, args).rollout
    assert (rollout.stop, rollout.stop_token_ids, rollout.top_k) == (["</a>", "b c"], [7, 8], 5)
    assert load(None, None, ["--rollout-stop=--x"]).rollout.stop == ["--x"]


def test_a_mapping_is_given_as_json():
    text = '{"enable_thinking": false, "level": "low"}'
    data = load(None, None, ["--apply-chat-template-kwargs", text]).data
    assert data.chat_template_kwargs == {"enable_thinking": False, "level": "low"}


def a_set(**fields: Any) -> str:
    """The JSON of an evaluation set."""
    return json.dumps({"name": "x", "prompts": "x.jsonl", **fields})


def test_evaluation_sets_are_given_as_json_each_and_come_after_the_held_out_prompts(tmp_path):
    args = ["--eval.sets", a_set(temperature=0), "dir/y.jsonl", "--eval-prompts", "h.jsonl"]
    config = load(None, None, args)
    assert [one.title for one in config.eval_sets] == ["held_out", "x", "y"]
    assert config.eval_sets[1].temperature == 0
    (tmp_path / "config.yaml").write_text(dump(config))
    assert read(tmp_path / "config.yaml") == config
    assert load(None, None, []).eval_sets == []


def test_the_files_of_several_sets_are_one_word_or_several():
    for words in (["a.jsonl,b.jsonl"], ["a.jsonl", "b.jsonl"], ["a.jsonl, b.jsonl,"]):
        config = load(None, None, ["--eval.sets", *words])
        assert [one.title for one in config.eval_sets] == ["a", "b"]
    config = load(None, None, [f"--eval.sets={a_set(name='x')}", "--data.sources", "c,d"])
    assert [one.title for one in config.eval_sets] == ["x"]
    assert [one.prompts for one in config.data.sources] == ["c", "d"]
    # A word of a plain list stays whole.
    assert load(None, None, ["--rollout.stop", "a,b"]).rollout.stop == ["a,b"]


@pytest.mark.parametrize(
    "args",
    [
        ["--lr", "1", "--lr", "1"],
        ["--lr=1", "--training.lr", "2"],
        ["--use-rollout-logprobs", "--no-use-rollout-logprobs"],
        ["--rollout-stop", "a", "--rollout.stop", "b"],
    ],
)
def test_a_field_that_two_flags_of_a_command_set_is_refused(args):
    with pytest.raises(RunError, match="sets .*, which .* has set; give one of them"):
        flags.refuse_repeated(flags.parse(args))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--tp-sice", "2"], "unknown flag --tp-sice; did you mean --tp-size"),
        (
            ["--training.adam-beta", "0"],
            "did you mean --training.adam-beta2 or --training.adam-beta1",
        ),
        (["--eval-prompt", "f"], "did you mean --eval-prompts"),
        (["--qqqq"], r"unknown flag --qqqq; --help lists all flags"),
        (["--lr"], "--lr needs a value"),
        (["--lr", "--nodes", "4"], "--lr needs a value"),
        (["--no-lr"], "training.lr is not a switch"),
        (["--rollout-stop"], "--rollout-stop needs a value"),
        (["--rollout.sglang", "[1]"], "--rollout.sglang needs a JSON object .*, not '.1.'"),
        (["--rollout.sglang", "tp_size"], "needs a JSON object"),
        (["--rollout-stop", ""], "rollout.stop.0='': String should have at least 1 character"),
        (["--rollout-stop-token-ids", "3", "-3"], "rollout.stop_token_ids.1='-3': must be great"),
        (["--top-k", "0"], "rollout.top_k=0 leaves no token to sample; set 1 or more, or -1"),
        (["--top-k", "-7"], "rollout.top_k=-7 leaves no token"),
        (["--top-p", "0"], "rollout.top_p='0': must be greater than 0"),
        (["--top-p", "1.1"], "rollout.top_p='1.1': must be less than or equal to 1"),
        (["--temperature", "0"], "rollout.temperature='0': must be greater than or equal to"),
        (["--temperature", "-1"], "rollout.temperature='-1': must be greater"),
        (
            ["--eval.temperature", "1e-7"],
            "temperature=1e-07 of an evaluation is neither greedy nor",
        ),
        (["--eval.temperature", "-1"], "eval.temperature='-1': must be greater than or equal to 0"),
        (["--eval.sets", "{1}"], "eval.sets: '.1.' is not JSON"),
        (
            ["--eval.sets", a_set(temprature=0)],
            "unknown key eval.sets.0.temprature; did you mean te",
        ),
        (
            ["--eval.sets", a_set(zzz=0)],
            "unknown key eval.sets.0.zzz; valid here: prompts, name, reward, ",
        ),
        (["--eval.sets", a_set(temperature=1e-9)], "temperature=1e-09 of an evaluation is neither"),
        (
            ["--eval.sets", a_set(name="a b")],
            "flag --eval.sets: eval.sets.0.name='a b': must match",
        ),
        (["--eval.sets", a_set(prompts="")], "eval.sets.0.prompts='': String should have at least"),
        (["--eval.sets", a_set(reward="mth")], "eval.sets.reward='mth' is unknown; choose one of"),
        (["--eval.sets", a_set(top_k=0)], "eval.sets.top_k=0 leaves no token to sample"),
        (
            ["--eval.sets", a_set(n_samples_per_prompt=0)],
            "sets.0.n_samples_per_prompt=0: must be gr",
        ),
        (["--eval.sets", a_set(), a_set()], "eval.sets: 2 of them are called 'x'; give each a"),
        (
            ["--eval.sets", a_set(name="held_out"), "--eval-prompts", "f"],
            "eval.sets: the name 'held_out' is that of data.eval_prompts; choose another",
        ),
        (["--num-rollout", "0"], "rollout.num_rollout='0': must be greater than or equal to 1"),
        (["--data.max-prompt-tokens", "-5"], "data.max_prompt_tokens='-5': must be greater"),
        (["--data.max-prompt-tokens", "0"], "data.max_prompt_tokens='0': must be greater"),
        (["--lr", "1e-6", "--training.min-lr", "1e-5"], "min_lr=1e-05 is above training.lr=1e-06"),
        (
            ["--apply-chat-template-kwargs", '{"messages": 1}'],
            "data.chat_template_kwargs: messages is set by nanoslime itself",
        ),
        (["--no-use-kl-loss=true"], "takes no value"),
        (["4"], "'4' belongs to no flag"),
        (["--tp-size=x"], "flag --tp-size: training.tp_size='x': must be a valid integer"),
        (["--lr=nan"], "must be a finite number"),
        (["--backend", "deepspeed"], "must be 'megatron' or 'fsdp'"),
        (["--use-kl-loss=maybe"], "algorithm.use_kl_loss='maybe': must be a valid boolean"),
        (["--use-kl-loss"], "kl_loss_coef=0 would hold a reference model .*--no-use-kl-loss"),
        (["--use-kl-loss", "--kl-loss-coef", "0"], "set kl_loss_coef above 0, or switch it off"),
        (["--kl-coef", ".1", "--use-kl-loss"], "kl_coef .* exclude each other"),
        (
            ["--algorithm", "ppo"],
            "flag --algorithm: algorithm.name='ppo' is unknown; choose one of 'grpo', 'gsp",
        ),
        (
            ["--algorithm", "gspo", "--gamma", ".9"],
            "flag --gamma: algorithm.gamma: algorithm.name=gspo has no such field; "
            "these have: reinforce_p",
        ),
        (
            ["--algorithm", "rloo", "--disable-grpo-std-normalization"],
            "rloo has no .* have: grpo, gspo, cispo, package",
        ),
        (["--algorithm.correction.veto=2"], "algorithm.correction.veto='2': must be less than 1"),
        (
            ["--use-rollout-logprobs=maybe"],
            "write --use-rollout-logprobs or --no-use-rollout-logprobs, or tr",
        ),
        (["--no-use-rollout-logprobs=true"], "takes no value"),
        (
            ["--use-rollout-logprobs", "--use-tis"],
            "old_logprobs=rollout makes them the same; choose recomp",
        ),
        (["--name", "../x"], "name='../x': must match"),
        (
            ["--load-rollouts", "r", "--rollout-only"],
            "load_rollouts and rollout.rollout_only exclude each other",
        ),
        (
            ["--load-rollouts", "r", "--engine-gpus", "1"],
            "cluster.engine_gpus=1 makes no sense with rollout.lo",
        ),
        (
            ["--load-rollouts", "r", "--rollout-nodes", "0"],
            "cluster.rollout_nodes=0 makes no sense with",
        ),
        (
            ["--rollout-only", "--weight-sync.transport=disk"],
            "transport=disk makes no sense with rollout.rollo",
        ),
        (
            ["--rollout-only", "--num-gpus", "2"],
            "training.num_gpus=2 makes no sense with rollout.rollout_only",
        ),
        (["--engine", "vlm"], "^rollout.engine='vlm' is unknown; choose one of embedded, sglang"),
        (["--engine", "no.such:Engine"], "^rollout.engine='no.such:Engine': cannot load no.such"),
        (["--engine", "json:loads"], "^rollout.engine='json:loads' is no kind of engine; name a"),
        (
            ["--reward", "mth"],
            "^data.reward='mth' is unknown; choose one of exact_match, f1, gpqa, gsm8k, math, ",
        ),
    ],
)
def test_a_wrong_flag_is_refused_in_one_line(args, says):
    with pytest.raises(RunError, match=says) as refused:
        load(None, None, args)
    assert "\n" not in str(refused.value)


def test_a_later_flag_wins_and_none_clears_an_optional_field():
    assert load(None, None, ["--lr", "1", "--lr", "2"]).training.lr == 2
    cleared = load(None, None, ["--rollout-nodes", "1", "--rollout-nodes=none"])
    assert cleared.cluster.rollout_nodes is None
    assert load(None, None, ["--name", "none"]).name == "none"


def test_a_reward_is_a_name_of_the_table_or_a_function_of_the_user():
    for reward in ("math_answer", "my.module:score"):
        config = load(None, None, ["--reward", reward])
        assert config.data.reward == reward
