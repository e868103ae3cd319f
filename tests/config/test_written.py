"""What people write in YAML files, as fields get it: numbers and words for texts, times, paths."""

from pathlib import Path

import pytest

from nanoslime.config import RunConfig
from nanoslime.config.load import dump, load, read
from nanoslime.types import RunError


def loaded(folder: Path, recipe: str) -> RunConfig:
    file = folder / "recipe.yaml"
    file.write_text(recipe)
    return load(file, None, [])


def cluster_of(folder: Path, cluster: str) -> RunConfig:
    file = folder / "site.yaml"
    file.write_text(f"{cluster}\ngpus_per_node: 0")
    return load(None, file, [])


@pytest.mark.parametrize(
    ("written", "field", "value"),
    [
        ("account: 12345", "account", "12345"),
        ("account: 012", "account", "012"),
        ("account: 1e5", "account", "1e5"),
        ("account: 1_000", "account", "1_000"),
        ("account: 2024-01-31", "account", "2024-01-31"),
        ("account:", "account", ""),
        ("partition: no", "partition", "no"),
        ("memory_per_node: 0", "memory_per_node", "0"),
        ("qos: yes", "qos", "yes"),
        ("env: {NCCL_IB_DISABLE: 1, A: true, B: 0x1f, C: }", "env", None),
        ("setup:", "setup", []),
        ("env:", "env", {}),
        ("time_limit_min: 240", "time_limit_min", 240),
        ("time_limit_min: 4:00:00", "time_limit_min", 240),
        ("time_limit_min: '4:00:00'", "time_limit_min", 240),
        ("time_limit_min: 0:00:01", "time_limit_min", 1),
        ("time_limit_min: 90:30", "time_limit_min", 91),
        ("time_limit_min: 1-00:00:00", "time_limit_min", 1440),
        ("time_limit_min: 1-12", "time_limit_min", 36 * 60),
        ("time_limit_min: 2-1:30", "time_limit_min", 49 * 60 + 30),
        ("nodes: 010", "nodes", 10),
    ],
)
def test_a_field_gets_what_was_written_for_it(tmp_path, written, field, value):
    config = cluster_of(tmp_path, written)
    if value is None:
        value = {"NCCL_IB_DISABLE": "1", "A": "true", "B": "0x1f", "C": ""}
    assert getattr(config.cluster, field) == value
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump(config))
    assert read(dumped) == config


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("nodes: true", "cluster.nodes='true': must be a valid integer"),
        ("nodes: 4:00", "cluster.nodes='4:00': must be a valid integer"),
        ("nodes:", "cluster.nodes=None: must be a valid integer"),
        ("time_limit_min: 4h", "cluster.time_limit_min='4h' is no time; write minutes"),
        ("time_limit_min: UNLIMITED", "'UNLIMITED' is no time"),
        ("time_limit_min: 1:2:3:4", "'1:2:3:4' is no time"),
        ("time_limit_min: 0:00:00", "cluster.time_limit_min=0: .*greater than or equal to"),
        ("env: 3", "cluster.env=3: must be a valid dictionary"),
        ("setup: 3", "cluster.setup=3: must be a valid list"),
        ("a: &a [*a]", "unknown key cluster.a"),
        ("requeue: !!bool maybe", "cluster.requeue='maybe': must be a valid boolean"),
        ("nodes: !!int [1]", "is not YAML: expected a scalar node, but found sequence"),
        ("nodes: !!int x", "cluster.nodes='x': must be a valid integer"),
        ("nodes: !!null [1]", "is not YAML: expected a scalar node"),
        ("nodes: !!timestamp {a: 1}", "is not YAML: expected a scalar node"),
        ('nvlink_gb_s: !!float ""', "cluster.nvlink_gb_s='': must be a valid number"),
        ("env: !!map 3", "is not YAML: expected a mapping node, but found scalar"),
        ("env: !!map [1]", "is not YAML: expected a mapping node, but found sequence"),
        ("env: !!set 3", "is not YAML: expected a mapping node, but found scalar"),
        (f"setup: {'[' * 2000}{']' * 2000}", "site.yaml: .* nested too deeply"),
        (f"setup: {'{a: ' * 2000}{'}' * 2000}", "site.yaml: .* nested too deeply"),
        ("setup: &a [*a]", "a list or mapping in it holds itself"),
        ('run_root: "a\\0b"', "has a character that no path can have"),
    ],
)
def test_what_a_field_cannot_take_is_refused_in_one_line(tmp_path, written, says):
    with pytest.raises(RunError, match=says) as refused:
        cluster_of(tmp_path, written)
    assert str(refused.value).count("\n") == 0


@pytest.mark.parametrize(
    ("recipe", "shown"),
    [("training: [1]", "[1]"), ("training: off", "off"), ("[a, 1]", "['a', 1]"), ("7", "7")],
)
def test_what_is_no_section_is_shown_as_it_is_written(tmp_path, recipe, shown):
    with pytest.raises(RunError) as refused:
        loaded(tmp_path, recipe)
    assert str(refused.value).endswith(f"must be a mapping of keys to values, not {shown}")


@pytest.mark.parametrize(
    ("written", "options"),
    [
        ("{exclusive: true, nice: 100}", {"exclusive": "", "nice": "100"}),
        ("{exclusive: yes, spread-job: on}", {"exclusive": "", "spread-job": ""}),
        ("{exclusive: false, overcommit: no}", {}),
        (
            "{kill-on-invalid-dep: yes, begin: 16:00}",
            {"kill-on-invalid-dep": "yes", "begin": "16:00"},
        ),
        ("{exclusive: user, hold: }", {"exclusive": "user", "hold": ""}),
    ],
)
def test_options_of_sbatch_are_switches_or_have_values(tmp_path, written, options):
    assert cluster_of(tmp_path, f"extra_sbatch: {written}").cluster.extra_sbatch == options
    as_json = '{"exclusive": true, "nice": 5, "hold": false}'
    by_flag = load(None, None, ["--cluster.extra-sbatch", as_json])
    assert by_flag.cluster.extra_sbatch == {"exclusive": "", "nice": "5"}


@pytest.mark.parametrize(
    ("written", "partition", "account"),
    [
        ("defaults: &defaults {partition: a, account: b}\n<<: *defaults", "a", "b"),
        ("x: &x {partition: a}\n<<: *x\npartition: c\naccount: 7", "c", "7"),
        ("x: &x {partition: a}\ny: &y {account: b, partition: d}\n<<: [*x, *y]", "a", "b"),
    ],
)
def test_merge_keys_lay_one_mapping_under_another(tmp_path, written, partition, account):
    cluster = cluster_of(tmp_path, written).cluster
    assert (cluster.partition, cluster.account) == (partition, account)


def test_a_mapping_under_an_unknown_key_that_nothing_refers_to_is_refused(tmp_path):
    with pytest.raises(RunError, match="unknown key cluster.defaults"):
        cluster_of(tmp_path, "defaults: &defaults {partition: a}")


def test_paths_of_a_file_are_relative_to_it_and_those_of_flags_to_the_directory(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("HOME", "/home/me")
    site = tmp_path / "sites" / "site.yaml"
    site.parent.mkdir()
    site.write_text("gpus_per_node: 0\nrun_root: ${SCRATCH}/runs\nvenv: .venv/cuda")
    recipe = tmp_path / "recipe.yaml"
    (tmp_path / "OWNER" / "there").mkdir(parents=True)
    recipe.write_text(
        "model: {hf_checkpoint: OWNER/there}\n"
        "data:\n"
        "  sources: [a.jsonl, {prompts: OWNER/NAME:main/train}, {prompts: ~/b.jsonl}]\n"
        "  eval_prompts: sets/test.parquet\n"
        "eval: {sets: [{name: x, prompts: ../x.jsonl}, {name: y, prompts: /abs/y.jsonl}]}"
    )
    flags = ["--rollout.load-rollouts", "runs/old"]
    config = load(recipe, site, flags)
    assert config.cluster.run_root == "/scratch/me/runs"
    assert config.cluster.venv == f"{site.parent}/.venv/cuda"
    assert config.model.hf_checkpoint == f"{tmp_path}/OWNER/there"
    sources = [source.prompts for source in config.data.sources]
    assert sources == [f"{tmp_path}/a.jsonl", "OWNER/NAME:main/train", "/home/me/b.jsonl"]
    assert config.data.eval_prompts == f"{tmp_path}/sets/test.parquet"
    assert [one.prompts for one in config.eval.sets] == [f"{tmp_path}/../x.jsonl", "/abs/y.jsonl"]
    assert config.rollout.load_rollouts == "runs/old"
    flags = ["--run-root", "$SCRATCH/x", "--eval.sets", '{"prompts": "~/e.jsonl"}', "f.jsonl"]
    config = load(None, None, flags)
    assert config.cluster.run_root == "/scratch/me/x"
    assert [one.prompts for one in config.eval.sets] == ["/home/me/e.jsonl", "f.jsonl"]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("$NO_SUCH_VARIABLE/runs", "the variable NO_SUCH_VARIABLE is not set here; export it"),
        ("${NO_SUCH_VARIABLE}/runs", "the variable NO_SUCH_VARIABLE is not set here"),
        ("${HOME:-/tmp}/runs", "this one|one of these names none"),
        ("~nobody-of-that-name/runs", "there is no home directory of ~nobody-of-that-name"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(tmp_path, path, says):
    with pytest.raises(RunError, match=f"site.yaml: cluster.run_root=.*{says}"):
        cluster_of(tmp_path, f"run_root: {path}")
    with pytest.raises(RunError, match=f"flag --run-root: cluster.run_root=.*{says}"):
        load(None, None, ["--run-root", path])


TEXTS = """
container: apptainer
container_image: $IMAGES/${USER}.sif
container_mounts: [~/data:/data, "$SCRATCH:$SCRATCH:ro", /opt]
account: $ACCOUNT
env: {HF_HOME: $SCRATCH/hf, DIRS: "/a:~/b", AT: a~b, PLAIN: 1}
nccl: {TOPO_FILE: ~/topo.xml}
extra_sbatch: {output: $SCRATCH/log}
setup: ['export DIR=$SLURM_JOB_ID']
"""


def test_variables_and_home_are_put_into_what_no_shell_reads_again(tmp_path, monkeypatch):
    values = {"SCRATCH": "/s", "HOME": "/home/me", "USER": "me", "IMAGES": "/i", "ACCOUNT": "a1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    cluster = cluster_of(tmp_path, TEXTS).cluster
    assert cluster.container_image == "/i/me.sif"
    assert cluster.container_mounts == ["/home/me/data:/data", "/s:/s:ro", "/opt"]
    assert cluster.account == "a1"
    assert cluster.env == {"HF_HOME": "/s/hf", "DIRS": "/a:/home/me/b", "AT": "a~b", "PLAIN": "1"}
    assert cluster.nccl == {"TOPO_FILE": "/home/me/topo.xml"}
    assert cluster.extra_sbatch == {"output": "/s/log"}
    assert cluster.setup == ["export DIR=$SLURM_JOB_ID"]
    assert cluster_of(tmp_path, "conda: ~/envs/a").cluster.conda == "/home/me/envs/a"
    assert cluster_of(tmp_path, "conda: grpo").cluster.conda == "grpo"
    by_flag = load(None, None, ["--cluster.env", '{"A": "$SCRATCH/x"}'])
    assert by_flag.cluster.env == {"A": "/s/x"}


def test_a_run_s_own_file_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("ODD", "a$b")
    config = cluster_of(tmp_path, "env: {A: $ODD}\nrun_root: /x/$ODD")
    assert (config.cluster.env, config.cluster.run_root) == ({"A": "a$b"}, "/x/a$b")
    (tmp_path / "dumped.yaml").write_text(dump(config))
    assert read(tmp_path / "dumped.yaml") == config


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (
            "env: {A: $NO_SUCH_VARIABLE/x}",
            "cluster.env=.*the variable NO_SUCH_VARIABLE is not set here; export it, or write one "
            "that is meant for the job's shell in cluster.setup",
        ),
        ("env: {A: costs 5$}", "a . here begins a variable.*the job's shell in cluster.setup"),
        ("conda: ~nobody-of-that-name/e", "there is no home directory of ~nobody-of-that-name"),
        (
            "container: pyxis\ncontainer_image: docker://$NO_SUCH_VARIABLE/a",
            "cluster.container_image=.*NO_SUCH_VARIABLE is not set",
        ),
        ("container_mounts: ['/a:$NO_SUCH_VARIABLE']", "container_mounts=.*NO_SUCH_VARIABLE"),
        ("nccl: {TOPO_FILE: $NO_SUCH_VARIABLE}", "cluster.nccl=.*NO_SUCH_VARIABLE"),
        ("env: {MINE: $HF_TOKEN}", "would write HF_TOKEN into the run's files; export HF_TOKEN in"),
    ],
)
def test_a_variable_that_cannot_be_put_into_a_text_is_refused(tmp_path, monkeypatch, written, says):
    monkeypatch.delenv("NO_SUCH_VARIABLE", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    with pytest.raises(RunError, match=says) as refused:
        cluster_of(tmp_path, written)
    assert "\n" not in str(refused.value) and "hf_abc" not in str(refused.value)
