"""A recorded rollout comes back as it was, bit for bit, or not at all."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoslime.rollout import recorder
from nanoslime.rollout.tasks import Sampling
from nanoslime.types import RunError, Sample, SampleGroup, Status
from tools.watch.recorded import read_samples

SETTINGS = Sampling(n_samples_per_prompt=2, max_new_tokens=4, temperature=0.7)


def recording(directory: Path, **changes: Any) -> recorder.Recording:
    return recorder.Recording(directory, SETTINGS, **changes)


def record(directory: Path, step: int, groups: list[SampleGroup], **changes: Any) -> None:
    recorder.record(recording(directory, **changes), step, groups)


def make_sample(rng: np.random.Generator, group_id: int, rollout_id: int, length: int) -> Sample:
    """Hostile text, and floats that text would round."""
    mask = np.arange(length) >= length // 2
    logprobs = rng.normal(size=length) * 10.0 ** rng.integers(-40, 3, length)
    return Sample(
        group_id=group_id,
        rollout_id=rollout_id,
        token_ids=rng.integers(0, 2**31, length, np.int32),
        loss_mask=mask,
        rollout_logprobs=np.where(mask, logprobs, 0).astype(np.float32),
        policy_versions=[(1, 3), (2, 4)],
        status=Status.COMPLETED,
        text="line\nand\u2028separator\r\x85 é\N{GRINNING FACE}",
        label=["4", 2],
        metadata={"prompt_id": 7, "source": {"a": [1.5, None]}},
        reward=0.1 + 0.2,
        advantage=-1 / 3,
    )


def make_groups() -> list[SampleGroup]:
    """Unequal groups and lengths, two samples of one rollout, experts of some, an error."""
    rng = np.random.default_rng(0)
    experts = rng.integers(0, 256, (6, 3, 2)).astype(np.uint8)
    first = [
        replace(make_sample(rng, 5, 10, 7), routed_experts=experts),
        make_sample(rng, 5, 11, 2),
    ]
    second = [
        replace(make_sample(rng, 6, 12, 9), routed_experts=experts[:3]),
        make_sample(rng, 6, 12, 4),
        make_sample(rng, 6, 13, 1),
    ]
    failed = replace(
        make_sample(rng, 9, 20, 3),
        status=Status.ERROR,
        error="engine-0: too long",
        reward=None,
        advantage=None,
        text="",
    )
    return [SampleGroup(5, first), SampleGroup(6, second), SampleGroup(9, [failed])]


def assert_equal(mine: Sample, theirs: Sample) -> None:
    for name in (field.name for field in fields(Sample)):
        left = getattr(mine, name)
        right = getattr(theirs, name)
        assert type(left) is type(right), name
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype, name
            assert left.shape == right.shape, name
            assert left.tobytes() == right.tobytes(), name
        else:
            assert left == right, name


def test_the_loaded_groups_are_the_recorded_ones(tmp_path: Path) -> None:
    record(tmp_path / "rollouts", 3, make_groups())
    loaded = recorder.load(tmp_path / "rollouts", 3, temperature=0.7)
    assert [group.group_id for group in loaded] == [5, 6, 9]
    for mine, theirs in zip(make_groups(), loaded, strict=True):
        for left, right in zip(mine.samples, theirs.samples, strict=True):
            assert_equal(left, right)


def test_people_read_a_line_per_sample(tmp_path: Path) -> None:
    record(tmp_path, 0, make_groups())
    lines = [json.loads(line) for line in (tmp_path / "step_0-0.jsonl").read_bytes().splitlines()]
    assert [line["group"] for line in lines] == [5, 5, 6, 6, 6, 9]
    assert [line["rollout"] for line in lines] == [10, 11, 12, 12, 13, 20]
    assert lines[0]["tokens"] == [7, 4]
    assert lines[5]["error"] == "engine-0: too long"


def test_other_settings_than_those_asked_for_are_refused_with_both_values(tmp_path: Path) -> None:
    record(tmp_path, 0, make_groups())
    message = r"step_0-0\.npz has samples of rollout\.temperature=0\.7, not 1\.0"
    with pytest.raises(RunError, match=message):
        recorder.load(tmp_path, 0, temperature=1.0, max_new_tokens=4)
    with pytest.raises(RunError, match=r"rollout\.max_new_tokens=4, not 5"):
        recorder.load(tmp_path, 0, temperature=0.7, max_new_tokens=5)


def test_a_rollout_without_samples_is_one(tmp_path: Path) -> None:
    record(tmp_path, 0, [])
    assert recorder.load(tmp_path, 0) == []


def test_float32_and_token_ids_take_their_own_bytes_only(tmp_path: Path) -> None:
    sample = make_groups()[0].samples[0]
    sample.token_ids = np.zeros(50_000, np.int32)
    sample.loss_mask = np.ones(50_000, bool)
    sample.rollout_logprobs = np.full(50_000, -1 / 3, np.float32)
    record(tmp_path, 0, [SampleGroup(0, [sample])])
    assert (tmp_path / "step_0-0.npz").stat().st_size < 50_000 * 9 + 3_000


def flip_a_byte_of_an_array(data: bytearray) -> None:
    place = data.index(make_groups()[0].samples[0].token_ids.tobytes())
    data[place] ^= 1


def name_a_compression_that_does_not_exist(data: bytearray) -> None:
    data[directory_entry(data) + 10] ^= 77


def say_it_is_encrypted(data: bytearray) -> None:
    data[directory_entry(data) + 8] ^= 1


def directory_entry(data: bytearray) -> int:
    """Where the first entry of the zip file's directory begins, at its end."""
    return data.index(b"PK\x01\x02")


def cut_the_end(data: bytearray) -> None:
    del data[-100:]


def write_something_else(data: bytearray) -> None:
    data[:] = b"{}"


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_byte_of_an_array,
        name_a_compression_that_does_not_exist,
        say_it_is_encrypted,
        cut_the_end,
        write_something_else,
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, damage) -> None:
    record(tmp_path, 0, make_groups())
    path = tmp_path / "step_0-0.npz"
    data = bytearray(path.read_bytes())
    damage(data)
    path.write_bytes(data)
    with pytest.raises(RunError, match=r"step_0-0\.npz is not a recorded rollout"):
        recorder.load(tmp_path, 0)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    record(tmp_path, 0, make_groups())
    (tmp_path / "step_0-0.npz").unlink()
    with pytest.raises(RunError, match=r"step_0-0\.npz is not a recorded rollout"):
        recorder.load(tmp_path, 0)


def test_a_line_by_hand(tmp_path: Path) -> None:
    sample = Sample(
        group_id=0,
        rollout_id=1,
        token_ids=np.zeros(4, np.int32),
        loss_mask=np.array([False, False, True, True]),
        rollout_logprobs=np.zeros(4, np.float32),
        policy_versions=[(2, 0)],
        status=Status.TRUNCATED,
        text="é",
        metadata={"prompt_id": 3},
        reward=0.0,
    )
    record(tmp_path / "rollouts", 3, [SampleGroup(0, [sample])])
    written = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert written == ["step_3-0.jsonl", "step_3-0.npz"]
    text = (tmp_path / "rollouts" / "step_3-0.jsonl").read_text()
    assert "é" in text
    assert json.loads(text) == {
        "group": 0,
        "rollout": 1,
        "prompt": 3,
        "text": "é",
        "label": None,
        "reward": 0.0,
        "reward_parts": {},
        "advantage": None,
        "tokens": [4, 2],
        "experts": None,
        "status": "truncated",
        "error": None,
        "versions": [[2, 0]],
        "metadata": {"prompt_id": 3},
    }


def test_a_line_has_no_nan_that_json_cannot_read(tmp_path: Path) -> None:
    (group, *_) = make_groups()
    sample = replace(group.samples[0], metadata={"score": float("nan")})
    record(tmp_path, 0, [SampleGroup(5, [sample])])
    (line,) = (tmp_path / "step_0-0.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert json.loads(line)["metadata"] == {"score": None}


def test_the_files_of_all_workers_are_one_rollout(tmp_path: Path) -> None:
    first, second, third = make_groups()
    parts = [[first, third], [], [second]]
    for worker, groups in enumerate(parts):
        record(tmp_path, 0, groups, worker=worker, num_workers=3)
    loaded = recorder.load(tmp_path, 0)
    assert [group.group_id for group in loaded] == [5, 6, 9]
    assert [len(group.samples) for group in loaded] == [2, 3, 1]
    (tmp_path / "step_0-1.npz").unlink()
    with pytest.raises(RunError, match=r"step_0-1\.npz is not a recorded rollout"):
        recorder.load(tmp_path, 0)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("none", []), ("text", ["step_4-0.jsonl"]), ("full", ["step_4-0.jsonl", "step_4-0.npz"])],
)
def test_what_is_kept_is_a_choice(tmp_path: Path, mode: Any, expected: list[str]) -> None:
    made = recorder.Recorder(recording(tmp_path, mode=mode))
    made.record(4, make_groups())
    made.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == expected


def test_the_last_rollouts_are_kept_and_other_workers_files_left_alone(tmp_path: Path) -> None:
    for step in range(3):
        record(tmp_path, step, [], worker=1, num_workers=2)
    for step in range(12):
        record(tmp_path, step, [], num_workers=2, keep=2)
    left = {path.name for path in tmp_path.glob("*.npz")}
    assert left == {f"step_{step}-0.npz" for step in (10, 11)} | {
        f"step_{step}-1.npz" for step in range(3)
    }
    assert len(list(tmp_path.glob("*.jsonl"))) == 5


def test_nothing_is_left_of_a_rollout_that_an_earlier_start_recorded(tmp_path: Path) -> None:
    """It had more workers, and recorded more; its other rollouts stay, until they are too old."""
    for step in (3, 4):
        for worker in range(5):
            record(tmp_path, step, make_groups(), worker=worker, num_workers=5)
    for worker in range(2):
        record(tmp_path, 4, make_groups(), mode="text", worker=worker, num_workers=2)
    left = {path.name for path in tmp_path.glob("step_4-*")}
    assert left == {"step_4-0.jsonl", "step_4-1.jsonl"}
    assert len(list(tmp_path.glob("step_3-*"))) == 10
    assert len(read_samples(tmp_path, 4)) == 2 * 6
    for worker in range(2):
        record(tmp_path, 5, [], worker=worker, num_workers=2, keep=2)
    assert not list(tmp_path.glob("step_3-*"))


def test_what_cannot_be_recorded_is_told_at_the_next_call(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    made = recorder.Recorder(recording(tmp_path / "file"))
    made.record(0, [])
    made.close()
    with pytest.raises(RunError, match="could not be recorded in .*file: .*File exists"):
        made.record(1, [])


def test_a_recording_on_a_full_disk_leaves_no_part_of_a_file(small_disk: Path) -> None:
    sample = make_groups()[0].samples[0]
    sample.routed_experts = np.zeros((20_000, 48, 8), np.uint8)
    with pytest.raises(OSError, match="No space left"):
        record(small_disk, 0, [SampleGroup(0, [sample])])
    assert not list(small_disk.glob("*partial*")) + list(small_disk.glob("*.npz"))
