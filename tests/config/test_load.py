"""Recipe, cluster file and flags become one configuration; whatever is wrong is named
with its place."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from nanoslime.config import ClusterConfig, GRPOConfig, RunConfig
from nanoslime.config.flags import spellings
from nanoslime.config.load import dump, load, read
from nanoslime.types import RunError

REPOSITORY = Path(__file__).parents[2]
RECIPES = sorted((REPOSITORY / "jobs/recipes").glob("*.yaml"))
CLUSTERS = sorted((REPOSITORY / "env/clusters").glob("*.yaml"))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_lie_over_the_cluster_file_over_the_recipe(tmp_path):
    training = "training: {lr: 1e-4, tp_size: 2}\n"
    cluster_of_recipe = "cluster: {nodes: 2, partition: a, account: r}\n"
    recipe = write(tmp_path / "r.yaml", training + cluster_of_recipe)
    cluster = write(tmp_path / "c.yaml", "partition: b\nnodes: 3\ngpus_per_node: 0\n")
    config = load(recipe, cluster, ["--nodes", "5"])
    assert config.training.lr == 1e-4
    assert config.training.tp_size == 2
    assert config.cluster.nodes == 5
    assert config.cluster.partition == "b"
    assert config.cluster.account == "r"


def test_mappings_are_merged_key_by_key(tmp_path):
    recipe = write(tmp_path / "r.yaml", "cluster: {env: {A: '1', B: '1'}}")
    cluster = write(tmp_path / "c.yaml", "gpus_per_node: 0\nenv: {B: '2'}")
    assert load(recipe, cluster, []).cluster.env == {"A": "1", "B": "2"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_what_is_dumped_is_read_back_equal(path, tmp_path):
    config = load(path, None, ["--lr", "3e-7"])
    assert read(write(tmp_path / "config.yaml", dump(config))) == config


def test_hostile_text_survives_the_round_trip(tmp_path):
    text = "a'; echo foo\n\t: \"{$HOME} \u2028 #no"
    path = text.replace("$", "")
    config = load(None, None, ["--run-root", path, "--data.system-prompt", text])
    assert read(write(tmp_path / "c.yaml", dump(config))) == config
    assert config.cluster.run_root == path
    assert config.data.system_prompt == text


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda p: p.name)
def test_every_cluster_file_loads(path):
    assert load(None, path, []).cluster.name == path.stem


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("trainning: {}", r"r.yaml: unknown key trainning; did you mean training"),
        ("training: {tp: 2}", "unknown key training.tp; did you mean training.tp_size"),
        (
            "training: {num_rollout: 2}",
            r"unknown key training.num_rollout; did you mean rollout.num_rollout",
        ),
        (
            "eval: {zzzz: 2}",
            "unknown key eval.zzzz; valid here: interval, max_prompts, n_samples_per_prompt",
        ),
        ("training: 3", "training must be a mapping of keys to values, not 3"),
        ("- a", "the file must be a mapping"),
        ("training: {lr: fast}", "r.yaml: training.lr='fast': must be a valid number"),
        (
            "training: {tp_size: 0}",
            "r.yaml: training.tp_size=0: must be greater than or equal to 1",
        ),
        ("training: {megatron: 3}", "r.yaml: training.megatron=3: must be a valid dictionary"),
        ("training: {backend: 3d}", "training.backend='3d': must be 'megatron' or 'fsdp'"),
        ("cluster: {env: {A: [1]}}", r"r.yaml: cluster.env.A=\[1\]: must be a valid string"),
        ("training: {lr: 1", "r.yaml is not YAML: .*line 1"),
        (
            "training: {num_steps_per_rollout: 3}",
            "=3 does not divide rollout.rollout_batch_size=32",
        ),
        (
            "training: {megatron: {recompute_granularty: full}}",
            "did you mean recompute_granularity",
        ),
        ("training: {megatron: {num_layers: 3}}", "num_layers is set by nanoslime; use model.hf"),
        (
            "rollout: {sglang: {mem_fraction: 0.5}}",
            "mem_fraction: sglang .* did you mean mem_fraction_s",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_with_file_place_and_way_out(tmp_path, recipe, says):
    with pytest.raises(RunError, match=says):
        load(write(tmp_path / "r.yaml", recipe), None, [])


@pytest.mark.parametrize(
    "recipe",
    [
        "cluster: {env: {WANDB_API_KEY: hunter2}}",
        "cluster: {env: {hf_token: hunter2}}",
        "cluster: {env: {AWS_SECRET_ACCESS_KEY: hunter2}}",
        "cluster: {setup: ['module load cuda; export HF_TOKEN=hunter2']}",
        """cluster: {setup: ["export DB_PASSWORD='hunter2'"]}""",
    ],
)
def test_a_secret_that_would_be_written_down_is_refused_and_not_shown(tmp_path, recipe):
    with pytest.raises(
        RunError, match="export (WANDB_API_KEY|hf_token|AWS_|HF_|DB_).* in the shell"
    ) as e:
        load(write(tmp_path / "r.yaml", recipe), None, [])
    assert "hunter2" not in str(e.value)


def test_a_password_in_the_address_of_a_reward_is_refused_and_not_shown(tmp_path):
    recipe = "data: {reward: remote, reward_url: 'https://me:hunter2@host/reward'}"
    with pytest.raises(RunError, match="data.reward_url holds a password, .* elsewhere") as refused:
        load(write(tmp_path / "r.yaml", recipe), None, [])
    assert "hunter2" not in str(refused.value)


def test_what_is_no_secret_may_stand_in_the_environment(tmp_path):
    recipe = "cluster: {env: {NCCL_IB_PKEY: '1', TOKENIZERS_PARALLELISM: 'false'}, "
    recipe += "setup: ['export HF_TOKEN=$(cat ~/.token)', 'export HF_TOKEN=\"$T\"']}"
    assert load(write(tmp_path / "r.yaml", recipe), None, []).cluster.env["NCCL_IB_PKEY"] == "1"


def test_every_wrong_value_has_its_own_line(tmp_path):
    recipe = write(tmp_path / "r.yaml", "training: {lr: a, tp_size: b}")
    with pytest.raises(RunError) as refused:
        load(recipe, None, [])
    assert len(str(refused.value).splitlines()) == 2


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RunError, match="cannot read .*none.yaml"):
        load(tmp_path / "none.yaml", None, [])


@pytest.mark.parametrize(
    ("flags", "backend", "tp"),
    [
        (["--nodes", "1"], "fsdp", 1),
        (["--nodes", "4"], "megatron", 2),
        (["--nodes", "1", "--backend", "megatron"], "megatron", 2),
        (["--nodes", "1", "--tp-size", "4"], "megatron", 4),
        (["--nodes", "4", "--backend", "fsdp"], "fsdp", 2),
        (["--nodes", "1", "--sequence-parallel"], "megatron", 2),
        (["--nodes", "1", "--no-sequence-parallel"], "fsdp", 1),
    ],
)
def test_one_node_means_fsdp_unless_megatron_is_asked_for(tmp_path, flags, backend, tp):
    training = load(write(tmp_path / "r.yaml", "training: {tp_size: 2}"), None, flags).training
    assert training.backend == backend
    assert training.tp_size == tp


def test_a_recipe_s_sequence_parallel_does_not_apply_to_fsdp(tmp_path):
    recipe = write(tmp_path / "r.yaml", "training: {tp_size: 2, sequence_parallel: true}")
    training = load(recipe, None, []).training
    assert training.backend == "fsdp"
    assert not training.sequence_parallel


def test_options_of_megatron_ask_for_it(tmp_path):
    recipe = write(tmp_path / "r.yaml", "training: {megatron: {recompute_granularity: full}}")
    assert load(recipe, None, []).training.backend == "megatron"


@pytest.mark.parametrize(
    "knob",
    [
        "sequence_parallel: true",
        "megatron: {recompute_granularity: full}",
        "megatron_ddp: {bucket_size: 1000}",
        "megatron_optimizer: {apply_wd_to_qk_layernorm: true}",
        "num_layers_in_first_pipeline_stage: 1",
    ],
)
def test_fsdp_refuses_what_it_would_ignore(tmp_path, knob):
    recipe = write(tmp_path / "r.yaml", f"training: {{backend: fsdp, {knob}}}")
    name, _, _ = knob.partition(":")
    with pytest.raises(RunError, match=f"training.{name} needs training.backend=megatron"):
        load(recipe, None, [])


@pytest.mark.parametrize(
    ("algorithm", "says"),
    [
        ("kl_loss_coef: 0.1", "kl_loss_coef=0.1 needs algorithm.use_kl_loss"),
        ("use_unbiased_kl: true", "use_unbiased_kl=True needs algorithm.use_kl_loss"),
        ("overlong_penalty: 2", "overlong_penalty=2.0 needs algorithm.overlong_buffer"),
        ("correction: {tis_clip: 5}", "correction.tis_clip=5.0 needs .*use_tis"),
        ("correction: {tis_clip_low: 0.5}", "correction.tis_clip_low=0.5 needs .*use_tis"),
        ("correction: {tis_level: sequence}", "correction.tis_level=sequence needs .*use_tis"),
        (
            "correction: {reject_low: 0.1, use_tis: true}",
            "correction.reject_low=0.1 needs .*reject",
        ),
        ("correction: {reject_high: 3}", "correction.reject_high=3.0 needs .*reject"),
        ("correction: {opsm_delta: 1}", "correction.opsm_delta=1.0 needs .*use_opsm"),
        (
            "correction: {use_tis: true, tis_clip_low: 3}",
            "correction.tis_clip_low=3.0 is above algorithm.correction.tis_clip=2.0; give both",
        ),
        (
            "correction: {reject: token, reject_low: 3}",
            "correction.reject_low=3.0 is above algorithm.correction.reject_high=2.0; give both",
        ),
        (
            "name: gspo, eps_clip: 0.2",
            "eps_clip=0.2 is above algorithm.eps_clip_high=0.0004; give both, in ascending order",
        ),
        (
            "eps_clip: 0.3, eps_clip_high: 0.2",
            "eps_clip=0.3 is above algorithm.eps_clip_high=0.2; give both, in ascending order",
        ),
    ],
)
def test_settings_of_the_algorithm_without_effect_are_refused(tmp_path, algorithm, says):
    with pytest.raises(RunError, match=f"^algorithm.{says}"):
        load(write(tmp_path / "r.yaml", f"algorithm: {{{algorithm}}}"), None, [])


def test_settings_of_the_algorithm_with_effect_are_taken(tmp_path):
    with_switches = """
        algorithm:
          use_kl_loss: true
          kl_loss_coef: 0.1
          overlong_buffer: 8
          overlong_penalty: 2
          correction:
            use_tis: true
            tis_clip: 5
            reject: token
            reject_low: 0.1
            use_opsm: true
            opsm_delta: 1
    """
    load(write(tmp_path / "r.yaml", with_switches), None, [])
    # The two clips of CISPO are no range.
    load(write(tmp_path / "c.yaml", "algorithm: {name: cispo}"), None, [])


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "rloo", "reinforce_plus_plus_baseline"])
def test_one_sample_of_a_prompt_is_refused_where_samples_are_compared(name):
    flags = ["--algorithm.name", name, "--n-samples-per-prompt", "1"]
    with pytest.raises(RunError, match=f"n_samples_per_prompt=1: {name} compares"):
        load(None, None, flags)
    load(None, None, [*flags, "--rollout-only"])
    load(None, None, [*flags, "--load-rollouts", "x"])
    load(None, None, [*flags, "--algorithm.name", "reinforce_plus_plus"])


def test_an_algorithm_of_the_users_own_has_the_shared_knobs_and_its_own(tmp_path):
    text = "algorithm: {name: 'my.pkg:Mine', eps_clip: 0.3, options: {alpha: 0.5, layers: [1, 2]}}"
    config = load(write(tmp_path / "r.yaml", text), None, ["--eps-clip-high", "0.4"])
    assert (config.algorithm.name, config.algorithm.clip_high) == ("my.pkg:Mine", 0.4)
    assert config.algorithm.options == {"alpha": 0.5, "layers": [1, 2]}
    assert read(write(tmp_path / "dumped.yaml", dump(config))) == config
    by_flag = load(None, None, ["--algorithm", "my.pkg:Mine", "--n-samples-per-prompt", "1"])
    assert by_flag.algorithm.options == {}


@pytest.mark.parametrize(
    ("algorithm", "says"),
    [
        ("name: grp", "algorithm.name='grp' is unknown; .*'package.module:Name'$"),
        ("name: 'my.pkg:'", "algorithm.name='my.pkg:': must match"),
        ("name: 'my.pkg:A', gamma: 1", "gamma: algorithm.name=my.pkg:A has no such field; these"),
        ("name: 'my.pkg:A', eps_clip: 7", "algorithm.eps_clip=7: must be less"),
        ("name: 'my.pkg:A', options: 1", "algorithm.options=1: must be a valid dict"),
        ("options: {a: 1}", "name=grpo has no such field; these have: package.module:Name$"),
        ("correction: {veto: 7}", "algorithm.correction.veto=7: must be less"),
    ],
)
def test_faults_of_an_algorithm_are_named_at_their_place(tmp_path, algorithm, says):
    with pytest.raises(RunError, match=says):
        load(write(tmp_path / "r.yaml", f"algorithm: {{{algorithm}}}"), None, [])


def test_several_steps_need_the_policy_that_sampled():
    steps = ["--num-steps-per-rollout", "2"]
    current = [*steps, "--old-logprobs", "current"]
    with pytest.raises(RunError, match="num_steps_per_rollout=2: with .*old_logprobs=current"):
        load(None, None, current)
    with pytest.raises(RunError, match="num_steps_per_rollout=2: with .*old_logprobs=current"):
        load(None, None, [*current, "--use-tis"])
    for flags in (steps, [*steps, "--use-rollout-logprobs"], current[2:]):
        load(None, None, flags)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", "current"),
        ("--algorithm gspo --use-kl-loss --kl-loss-coef 0.1 --use-unbiased-kl", "current"),
        ("--use-tis --algorithm.correction.veto 0.1 --use-opsm", "current"),
        ("--training.routing-replay R3", "current"),
        ("--num-steps-per-rollout 2", "recomputed"),
        ("--kl-coef 0.1", "recomputed"),
        ("--training.routing-replay R2", "recomputed"),
        ("--algorithm my.pkg:Mine", "recomputed"),
        ("--rollout.max-staleness 1", "rollout"),
        ("--rollout.max-staleness 1 --num-steps-per-rollout 2 --kl-coef 0.1", "rollout"),
        ("--rollout.max-staleness 1 --use-opsm", "rollout"),
        ("--rollout.max-staleness 1 --use-tis", "current"),
        ("--rollout.max-staleness 1 --algorithm.correction.reject sequence", "current"),
        ("--rollout.max-staleness 1 --use-tis --num-steps-per-rollout 2", "recomputed"),
        ("--rollout.max-staleness 1 --training.routing-replay R2", "recomputed"),
        ("--rollout.max-staleness 1 --old-logprobs recomputed", "recomputed"),
    ],
)
def test_old_logprobs_are_by_default_those_without_a_pass_that_tells_nothing(flags, expected):
    config = load(None, None, flags.split())
    assert config.old_logprobs == config.training_algorithm.old_logprobs == expected
    assert f"old_logprobs: {config.algorithm.old_logprobs}" in dump(config)  # resumes decide anew


def test_off_policy_masking_asks_for_no_old_policy():
    for old in ("auto", "recomputed", "rollout", "current"):
        load(None, None, ["--use-opsm", "--old-logprobs", old])


def test_no_field_is_a_secret():
    text = dump(RunConfig()).lower()
    for word in ("token:", "password", "secret", "api_key"):
        assert word not in text


def test_cluster_files_have_the_fields_of_cluster_config_only():
    known = {f.name for f in fields(ClusterConfig)}
    for path in CLUSTERS:
        assert set(yaml.safe_load(path.read_text())) <= known


def test_a_key_that_stands_twice_is_refused(tmp_path):
    file = tmp_path / "twice.yaml"
    file.write_text("eval:\n  interval: 1\neval:\n  interval: 2\n")
    with pytest.raises(RunError, match="twice.yaml is not YAML: key 'eval' stands twice.*line 1"):
        load(file, None, [])


def test_routing_replay_asks_for_megatron_and_r2_for_a_pass_to_record():
    assert load(None, None, ["--training.routing-replay", "R3"]).training.backend == "megatron"
    with_fsdp = ["--training.routing-replay", "R3", "--backend", "fsdp"]
    says = "training.routing_replay=R3 needs training.backend=megatron"
    with pytest.raises(RunError, match=says):
        load(None, None, with_fsdp)
    engine_logprobs = ["--training.routing-replay", "R2", "--use-rollout-logprobs"]
    with pytest.raises(RunError, match="routing_replay=R2 needs algorithm.old_logprobs=recomputed"):
        load(None, None, engine_logprobs)


LONG_WARMUP = (
    "rollout: {num_rollout: 10}\ntraining: {lr_warmup_steps: 21, num_steps_per_rollout: 2}"
)


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        (LONG_WARMUP, []),
        (LONG_WARMUP, ["--num-rollout", "9", "--training.lr-warmup-steps", "19"]),
        ("", ["--training.lr-warmup-steps", "1000"]),
        ("", ["--training.lr-warmup-steps", "1000", "--num-rollout", "100"]),
    ],
)
def test_a_warmup_longer_than_the_run_is_refused(tmp_path, recipe, flags):
    with pytest.raises(RunError, match="training.lr_warmup_steps=.* is longer than the run of"):
        load(write(tmp_path / "r.yaml", recipe), None, flags)


@pytest.mark.parametrize(
    "flags", [["--num-rollout", "11"], ["--num-rollout", "2"], ["--rollout-only"]]
)
def test_a_flag_may_shorten_a_run_below_the_warmup_of_its_recipe(tmp_path, flags):
    load(write(tmp_path / "r.yaml", LONG_WARMUP), None, flags)


@pytest.mark.parametrize(
    ("algorithm", "flag"),
    [
        ("use_kl_loss: true, kl_loss_coef: 0.1, use_unbiased_kl: true", "--no-use-kl-loss"),
        *(
            ("use_kl_loss: true, kl_loss_coef: 0.1", f"--use-kl-loss={off}")
            for off in ("false", "False", "OFF", "No", "0", "n")
        ),
        ("use_kl_loss: true, kl_loss_coef: 0.1, use_unbiased_kl: true", "--kl-loss-coef=0"),
        ("use_kl_loss: true, kl_loss_coef: 0.1", "--algorithm.kl-loss-coef=0.0"),
        ("correction: {use_tis: true, tis_clip: 5, tis_level: sequence}", "--no-use-tis"),
        ("correction: {use_opsm: true, opsm_delta: 1}", "--no-use-opsm"),
        ("correction: {reject: token, reject_high: 3}", "--algorithm.correction.reject=none"),
        ("overlong_buffer: 8, overlong_penalty: 2", "--algorithm.overlong-buffer=0"),
    ],
)
def test_one_flag_switches_off_what_a_recipe_switches_on(tmp_path, algorithm, flag):
    recipe = write(tmp_path / "r.yaml", f"algorithm: {{{algorithm}}}")
    assert load(recipe, None, []).algorithm != GRPOConfig()
    assert load(recipe, None, [flag]).algorithm == GRPOConfig()


def test_a_flag_for_what_is_switched_off_is_still_refused(tmp_path):
    recipe = write(tmp_path / "r.yaml", "algorithm: {use_kl_loss: true, kl_loss_coef: 0.1}")
    with pytest.raises(RunError, match="kl_loss_coef=0.2 needs algorithm.use_kl_loss"):
        load(recipe, None, ["--no-use-kl-loss", "--kl-loss-coef", "0.2"])


def test_a_recipe_that_holds_a_reference_for_nothing_is_refused(tmp_path):
    recipe = write(tmp_path / "r.yaml", "algorithm: {use_kl_loss: true}")
    with pytest.raises(RunError, match="kl_loss_coef=0 would hold a reference model"):
        load(recipe, None, [])
    assert load(recipe, None, ["--kl-loss-coef", "0"]).algorithm == GRPOConfig()
    assert load(recipe, None, ["--kl-loss-coef", "1"]).algorithm.needs_reference
    # A run that has been accepted can be resumed, whatever rule has come since.
    assert load(recipe, None, [], resumes=True).algorithm.use_kl_loss


@pytest.mark.parametrize("value", ["1.5", "0", "1", "-0.1", "high", "true", "'0.8'"])
def test_a_share_of_memory_that_cannot_be_is_refused(tmp_path, value):
    recipe = write(tmp_path / "r.yaml", f"rollout: {{sglang: {{mem_fraction_static: {value}}}}}")
    with pytest.raises(RunError, match="mem_fraction_static=.* is no share of a GPU's memory"):
        load(recipe, None, [])


@pytest.mark.parametrize("name", ["context_length", "max_total_tokens"])
@pytest.mark.parametrize("value", ["0", "-1", "4k", "true", "1.5"])
def test_a_limit_of_tokens_that_cannot_be_is_refused(tmp_path, name, value):
    recipe = write(tmp_path / "r.yaml", f"rollout: {{sglang: {{{name}: {value}}}}}")
    with pytest.raises(RunError, match=f"rollout.sglang.{name}=.* is no number of tokens"):
        load(recipe, None, [])


@pytest.mark.parametrize(
    ("written", "read_as"), [("off", "off"), ("on", "on"), ("no", "off"), ("'off'", "off")]
)
def test_a_chat_template_that_yaml_reads_as_a_truth_value(tmp_path, written, read_as):
    recipe = write(tmp_path / "r.yaml", f"data: {{chat_template: {written}}}")
    assert load(recipe, None, []).data.chat_template == read_as


def test_sources_of_prompts_come_from_yaml_and_from_flags(tmp_path):
    listed = (
        "data: {sources: [{prompts: a/x.jsonl, weight: 3, reward: math_answer}, {prompts: /b}]}"
    )
    config = load(write(tmp_path / "r.yaml", listed), None, [])
    by_source = config.data.by_source()
    assert {name: (own.prompts, own.reward) for name, own in by_source.items()} == {
        "x": (f"{tmp_path}/a/x.jsonl", "math_answer"),
        "b": ("/b", "exact_match"),
    }
    assert read(write(tmp_path / "c.yaml", dump(config))) == config
    settings = f'{{"prompts": "{tmp_path}/a/x.jsonl", "weight": 3, "reward": "math_answer"}}'
    assert load(None, None, ["--data.sources", settings, "/b"]).data == config.data


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (['{"prompts": "a", "weihgt": 1}'], "unknown key data.sources.0.weihgt; did you mean weig"),
        (['{"prompts": "a", "weight": 0}'], "data.sources.0.weight=0: must be greater than 0"),
        (
            ['{"prompts": "a", "reward": "no"}'],
            "data.sources.reward='no' is unknown; choose one of",
        ),
        (["{prompts"], "data.sources: '{prompts' is not JSON"),
        (["a/x.jsonl", "b/x.jsonl"], "2 of them are called 'x'; give each a `name` of its own"),
        (["a", "--prompts", "b"], "data.prompts='b' and data.sources are both set"),
    ],
)
def test_sources_that_cannot_be_are_refused_in_one_line(flags, says):
    with pytest.raises(RunError) as refused:
        load(None, None, ["--data.sources", *flags])
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("recipe", "cluster", "says"),
    [
        ("training: {learning_rate: 1}", "", "unknown key training.learning_rate; .* training.lr?"),
        ("rollout: {num_generations: 8}", "", "did you mean rollout.n_samples_per_prompt"),
        ("algorithm: {beta: 0.1}", "", "mean algorithm.kl_loss_coef, with algorithm.use_kl_loss"),
        ("", "walltime: 10", "unknown key cluster.walltime; did you mean cluster.time_limit_min"),
        ("", "cluster: {nodes: 1}", "unknown key cluster.cluster; .* leave the line `cluster:` ou"),
    ],
)
def test_other_tools_names_in_a_file_get_the_field_here(tmp_path, recipe, cluster, says):
    files = [write(tmp_path / "r.yaml", recipe), write(tmp_path / "c.yaml", cluster)]
    with pytest.raises(RunError, match=says):
        load(files[0] if recipe else None, files[1] if cluster else None, [])


def test_each_hint_for_another_tools_name_is_a_flag_and_each_name_has_one_hint():
    file = REPOSITORY / "nanoslime" / "config" / "upstream" / "other_tools.yaml"
    table = yaml.safe_load(file.read_text())
    own = {"--resume", "--dry-run"}
    for here in table:
        for flag in re.findall(r"--[\w.-]+", here):
            assert flag in own or flag[2:] in spellings(), here
    names = " ".join(table.values()).split()
    assert sorted(names) == sorted(set(names))
