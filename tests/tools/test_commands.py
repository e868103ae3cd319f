"""The conversion commands as they are typed: light, self-explaining, and silent about nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.checkpoints import contents, make, to_huggingface, to_megatron
from tools import hf_to_megatron, megatron_to_hf

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "numpy", "transformers", "ray", "megatron", "sglang", "safetensors", "tqdm")


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
    code = f"""
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Blocked())
sys.argv = {[tool, *map(str, arguments)]!r}
runpy.run_path({str(ROOT / "tools" / tool)!r}, run_name="__main__")
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )


def test_conversions_need_neither_torch_nor_numpy(models, tmp_path):
    done = run_blocked(HEAVY, "hf_to_megatron.py", models / "hf", tmp_path / "megatron")
    assert done.returncode == 0, done.stderr
    done = run_blocked(HEAVY, "megatron_to_hf.py", tmp_path / "megatron", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "megatron") == contents(models / "megatron")
    assert contents(models / "hf").items() <= contents(tmp_path / "back").items()
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"{tmp_path / 'back'}: 0.000 GB in ") and "GB/s, peak memory " in last


def test_another_dtype_needs_no_torch(models, tmp_path):
    blocked = tuple(name for name in HEAVY if name != "numpy")
    done = run_blocked(
        blocked, "megatron_to_hf.py", models / "megatron", tmp_path / "back", "--dtype", "BF16"
    )
    assert done.returncode == 0, done.stderr


def test_a_dry_run_prints_the_plan_and_writes_nothing(models, tmp_path, capsys):
    before = contents(models)
    out = tmp_path / "deep" / "out"
    assert to_megatron(models / "hf", out, "--dry-run") == 0
    text = capsys.readouterr().out
    size = sum(file.stat().st_size for file in (models / "megatron" / "release").glob("*.distcp"))
    tensors = sum(file.stat().st_size for file in (models / "hf").glob("*.safetensors"))
    for line in (
        "model    qwen3_moe, ",
        "4 layers, 4 experts",
        f"read     {models / 'hf'} (Hugging Face)",
        f"write    {out} (1 files, {size:,} bytes)",
        f"release/__0_0.distcp  {size:,}",
        "move as whole rows, 0 block by block",
        f"note: {models / 'hf'} has no manifest: its structure is checked, its bits are not",
    ):
        assert line in text
    said = int(text.partition(" tensors, ")[2].partition(" bytes")[0].replace(",", ""))
    assert 0.9 * tensors < said < tensors
    assert to_huggingface(models / "megatron", out, "--dry-run", "--dtype", "F16") == 0
    text = capsys.readouterr().out
    assert f"read     {models / 'megatron' / 'release'} (torch_dist)" in text and "note" not in text
    assert f"0 bytes move as whole rows, {said // 2:,} block by block" in text
    assert not (tmp_path / "deep").exists() and contents(models) == before


def test_names_that_nothing_here_confirms_are_said_so(models, tmp_path, capsys):
    for options in (["--dry-run"], []):
        assert to_megatron(models / "glm4", tmp_path / "out", *options) == 0
        captured = capsys.readouterr()
        assert (
            "note: glm4: the norms after attention and MLP are named as slime and mbridge do"
            in (captured.out if options else captured.err)
        )


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
    assert f"{source} OUT" in text and (main.__module__.rpartition(".")[2] + ".py") in text
    for option in ["--dry-run", "--force", "--threads", "--no-checksums", *own]:
        assert option in text


@pytest.mark.parametrize(
    "arguments", [[], ["in"], ["in", "out", "--tp-size", "2"], ["in", "out", "--dry"]]
)
def test_wrong_arguments_are_refused(capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        hf_to_megatron.main(arguments)
    assert "usage: hf_to_megatron.py" in capsys.readouterr().err


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
