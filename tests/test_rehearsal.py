"""The rehearsal's task, its tokenizer, and the reward at which its warm start ends."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanoslime import rehearsal
from nanoslime.config.model import RehearsalConfig
from nanoslime.models.shape import ModelShape
from nanoslime.models.tiny import EOS, VOCAB_SIZE, digit_problems
from nanoslime.rehearsal import RehearsalFiles
from nanoslime.types import RunError

BARELY = 1e-10  # a target that a few steps reach: the files matter, not the model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run") / "model"


@pytest.fixture(scope="module")
def made(directory: Path) -> RehearsalFiles:
    return rehearsal.make(directory, RehearsalConfig(seed=3))


def rows(path: Path) -> list[tuple[str, str]]:
    return [(row["prompt"], row["label"]) for row in map(json.loads, path.read_text().splitlines())]


@pytest.mark.parametrize("task", ["reverse", "sort"])
def test_every_problem_is_there_once_with_its_right_answer(task: str):
    train, held_out = digit_problems(task, 0, 400)
    assert (len(train), len(held_out)) == (9600, 400)
    assert sorted(prompt for prompt, _ in train + held_out) == [f"{n:04d}=" for n in range(10_000)]
    for prompt, label in train + held_out:
        a, b, c, d, _ = prompt
        if task == "reverse":
            assert label == d + c + b + a
        else:
            assert all(label.count(x) == prompt.count(x) for x in "0123456789")
            assert label[0] <= label[1] <= label[2] <= label[3]


def test_problems_follow_the_seed():
    assert digit_problems("reverse", 1, 400) == digit_problems("reverse", 1, 400)
    held_out = {prompt for prompt, _ in digit_problems("reverse", 1, 400)[1]}
    assert held_out != {prompt for prompt, _ in digit_problems("reverse", 2, 400)[1]}


def test_an_unknown_task_and_a_bad_split_are_refused():
    with pytest.raises(
        ValueError, match="rehearsal.task='add' is not known; choose reverse or sort"
    ):
        digit_problems("add", 0, 400)
    with pytest.raises(ValueError, match="num_held_out=5001; choose 1 to 5000 of 10000"):
        digit_problems("reverse", 0, 5001)


def test_the_files_hold_the_problems(made: RehearsalFiles):
    train, held_out = digit_problems("reverse", 3, 400)
    assert rows(made.train) == train and rows(made.held_out) == held_out


def test_any_text_survives_the_saved_tokenizer_and_a_digit_is_one_token(made: RehearsalFiles):
    tokenizer = AutoTokenizer.from_pretrained(made.model)
    for text in ("4271=", " two  spaces\n", "Zürich → 数"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer("4271=")["input_ids"]
    assert len(ids) == 5 and max(ids) < VOCAB_SIZE
    assert tokenizer.decode([*ids, EOS], skip_special_tokens=True) == "4271="
    assert tokenizer.eos_token_id == EOS


def test_the_checkpoint_has_the_shape_that_is_known_without_it(made: RehearsalFiles):
    shape = ModelShape.read(made.model)
    assert shape == ModelShape.from_config(rehearsal.tiny_qwen3_config())
    tensors = load_file(made.model / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == shape.num_parameters
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    # A token whose embedding is 0 has a gradient a thousand times that of the others.
    norms = tensors["model.embed_tokens.weight"].norm(dim=1)
    assert norms.min() > norms.median() / 2
    for name in ("config.json", "generation_config.json"):
        assert json.loads((made.model / name).read_text())["eos_token_id"] == EOS


def test_samples_of_the_saved_model_are_right_as_often_as_the_warm_start_says(made: RehearsalFiles):
    """By transformers' own generate on held-out problems: 1,600 samples, standard error 0.012."""
    model = AutoModelForCausalLM.from_pretrained(made.model)
    tokenizer = AutoTokenizer.from_pretrained(made.model)
    problems = rows(made.held_out)
    prompts = torch.tensor(tokenizer([prompt for prompt, _ in problems])["input_ids"]).repeat(4, 1)
    torch.manual_seed(0)
    output = model.generate(
        prompts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=8
    )
    texts = tokenizer.batch_decode(output[:, prompts.shape[1] :], skip_special_tokens=True)
    labels = [label for _, label in problems] * 4
    reward = sum(text == label for text, label in zip(texts, labels, strict=True)) / len(labels)
    said = json.loads((made.model.parent / "rehearsal.json").read_text())["warm_start"]["reward"]
    assert said == pytest.approx(0.43, abs=0.03)
    assert reward == pytest.approx(said, abs=0.06)


def test_a_second_call_takes_what_is_there(made: RehearsalFiles, directory: Path):
    before = (made.model / "model.safetensors").stat().st_mtime_ns
    assert rehearsal.make(directory, RehearsalConfig(seed=3)) == made
    assert (made.model / "model.safetensors").stat().st_mtime_ns == before


def test_the_same_seed_makes_the_same_model_and_other_knobs_make_another(tmp_path: Path):
    made_with = [("first", 0), ("second", 1), ("second", 0)]
    weights = []
    for name, seed in made_with:
        torch.rand(1)  # the process's own random numbers have no say
        files = rehearsal.make(tmp_path / name, RehearsalConfig(seed=seed, target_reward=BARELY))
        weights.append((files.model / "model.safetensors").read_bytes())
    assert weights[0] == weights[2] != weights[1]


def test_an_interrupted_make_leaves_nothing_that_looks_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_rows = rehearsal._write_rows

    def interrupted(path: Path, problems: list) -> None:
        write_rows(path, problems[:10])
        raise KeyboardInterrupt

    target = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(rehearsal, "_write_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rehearsal.make(target, RehearsalConfig(target_reward=BARELY))
    assert not target.exists()
    files = rehearsal.make(target, RehearsalConfig(target_reward=BARELY))
    assert len(rows(files.train)) == 9600
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_warm_start_that_cannot_reach_its_target_says_so(tmp_path: Path):
    with pytest.raises(RunError, match=r"after \d+ steps, 0\.2 s, not rehearsal.target_reward=0.4"):
        rehearsal.make(tmp_path / "model", RehearsalConfig(), deadline_s=0.2)
    assert not any(tmp_path.iterdir())
