"""Requests that cannot run, each refused in one line on the login node, and good ones accepted.

The table is gone through by `submit_grpo.py --dry-run` with the shapes of real models, whose
weights are files with holes, on a cluster of 8 x 80 GB nodes whose sbatch accepts everything.
"""

import json
import math
import os
import re
import socket
import struct
import time
from pathlib import Path

import pytest

from jobs.checkout import ROOT
from nanoslime.models.rules import tensors
from nanoslime.models.shape import ModelShape
from tests.models.published import CONFIGS
from tools.submit import grpo as submit_grpo
from tools.submit import inputs
from tools.submit.prompts import check_prompts

Q4B = CONFIGS["Qwen3-4B"]
L70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
MODELS = {"q4b": Q4B, "q30b": CONFIGS["Qwen3-30B-A3B"], "l70b": L70B}

SBATCH = """#!/bin/sh
case "$1" in
  --version) echo slurm 22.05.8 ;;
  --test-only) /bin/cat > /dev/null; echo "sbatch: Job 42 to start at noon" >&2 ;;
  *) echo "$@" >> submitted; echo 42 ;;
esac
"""
# Nodes of 8 GPUs, of which two are in a short partition, too, and older ones of 4.
SCONTROL = """#!/bin/sh
case "$2" in
  partition)
    echo "PartitionName=gpu Default=YES State=UP MaxTime=1-00:00:00 MaxNodes=12 \
MaxCPUsPerNode=UNLIMITED Nodes=n[1-16] TotalNodes=16"
    echo "PartitionName=short Default=NO State=UP MaxTime=04:00:00 MaxNodes=UNLIMITED \
MaxCPUsPerNode=32 Nodes=n[1-2] TotalNodes=2"
    echo "PartitionName=old Default=NO State=UP MaxTime=UNLIMITED MaxNodes=UNLIMITED \
MaxCPUsPerNode=UNLIMITED Nodes=n[17-24] TotalNodes=8"
    echo "PartitionName=kept Default=NO State=UP MaxTime=UNLIMITED MaxNodes=UNLIMITED \
MaxCPUsPerNode=UNLIMITED Nodes=n[25-26] TotalNodes=2"
    ;;
  node)
    echo "{nodes}"
    ;;
esac
"""
_LARGE = "CPUTot=96 RealMemory=1024000 Gres=gpu:h100:8(S:0-1) State=IDLE Partitions"
_SMALL = "CPUTot=32 RealMemory=256000 Gres=gpu:a100:4 State=IDLE Partitions"
# Nodes whose system keeps cores and memory.
_KEPT = (
    "CPUEfctv=90 CPUTot=96 RealMemory=1024000 MemSpecLimit=24000 Gres=gpu:2080ti:8(S:0,1) "
    "State=IDLE Partitions"
)
NODES = "\n".join(
    [f"NodeName=n{i} {_LARGE}={'gpu,short' if i < 3 else 'gpu'}" for i in range(1, 17)]
    + [f"NodeName=n{i} {_SMALL}=old" for i in range(17, 25)]
    + [f"NodeName=n{i} {_KEPT}=kept" for i in range(25, 27)]
)
CLUSTER = {
    "name": "mine",
    "nodes": "2",
    "gpus_per_node": "8",
    "cpus_per_node": "64",
    "memory_per_node": "900G",
    "run_root": "runs",
    "venv": "venv",
}


def write_checkpoint(folder: Path, config: dict[str, object], num_tokens: int) -> None:
    """A checkpoint of this config.json, with zeros that take no room on a disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    template = {"chat_template": "{{ messages[-1].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(template))
    vocabulary = {str(i): i for i in (0, num_tokens - 1)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    header = {}
    end = 0
    for name, shape in tensors(ModelShape.read(folder)).items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        write_checkpoint(folder / name, config, 1000)
    write_checkpoint(folder / "large_tokenizer", Q4B, 152_500)
    return folder


class Login:
    """The login node of a cluster, on which a user types commands."""

    def __init__(self, root: Path, models: Path, capsys):
        self.root = root
        self._capsys = capsys
        self._models = models
        (root / "bin").mkdir()
        for name, text in (
            ("sbatch", SBATCH),
            ("scontrol", SCONTROL.replace("{nodes}", NODES)),
            ("squeue", "#!/bin/sh\n"),
        ):
            (root / "bin" / name).write_text(text)
            (root / "bin" / name).chmod(0o755)
        (root / "venv").mkdir()
        lock = inputs._cuda_lock_sha256(ROOT)
        (root / "venv" / ".nanoslime-target").write_text(f"target=cuda\nlock_sha256={lock}\n")
        for name in ("p.jsonl", "e.jsonl"):
            (root / name).write_text('{"prompt": "1+1=", "label": "2"}\n')
        self.cluster({})

    def cluster(self, fields: dict[str, str]) -> None:
        """Writes the cluster file: these fields over those of the cluster; one that is None is
        left out."""
        lines = [f"{name}: {value}" for name, value in (CLUSTER | fields).items() if value != "-"]
        (self.root / "mine.yaml").write_text("\n".join(lines))

    def submit(self, *words: str) -> tuple[int, str, str]:
        known = [str(self._models / word) if word in self._words else word for word in words]
        code = submit_grpo.main(known, {"PATH": str(self.root / "bin")}, self.root)
        shown = self._capsys.readouterr()
        return code, shown.out, shown.err

    @property
    def _words(self) -> list[str]:
        return [path.name for path in self._models.iterdir()]

    def answer(self, flags: str, model: str = "q4b") -> tuple[str, str]:
        """What a dry run refuses, empty where it refuses nothing; and all that it prints."""
        words = ["--cluster", "mine.yaml", *flags.split(), "--dry-run"]
        if model:
            words += ["--hf-checkpoint", model, "--prompts", "p.jsonl"]
        code, out, err = self.submit(*words)
        refused = out.partition("would be refused: ")[2]
        refusal = err or "".join(refused.splitlines(keepends=True)[:1])
        assert (code == 2) == bool(refusal), out + err
        assert "Traceback" not in refusal
        return refusal, out


@pytest.fixture
def login(tmp_path, models, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("NO_SUCH_VARIABLE", raising=False)
    return Login(tmp_path, models, capsys)


# Model, flags, fields of the cluster file, and what the refusal says; None: it is accepted.
REFUSED = [
    # Response beyond the context, tokens without a row.
    ("q4b", "--max-new-tokens 65536", {}, "more than the 40960 that the model reads"),
    ("q4b", "--max-new-tokens 40000", {}, "data.max_prompt_tokens=1024 and rollout.max_new_tokens"),
    ("l70b", "--max-new-tokens 131072 --tp-size 8 --engine-tp-size 8", {}, "more than the 131072"),
    ("large_tokenizer", "", {}, "has 152500 tokens, and the model's vocab_size=151936"),
    ("q4b", "--rollout.stop-token-ids 151936", {}, "no response can hold"),
    # Expert parallelism is the way out.
    ("q30b", "--allow-slow", {}, "training.ep_size"),
    # What SLURM would never start.
    ("q4b", "--time-limit-min 10000", {}, "cluster.time_limit_min=10000.*at most 1440"),
    ("q4b", "--time-limit-min 300 --partition short", {}, "time_limit_min=300.*short.*most 240"),
    ("q4b", "--nodes 14", {}, "cluster.nodes=14.*at most 12"),
    ("q4b", "--nodes 3 --partition short", {"cpus_per_node": "16"}, "cluster.nodes=3.*2 nodes"),
    ("q4b", "", {"gpus_per_node": "9"}, "cluster.gpus_per_node=9: .* have gpu:h100:8"),
    ("q4b", "", {"cpus_per_node": "200"}, "cluster.cpus_per_node=200.* 96"),
    ("q4b", "", {"memory_per_node": "2T"}, "cluster.memory_per_node=2097152.*have 1024000 MB"),
    (
        "q4b",
        "--partition old",
        {"cpus_per_node": "16"},
        "cluster.gpus_per_node=8: .* have gpu:a100:4",
    ),
    ("q4b", "--partition short", {}, "cluster.cpus_per_node=64.* 32"),
    ("q4b", "--partition nowhere", {}, "cluster.partition='nowhere'.*gpu, short"),
    (
        "q4b",
        "",
        {"gpu_request": "gres:gpu:v100"},
        "cluster.gpus_per_node=8.*of type v100.*gpu:h100:8",
    ),
    (
        "q4b",
        "--partition kept",
        {"cpus_per_node": "92"},
        "cluster.cpus_per_node=92: .*kept have 90 cores",
    ),
    (
        "q4b",
        "--partition kept",
        {"memory_per_node": "1001000M"},
        "memory_per_node=1001000: .*have 1000000 MB",
    ),
    (
        "q4b",
        "--partition kept",
        {"gpu_request": "gres:gpu:2080", "memory_per_node": "900000M"},
        "cluster.gpus_per_node=8.*of type 2080: .*have gpu:2080ti:8",
    ),
    # One thing said twice.
    ("q4b", "--nodes 4", {"extra_sbatch": "{nodes: '2'}"}, "'nodes'.* cluster.nodes"),
    ("q4b", "", {"extra_sbatch": "{time: 1-0}"}, "'time'.* cluster.time_limit_min"),
    ("q4b", "", {"extra_sbatch": "{partition: old}"}, "'partition'.* cluster.partition"),
    ("q4b", "", {"extra_sbatch": "{gres: 'gpu:h100:8'}"}, "'gres'.* cluster.gpu_request"),
    ("q4b", "", {"extra_sbatch": "{gpus: 16}"}, "'gpus'.* cluster.gpus_per_node"),
    ("q4b", "", {"extra_sbatch": "{mem: 10G}"}, "'mem'.* cluster.memory_per_node"),
    ("q4b", "", {"extra_sbatch": "{mem-per-cpu: 1G}"}, "'mem-per-cpu'.* cluster.memory_per_node"),
    ("q4b", "", {"extra_sbatch": "{ntasks-per-node: 8}"}, "'ntasks-per-node'.*one task"),
    ("q4b", "", {"extra_sbatch": "{array: 0-3}"}, "'array'"),
    ("q4b", "", {"extra_sbatch": "{no-requeue: true}"}, "'no-requeue'.* cluster.re"),
    ("q4b", "", {"extra_sbatch": "{N: 2}"}, "'N' is|'N'.* long name"),
    ("q4b", "--lr 1e-6 --training.lr 1e-5", {}, "--training.lr sets training.lr, which --lr"),
    ("q4b", "--nodes 2 --nodes 3", {}, "--nodes"),
    ("q4b", "--cluster mine.yaml", {}, "--cluster is given twice; give it once"),
    ("q4b", "--recipe gsm8k --recipe colocate", {}, "--recipe is given twice"),
    ("q4b", "--resume a --resume b", {}, "--resume is given twice"),
    ("q4b", "--dry-run=true", {}, "--dry-run: it is a switch, which takes no argument 'true'"),
    ("q4b", "--recipe", {}, "--recipe: it needs an argument; --help lists all flags"),
    # A reference for nothing.
    ("q4b", "--use-kl-loss", {}, "kl_loss_coef=0 would hold a reference model.*--no-use-kl-loss"),
    # Times.
    ("q4b", "--time-limit-min 5", {"signal_lead_s": "600"}, "time_limit_min=5"),
    ("q4b", "--time-limit-min 10", {"signal_lead_s": "600"}, "time_limit_min=10"),
    ("q4b", "--training.lr-warmup-steps 1000", {}, "lr_warmup_steps=1000"),
    ("q4b", "--training.min-lr 1e-3", {}, "min_lr=0.001 is above training.lr"),
    ("q4b", "--num-rollout 0", {}, "rollout.num_rollout='0'"),
    # Bounds.
    ("q4b", "--top-k 0", {}, "top_k=0 leaves no token"),
    ("q4b", "--top-k -7", {}, "top_k=-7 leaves no token"),
    ("q4b", "--data.max-prompt-tokens -5", {}, "max_prompt_tokens='-5'"),
    ("q4b", "--nodes 1000000000", {}, "cluster.nodes="),
    ("q4b", '--rollout.sglang {"mem_fraction_static":1.5}', {}, "mem_fraction_static=1.5"),
    ("q4b", '--rollout.sglang {"mem_fraction_static":0}', {}, "mem_fraction_static=0"),
    ("q4b", '--rollout.sglang {"mem_fraction_static":"high"}', {}, "mem_fraction_static='high'"),
    ("q4b", '--rollout.sglang {"context_length":"4k"}', {}, "context_length='4k'"),
    ("q4b", '--rollout.sglang {"max_total_tokens":1000}', {}, "1000 that .*max_total_tokens"),
    ("q4b", '--rollout.sglang {"max_running_requests":0}', {}, "max_running_requests=0"),
    ("q4b", '--rollout.sglang {"chunked_prefill_size":"big"}', {}, "chunked_prefill_size='big'"),
    ("q4b", '--rollout.sglang {"page_size":0}', {}, "page_size=0"),
    ("q4b", '--rollout.sglang {"context_length":40961}', {}, "context_length=40961 .* 40960"),
    ("q4b", '--rollout.sglang {"dp_size":2}', {}, "sglang.dp_size .*rollout.engines_per_node"),
    # Transports that the layout cannot have.
    ("q4b", "--weight-sync.transport tensor", {}, "weight_sync.transport=tensor .*--colocate"),
    ("q4b", "--weight-sync.transport in_process --nodes 4", {}, "weight_sync.transport=in_process"),
    ("q4b", "--engine embedded --weight-sync.transport broadcast", {}, "transport=broadcast"),
    ("q4b", "--colocate --weight-sync.transport broadcast", {}, "transport=broadcast"),
    # An engine whose cache holds less than one sequence.
    (
        "l70b",
        "--tp-size 8 --pp-size 2 --engine-tp-size 2 --max-new-tokens 120000 --nodes 8 "
        "--cp-size 2 --sequence-parallel --training.recompute --allow-slow",
        {},
        "make a sequence of 121024 tokens, and an engine caches about",
    ),
    # No model.
    ("", "--nodes 4 --prompts p.jsonl", {}, "--hf-checkpoint"),
    ("", "--nodes 4", {}, "--hf-checkpoint"),
    ("q4b", "", {"gpus_per_node": "-"}, "gpus_per_node is not set"),
    # Paths.
    ("q4b", "", {"run_root": "$NO_SUCH_VARIABLE/runs"}, "NO_SUCH_VARIABLE is not set"),
    ("q4b", "", {"venv": "~nobody-here/venv"}, "no home directory of ~nobody-here"),
]


@pytest.mark.parametrize(("model", "flags", "fields", "says"), REFUSED)
def test_what_cannot_run_is_refused_in_one_line(login, model, flags, fields, says):
    login.cluster(fields)
    refusal, _ = login.answer(flags, model)
    assert re.search(says, refusal), refusal
    assert refusal.count("\n") == 1, refusal
    assert not (login.root / "runs").exists()


ACCEPTED = [
    ("q4b", "", {}),
    ("q4b", "--nodes 4 --eval-prompts e.jsonl --checkpoint.keep-best --eval-interval 5", {}),
    ("q4b", "--recipe qwen3_4b_h200 --no-use-kl-loss --prompt-key prompt --label-key label", {}),
    (
        "q4b",
        "--recipe colocate --use-kl-loss=False --kl-loss-coef 0 --input-key prompt "
        "--label-key label",
        {},
    ),
    ("q4b", "--recipe colocate --kl-loss-coef 0 --input-key prompt --label-key label", {}),
    ("q4b", "--recipe colocate --use-kl-loss=false --input-key prompt --label-key label", {}),
    ("q30b", "--allow-slow --nodes 4 --ep-size 8 --tp-size 2 --sequence-parallel", {}),
    ("l70b", "--nodes 8 --tp-size 8 --pp-size 2 --engine-tp-size 8", {}),
    ("q4b", "", {"memory_per_node": "0", "account": "12345", "env": "{NCCL_IB_DISABLE: 1}"}),
    ("q4b", "", {"extra_sbatch": "{exclusive: true, nice: 100}"}),
    ("q4b", "", {"time_limit_min": "4:00:00", "partition": "short", "cpus_per_node": "32"}),
    ("q4b", "--time-limit-min 1-00:00:00", {}),
    ("q4b", "--top-k -1 --temperature 0.7", {}),
    ("q4b", "--colocate --weight-sync.transport tensor", {}),
    ("q4b", "--partition gpu,short --nodes 2", {"cpus_per_node": "32"}),
    ("q4b", "", {"gpu_request": "gres:gpu:h100"}),
    (
        "q4b",
        "--partition kept",
        {"gpu_request": "gres:gpu:2080ti", "cpus_per_node": "90", "memory_per_node": "1000000M"},
    ),
    ("q4b", '--rollout.sglang {"mem_fraction_static":0.8,"max_running_requests":64}', {}),
]


@pytest.mark.parametrize(("model", "flags", "fields"), ACCEPTED)
def test_what_can_run_is_accepted(login, model, flags, fields):
    login.cluster(fields)
    refusal, out = login.answer(flags, model)
    assert refusal == ""
    assert "sbatch: Job 42 to start at noon" in out


def test_evaluations_without_prompts_have_no_effect_and_the_plan_says_so(login):
    refusal, out = login.answer("--checkpoint.keep-best --eval-interval 20")
    assert refusal == ""
    assert "checkpoint.keep_best" in out and "no effect" in out


def test_an_engine_that_would_generate_on_the_driver_s_cpu_is_warned_of_with_its_speed(login):
    refusal, out = login.answer("--engine embedded --nodes 4")
    assert refusal == ""
    assert re.search("embedded, in the driver.* on its CPU, about 12 tokens a second", out)


# Habitual names of other tools, and the name here.
HINTS = {
    "--tensor-model-parallel-size": "--tp-size",
    "--pipeline-model-parallel-size": "--pp-size",
    "--context-parallel-size": "--cp-size",
    "--expert-model-parallel-size": "--ep-size",
    "--sglang-mem-fraction-static": "--rollout.sglang",
    "--rollout-num-gpus": "--rollout-nodes",
    "--rollout-num-gpus-per-engine": "--engine-tp-size",
    "--rollout-max-response-len": "--max-new-tokens",
    "--actor-num-nodes": "--nodes",
    "--learning-rate": "--lr",
    "--beta": "--kl-loss-coef",
    "--num-generations": "--n-samples-per-prompt",
    "--global-batch-size": "--num-steps-per-rollout",
    "--gres": "--cluster.gpu-request",
    "--model": "--hf-checkpoint",
    "--dry_run": "--dry-run",
    "--save-interval-steps": "--save-interval",
    "--max-completion-length": "--max-new-tokens",
    "--epsilon-high": "--eps-clip-high",
    "--ref-load": "--hf-checkpoint",
    "--load": "--resume",
    "--mem": "--cluster.memory-per-node",
    "--time": "--time-limit-min",
    "--gpus-per-node": "--cluster.gpus-per-node",
    "--job-name": "--name",
    "--sglang-attention-backend": """--rollout.sglang '{"attention_backend": VALUE}'""",
    "--no-kl": "--no-use-kl-loss",
    "--kl-penalty": "--kl-loss-type",
    "--ref-model": "--hf-checkpoint",
    "--use-vllm": "--engine",
    "--zero-stage": "--backend fsdp",
    "--max-seqlen": "context_length",
    "--seq-len": "context_length",
    "--save-total-limit": "--checkpoint.keep-last",
    "--ppo-epochs": "--num-steps-per-rollout",
    "--eval-max-response-len": "--eval.sets",
    "--licenses": "licenses",
    "--output": "--run-root",
}


@pytest.mark.parametrize(("flag", "here"), HINTS.items())
def test_a_habitual_name_of_another_tool_gets_the_name_here(login, flag, here):
    refusal, _ = login.answer(f"{flag} 4")
    assert f"unknown flag {flag}; " in refusal or flag == "--dry_run"
    assert here in refusal


GOOD = '{"prompt": "1+1=", "label": "2"}'


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "p.jsonl",
            '{"prompt": "caf\u00e9", "label": "2"}'.encode("latin-1"),
            "p.jsonl:1.*UTF-8.*iconv",
        ),
        ("p.jsonl", f"{GOOD}\n{{broken".encode(), "p.jsonl:2: not a line of JSON"),
        (
            "p.jsonl",
            f'{GOOD}\n{{"prompt": 7, "label": 1}}'.encode(),
            "p.jsonl:2: a prompt is a str",
        ),
        ("p.jsonl", b'{"prompt": null, "label": "2"}', "p.jsonl:1: a prompt is a string"),
        ("p.jsonl", f"{GOOD}\n[1]".encode(), "p.jsonl:2: a JSON object is needed"),
        ("p.jsonl", b"\x00\x01", "p.jsonl:1: not a line of JSON"),
        ("p.jsonl", b"[" * 100_000, "p.jsonl:1: not a line of JSON"),
        ("p.jsonl", b"", "holds no prompts"),
        ("p.parquet", b"PAR1 and no more", "not a readable parquet file"),
        ("p.parquet", b"", "not a readable parquet file"),
        ("p.arrow", b"nothing", "not a stream of Arrow"),
        ("p.jsonl.gz", GOOD.encode(), "p.jsonl.gz"),
        ("p.jsonl.zst", GOOD.encode(), "p.jsonl.zst"),
        ("p.csv", GOOD.encode(), "choose a file that ends in .jsonl or .parquet"),
        ("p.jsonl/q.jsonl", b"{", "q.jsonl:1: not a line of JSON"),
    ],
)
def test_a_prompt_file_is_read_to_its_end(login, name, content, says):
    (login.root / "p.jsonl").unlink()
    file = login.root / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    words = ["--cluster", "mine.yaml", "--hf-checkpoint", "q4b", "--dry-run"]
    code, _, err = login.submit(*words, "--prompts", name.partition("/")[0])
    assert code == 2
    assert re.search(says, err), err
    assert err.count("\n") == 1


def deny(path: Path) -> None:
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root reads every file")


def folder_in_place_of(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [deny, folder_in_place_of])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("p.jsonl", "p.jsonl"),
        ("model/model.safetensors", "model.safetensors"),
        ("model/config.json", "config.json"),
        ("model/tokenizer.json", "tokenizer"),
        ("model/tokenizer_config.json", "tokenizer"),
        ("mine.yaml", "mine.yaml"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_in_one_line(login, name, says, damage):
    write_checkpoint(login.root / "model", Q4B | {"num_hidden_layers": 1}, 1000)
    (login.root / "model" / "tokenizer_config.json").write_text("{}")
    damage(login.root / name)
    words = ["--cluster", "mine.yaml", "--hf-checkpoint", str(login.root / "model"), "--dry-run"]
    code, out, err = login.submit(*words, "--prompts", "p.jsonl")
    if (code, name) == (0, "model/tokenizer_config.json"):
        return  # A tokenizer can do without.
    assert code == 2, out
    assert says in err
    assert err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", b"{", "config.json is not JSON"),
        ("config.json", b"[]", "config.json should hold one JSON object"),
        ("config.json", '{"a": "\u00e9"}'.encode("latin-1"), "config.json cannot be read"),
        ("config.json", b'{"model_type": "qwen3"}', "config.json has no "),
        ("config.json", b'{"model_type": ["qwen3"]}', "model_type"),
        ("config.json", json.dumps(Q4B | {"hidden_size": "big"}).encode(), "hidden_size='big'"),
        ("config.json", json.dumps(Q4B | {"num_attention_heads": 0}).encode(), "config.json"),
        ("model.safetensors", b"", "model.safetensors"),
        ("model.safetensors", b"\xff" * 64, "model.safetensors"),
        ("model.safetensors.index.json", b"{", "index.json"),
        ("model.safetensors.index.json", b'{"weight_map": 3}', "index.json has no weight_map"),
        ("tokenizer.json", b"{", "tokenizer.json is not JSON"),
        ("tokenizer.json", b'{"model": 3}', "tokenizer.json"),
        ("tokenizer.json", b'{"model": {"vocab": 3}}', "tokenizer.json"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": "b"}}}', "tokenizer.json"),
        ("tokenizer.json", b'{"added_tokens": [{"content": "a"}]}', "tokenizer.json"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"a": 1}}', "tokenizer"),
        ("tokenizer_config.json", b'{"chat_template": "{% for"}', "chat template is not jinja2"),
        ("tokenizer_config.json", b'{"chat_template": 7}', "tokenizer"),
    ],
)
def test_a_malformed_file_of_a_checkpoint_is_named_in_one_line(login, name, content, says):
    write_checkpoint(login.root / "model", Q4B | {"num_hidden_layers": 1}, 1000)
    (login.root / "model" / name).write_bytes(content)
    words = ["--cluster", "mine.yaml", "--hf-checkpoint", str(login.root / "model"), "--dry-run"]
    code, out, err = login.submit(*words, "--prompts", "p.jsonl")
    assert code == 2, out
    assert says in err
    assert err.count("\n") == 1, err


@pytest.mark.parametrize(
    "recipe",
    [
        "a: [",
        "\ttab: 1",
        "--- 1\n--- 2",
        "x: !!python/object:os.system 1",
        "? [a]\n: 1",
        "1: 2",
        "cluster: {nodes: 1, nodes: 2}",
        "training: {lr: 1_000_000_000_000_000_000_000_000x}",
        f"cluster: {{nodes: {'9' * 5000}}}",
        "cluster: {nodes: .inf}",
        "name: [a]",
        "name: {a: b}",
        "name: a\\b",
        "rollout: {sglang: [1]}",
        "rollout: {sglang: {mem_fraction_static: [1]}}",
        "rollout: {stop: 3}",
        "data: {sources: 3}",
        "data: {sources: [3]}",
        "data: {rewards: {a: b}}",
        "eval: {sets: [[]]}",
        "training: {freeze: ['(']}",
        "<<: 3",
        "cluster: &c {<<: *c}",
        "[" * 5000,
        "cluster: {run_root: 'a\udc80'}",
    ],
)
def test_a_recipe_of_any_form_gives_no_traceback(login, recipe):
    (login.root / "r.yaml").write_text(recipe, errors="surrogatepass")
    code, out, err = login.submit("--recipe", "r.yaml", "--local", "--dry-run")
    assert code == 2, out
    assert re.search(r"r\.yaml|cluster|training|rollout|model\.", err), err


@pytest.mark.parametrize(
    "value", ["", " ", "-1", "1e999", "nan", "None", "[]", "{}", "\udcff", "x" * 9000]
)
def test_a_flag_with_any_value_gives_no_traceback(login, value):
    for flag in (
        "--nodes",
        "--lr",
        "--name",
        "--run-root",
        "--prompts",
        "--rollout.sglang",
        "--stop",
    ):
        code, out, err = login.submit(flag, value, "--local", "--dry-run")
        assert code in (0, 2), out + err


@pytest.mark.parametrize("submitter", ["submitit", "sbatch"])
@pytest.mark.parametrize("printed", ["", "gibberish", "Submitted", "\u00e9"])
def test_an_answer_of_sbatch_without_a_job_is_refused_in_one_line(login, submitter, printed):
    sbatch = login.root / "bin" / "sbatch"
    script = SBATCH.replace('echo "$@" >> submitted; echo 42', f'echo "{printed}"')
    sbatch.write_text(script)
    flags = ["--nodes", "2", "--submit", submitter]
    code, _, err = login.submit(*flags)
    assert code == 2
    assert err.count("\n") == 1, err
    assert not (login.root / "runs").exists()


def test_a_run_root_that_is_a_file_is_refused(login):
    (login.root / "taken").write_text("")
    for root in ("taken", "taken/deeper"):
        refusal, _ = login.answer(f"--run-root {root}")
        assert "taken is a file; name a directory" in refusal


def test_prompts_that_were_checked_are_not_read_again(login, monkeypatch):
    read = []

    def check(path, data, tokenizer):
        read.append(path)
        return check_prompts(path, data, tokenizer)

    monkeypatch.setattr("tools.submit.checked_prompts.check_prompts", check)
    _, first = login.answer("")
    _, second = login.answer("")
    assert len(read) == 1
    assert first == second and "1 prompts" in second
    (login.root / "p.jsonl").write_text(f"{GOOD}\n{GOOD}\n")
    assert "2 prompts" in login.answer("")[1]
    login.answer("--data.max-prompt-tokens 7")
    assert len(read) == 3
    cached = list((login.root / "cache" / "nanoslime" / "prompts").iterdir())
    assert len(cached) == 3


def test_a_hub_that_never_answers_has_a_deadline(login, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(login.root / "hub"))
        monkeypatch.setattr("nanoslime.storage.hub._ANSWER_DEADLINE_S", 0.5)
        began = time.monotonic()
        words = ["--cluster", "mine.yaml", "--prompts", "p.jsonl", "--dry-run"]
        code, _, err = login.submit(*words, "--hf-checkpoint", "someone/something")
    assert code == 2
    assert "the hub did not give it (no answer within 0.5 s)" in err
    assert time.monotonic() - began < 30
