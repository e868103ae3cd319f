"""The samples of a run as a person sees them in a terminal."""

import io
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from jobs.checkout import ROOT
from nanoslime.config import ModelConfig, RunConfig
from nanoslime.config.load import dump
from nanoslime.rollout import recorder
from nanoslime.rollout.tasks import Sampling
from nanoslime.run_dir import RunDir
from nanoslime.storage.token_gaps import gaps_file, write_gaps
from nanoslime.types import Sample, SampleGroup, Status
from tests.serving import save_byte_tokenizer
from tools.watch import commands
from tools.watch.recorded import read_samples

SETTINGS = Sampling(2, 8, 1.0)
PROMPT = "2+2="
HOSTILE = 'a\x1b[2J\x07\r b"é\N{GRINNING FACE}\nend'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token for each byte."""
    path = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(path)
    return path


def sample(tokenizer: Path, rollout_id: int, text: str, reward: float | None) -> Sample:
    encode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode
    prompt, response = (encode(part).ids for part in (PROMPT, text))
    num_tokens = len(prompt) + len(response)
    return Sample(
        group_id=rollout_id // 2,
        rollout_id=rollout_id,
        token_ids=np.array(prompt + response, np.int32),
        loss_mask=np.arange(num_tokens) >= len(prompt),
        rollout_logprobs=np.zeros(num_tokens, np.float32),
        policy_versions=[(len(prompt), 3), (len(prompt) + 1, 4)],
        status=Status.COMPLETED,
        text=text,
        label="4",
        metadata={"prompt_id": 17},
        reward=reward,
    )


@pytest.fixture
def run(tmp_path: Path, tokenizer: Path) -> RunDir:
    """Rollouts 0 and 1 by two workers; sample 0 of rollout 1 has gaps."""
    run = RunDir.create(tmp_path, "run")
    config = RunConfig(model=ModelConfig(hf_checkpoint=str(tokenizer)))
    run.config.write_text(dump(config))
    good, bad = sample(tokenizer, 0, "so 4", 1.0), sample(tokenizer, 1, HOSTILE, 0.25)
    failed = replace(
        sample(tokenizer, 2, "", None), status=Status.ERROR, error="the engine said\nno"
    )
    cut = replace(sample(tokenizer, 3, "five", 0.5), status=Status.TRUNCATED)
    for step in (0, 1):
        for worker, members in enumerate([[good, bad], [failed, cut]]):
            group = SampleGroup(members[0].group_id, members)
            recording = recorder.Recording(run.rollouts, SETTINGS, worker=worker, num_workers=2)
            recorder.record(recording, step, [group])
    gaps = np.full(good.num_tokens, np.nan)
    gaps[4:] = [0.0005, -0.02, 0.0, 2.0]
    write_gaps(gaps_file(run.rollouts, 1, 0), [(good.token_ids, gaps)])
    return run


def shown(run: RunDir, *flags: str) -> str:
    """What the command prints; it has to succeed."""
    out = io.StringIO()
    with redirect_stdout(out):
        assert commands.main(["samples", str(run.path), *flags]) == 0
    return out.getvalue().removesuffix("\n")


def rollouts(text: str) -> list[str]:
    """The rollout ids of the samples that are shown, in order."""
    words = text.split()
    return [words[i + 1] for i, word in enumerate(words) if word == "rollout"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "2 1 3 0"),
        (["--worst", "2"], "2 1"),
        (["--best", "2"], "0 3"),
        (["--group", "0"], "1 0"),
        (["--group", "1", "--best", "1"], "3"),
        (["--worst", "0"], ""),
        (["--status", "error"], "2"),
        (["--status", "completed", "--worst", "1"], "1"),
        (["--step", "0", "--worst", "1"], "2"),
    ],
)
def test_samples_are_chosen_and_sorted_by_reward(run, flags, expected):
    assert rollouts(shown(run, *flags)) == expected.split()


def test_a_number_below_zero_is_refused(run, capsys):
    with pytest.raises(SystemExit):
        commands.main(["samples", str(run.path), "--best", "-1"])
    assert "-1 samples cannot be shown; give 0 or more" in capsys.readouterr().err


def test_whoever_stops_to_read_hears_nothing(run):
    command = shlex.join([sys.executable, "jobs/runs.py", "samples", str(run.path)])
    pipe = f"for i in 1 2 3; do {command}; done | head -n 1"
    done = subprocess.run(pipe, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_of_equal_rewards_the_larger_gap_is_the_worse(run, tokenizer):
    worker = recorder.Recording(run.rollouts, SETTINGS)
    members = [sample(tokenizer, i, text, 0.0) for i, text in enumerate(["a", "b", "c"])]
    recorder.record(worker, 5, [SampleGroup(0, members)])
    gaps = [np.array([np.nan] * 4 + [gap]) for gap in (0.0, -0.5, 0.1)]
    tokens = [member.token_ids for member in members]
    write_gaps(gaps_file(run.rollouts, 5, 0), list(zip(tokens, gaps, strict=True)))
    assert rollouts(shown(run)) == ["1", "2", "0"]


def test_a_sample_is_told_with_all_that_is_known_of_it(run):
    text = shown(run, "--best", "1")
    assert "reward 1.0  completed  group 0  rollout 0  prompt 17  policy versions [3, 4]" in text
    assert 'label "4"' in text and "4 + 4 tokens" in text
    assert "gap   0.51 on average, 2 at most" in text
    assert text.endswith("── prompt\n2+2=\n── response\nso 4")


def test_each_token_has_the_colour_of_its_gap(run):
    text = shown(run, "--best", "1", "--color")
    assert text.endswith("── response\ns\x1b[30;48;5;220mo\x1b[0m \x1b[30;48;5;196m4\x1b[0m")


def test_an_error_is_told(run):
    text = shown(run, "--status", "error")
    assert "reward None  error" in text and "error the engine said\nno" in text


@pytest.mark.parametrize("color", ["--color", "--no-color"])
def test_no_sample_speaks_to_the_terminal(run, color):
    text = shown(run, "--group", "0", "--worst", "1", color)
    assert 'a\\x1b[2J\\x07\\r b"é\N{GRINNING FACE}\nend' in text
    assert "\x1b[2J" not in text and "\x07" not in text and "\r" not in text


def test_a_coloured_token_does_not_speak_to_the_terminal_either(run, tokenizer):
    one = sample(tokenizer, 0, "\x07", 1.0)
    recorder.record(recorder.Recording(run.rollouts, SETTINGS), 6, [SampleGroup(0, [one])])
    write_gaps(gaps_file(run.rollouts, 6, 0), [(one.token_ids, np.array([np.nan] * 4 + [5.0]))])
    assert shown(run, "--color").endswith("\x1b[30;48;5;196m\\x07\x1b[0m")


def test_a_character_of_several_tokens_has_the_largest_of_their_gaps(run, tokenizer):
    one = sample(tokenizer, 0, "\N{GRINNING FACE}!\n", 1.0)
    recorder.record(recorder.Recording(run.rollouts, SETTINGS), 6, [SampleGroup(0, [one])])
    gaps = np.array([np.nan] * 4 + [0.0, 5.0, 0.0, 0.0, 0.0, 0.05])
    write_gaps(gaps_file(run.rollouts, 6, 0), [(one.token_ids, gaps)])
    text = shown(run, "--color")
    background = "\x1b[30;48;5;220m"
    expected = (
        f"\x1b[30;48;5;196m\N{GRINNING FACE}\x1b[0m!{background}↵\x1b[0m\n{background}\x1b[0m"
    )
    assert text.endswith(expected)


def test_a_response_that_ends_within_a_character_is_shown(run, tokenizer):
    one = sample(tokenizer, 0, "\N{GRINNING FACE}", 1.0)
    cut = replace(one, token_ids=one.token_ids[:-1], loss_mask=one.loss_mask[:-1])
    recorder.record(recorder.Recording(run.rollouts, SETTINGS), 6, [SampleGroup(0, [cut])])
    assert shown(run).endswith("── response\n\ufffd")


def test_what_the_policy_was_told_is_apart_from_what_it_said(run, tokenizer):
    one = sample(tokenizer, 0, "ask[tool]so", 1.0)
    one.loss_mask[7:13] = False
    recorder.record(recorder.Recording(run.rollouts, SETTINGS), 6, [SampleGroup(0, [one])])
    assert shown(run).endswith(
        "── prompt\n2+2=\n── response\nask\n── observed\n[tool]\n── response\nso"
    )


def test_texts_alone_are_shown_without_tokens(run, tokenizer):
    only_text = recorder.Recording(run.rollouts, SETTINGS, mode="text")
    recorder.record(only_text, 6, [SampleGroup(0, [sample(tokenizer, 0, "so 4", 1.0)])])
    text = shown(run, "--color")
    assert "gap   unknown" in text and text.endswith("\nso 4")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--step", "9"], "has no samples of step 9; it has those of: 0 to 1"),
        (["--status", "aborted"], "none of the 4 samples of step 1 is of this choice"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(run, flags, says, capsys):
    assert commands.main(["samples", str(run.path), *flags]) == 1
    told = capsys.readouterr()
    assert says in told.err and told.err.count("\n") == 1 and not told.out


def test_a_directory_of_no_run_and_a_damaged_recording_are_named(run, tmp_path, capsys):
    assert commands.main(["samples", str(tmp_path)]) == 1
    assert "is not a run directory" in capsys.readouterr().err
    (run.rollouts / "step_1-0.jsonl").write_text('{"group": 1')
    assert commands.main(["samples", str(run.path)]) == 1
    assert "step_1-0.jsonl is not a recorded rollout: JSONDecodeError" in capsys.readouterr().err


def test_equal_sequences_share_their_gaps_and_others_have_none(run):
    good, bad, *_ = read_samples(run.rollouts, 1)
    assert good.gaps.tolist()[4:] == pytest.approx([0.0005, -0.02, 0.0, 2.0], rel=1e-3)
    assert bad.gaps is None
    assert read_samples(run.rollouts, 0)[0].gaps is None
