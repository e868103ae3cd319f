"""The conversion commands as they are typed: light, self-explaining, and silent about nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.checkpoints import contents, make, to_huggingface, to_megatron
from tools import hf_to_megatron, inspect_checkpoint, megatron_to_hf
from tools.conversion.command import finish

ROOT = Path(__file__).parents[2]
# Each of these takes longer to import than a small conversion takes.
HEAVY = (
    "torch",
    "numpy",
    "transformers",
    "ray",
    "megatron",
    "sglang",
    "safetensors",
    "tqdm",
    "pydantic",
)
BLOCK_AND_RUN = """
import runpy, sys
blocked = {blocked!r}
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Blocked())
sys.argv = {argv!r}
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    make(directory / "hf", "qwen3_moe", shards=True)
    assert to_megatron(directory / "hf", directory / "megatron") == 0
    make(directory / "glm4", "glm4")
    return directory


def run_blocked(
    blocked: tuple[str, ...], tool: str, *arguments: object
) -> subprocess.CompletedProcess[str]:
    """The command in a process where `blocked` cannot be imported."""
    argv = [tool, *map(str, arguments)]
    script = str(ROOT / "tools" / tool)
    code = BLOCK_AND_RUN.format(blocked=blocked, argv=argv, script=script)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_conversions_import_nothing_heavy(models, tmp_path):
    done = run_blocked(HEAVY, "hf_to_megatron.py", models / "hf", tmp_path / "megatron")
    assert done.returncode == 0, done.stderr
    done = run_blocked(HEAVY, "megatron_to_hf.py", tmp_path / "megatron", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "megatron") == contents(models / "megatron")
    assert contents(models / "hf").items() <= contents(tmp_path / "back").items()
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"{tmp_path / 'back'}: 0.000 GB in ")
    assert "GB/s, peak memory " in last


def test_another_dtype_needs_no_torch(models, tmp_path):
    blocked = tuple(name for name in HEAVY if name != "numpy")
    arguments = (models / "megatron", tmp_path / "back", "--dtype", "BF16")
    done = run_blocked(blocked, "megatron_to_hf.py", *arguments)
    assert done.returncode == 0, done.stderr


def size_of(directory: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in directory.glob(pattern))


def number_before(text: str, word: str) -> int:
    """The number that stands in front of a word."""
    return int(text.partition(f" {word}")[0].split()[-1].replace(",", ""))


def test_a_dry_run_to_megatron_prints_the_plan_and_writes_nothing(models, tmp_path, capsys):
    before = contents(models)
    out = tmp_path / "deep" / "out"
    assert to_megatron(models / "hf", out, "--dry-run") == 0
    text = capsys.readouterr().out
    num_bytes = size_of(models / "megatron" / "release", "*.distcp")
    for line in (
        "model    qwen3_moe, ",
        "4 layers, 4 experts",
        f"read     {models / 'hf'} (Hugging Face)",
        f"write    {out} (1 files, {num_bytes:,} bytes)",
        f"release/__0_0.distcp  {num_bytes:,}",
        "move as whole rows, 0 block by block",
        f"note: {models / 'hf'} has no manifest: its structure is checked, its bits are not",
    ):
        assert line in text
    tensor_bytes = number_before(text.partition(" tensors, ")[2], "bytes")
    file_bytes = size_of(models / "hf", "*.safetensors")
    assert 0.9 * file_bytes < tensor_bytes < file_bytes
    assert not (tmp_path / "deep").exists()
    assert contents(models) == before


def test_a_dry_run_to_hugging_face_prints_the_plan_and_writes_nothing(models, tmp_path, capsys):
    before = contents(models)
    out = tmp_path / "deep" / "out"
    assert to_huggingface(models / "megatron", out, "--dry-run", "--dtype", "F16") == 0
    text = capsys.readouterr().out
    assert f"read     {models / 'megatron' / 'release'} (torch_dist)" in text
    assert "note" not in text
    tensor_bytes = number_before(text.partition(" tensors, ")[2], "bytes")
    assert f"0 bytes move as whole rows, {tensor_bytes // 2:,} block by block" in text
    assert not (tmp_path / "deep").exists()
    assert contents(models) == before


def test_names_that_nothing_here_confirms_are_said_so(models, tmp_path, capsys):
    note = "note: glm4: the norms after attention and MLP are named as slime and mbridge do"
    assert to_megatron(models / "glm4", tmp_path / "out", "--dry-run") == 0
    assert note in capsys.readouterr().out
    assert to_megatron(models / "glm4", tmp_path / "out") == 0
    assert note in capsys.readouterr().err


@pytest.mark.parametrize(
    "main, source, own",
    [
        (hf_to_megatron.main, "HF_DIR", []),
        (megatron_to_hf.main, "MEGATRON_DIR", ["--hf-checkpoint DIR", "--dtype {BF16,F16,F32}"]),
    ],
)
def test_help_says_what_it_does(capsys, main, source, own):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    script = main.__module__.rpartition(".")[2] + ".py"
    for part in (f"{source} OUT", script, "--dry-run", "--force", "--threads", "--no-checksums"):
        assert part in text
    for option in own:
        assert option in text


@pytest.mark.parametrize(
    "arguments", [[], ["in"], ["in", "out", "--tp-size", "2"], ["in", "out", "--dry"]]
)
def test_wrong_arguments_are_refused(capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        hf_to_megatron.main(arguments)
    assert "usage: hf_to_megatron.py" in capsys.readouterr().err


def inspect(*arguments: object) -> int:
    """The exit code of tools/inspect_checkpoint.py."""
    argv = [str(argument) for argument in arguments]
    return finish("inspect_checkpoint", lambda: inspect_checkpoint.main(argv))


def test_inspect_says_what_a_checkpoint_is(models, capsys):
    assert inspect(models / "megatron", "--verify", "--tensors") == 0
    text = capsys.readouterr().out
    for line in (
        f"torch_dist {models / 'megatron' / 'release'}, layout B",
        "iteration 0",
        "weights   torch_dist: ",
        "model     qwen3_moe, ",
        "4 experts, ",
        "checksums compared, good",
    ):
        assert line in text
    assert "decoder.final_layernorm.weight " in text


def test_inspect_says_the_training_state_where_the_model_is_not_known(models, tmp_path, capsys):
    shutil.copytree(models / "megatron" / "release", tmp_path / "release")
    assert inspect(tmp_path / "release") == 2
    captured = capsys.readouterr()
    assert "layout B" in captured.out and "iteration 0" in captured.out
    assert "say with --hf-checkpoint DIR which model it is" in captured.err


@pytest.mark.parametrize("threads", [0, 1, 7])
def test_any_number_of_threads_gives_the_same(models, tmp_path, threads):
    assert to_huggingface(models / "megatron", tmp_path / "out", "--threads", threads) == 0
    assert contents(models / "hf").items() <= contents(tmp_path / "out").items()


def test_hostile_paths(models, tmp_path):
    source = tmp_path / 'a\'; echo "x" $HOME' / "ü model"
    source.parent.mkdir()
    (models / "hf").rename(source)
    try:
        assert to_megatron(source, tmp_path / "out 'x'") == 0
        assert contents(tmp_path / "out 'x'") == contents(models / "megatron")
    finally:
        source.rename(models / "hf")
