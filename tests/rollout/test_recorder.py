"""What is recorded comes back as it was, bit for bit, or not at all."""

import json
from dataclasses import fields

import numpy as np
import pytest

from nanoslime.rollout import recorder
from nanoslime.types import RunError, Sample, SampleGroup, Status


def groups() -> list[SampleGroup]:
    """Unequal groups and lengths, a fan-out, an error, hostile text, and floats that text would round."""
    rng = np.random.default_rng(0)

    def sample(group_id: int, rollout_id: int, length: int, **more) -> Sample:
        mask = np.arange(length) >= length // 2
        logprobs = np.where(mask, rng.normal(size=length) * 10.0 ** rng.integers(-40, 3, length), 0)
        known = dict(
            group_id=group_id,
            rollout_id=rollout_id,
            token_ids=rng.integers(0, 2**31, length, np.int32),
            loss_mask=mask,
            rollout_logprobs=logprobs.astype(np.float32),
            policy_versions=[(1, 3), (2, 4)],
            status=Status.COMPLETED,
            text="line\nand\u2028separator\r\x85 é\N{GRINNING FACE}",
            label=["4", 2],
            metadata={"prompt_id": 7, "source": {"a": [1.5, None]}},
            reward=0.1 + 0.2,
            advantage=-1 / 3,
        )
        return Sample(**known | more)

    experts = rng.integers(0, 256, (6, 3, 2)).astype(np.uint8)
    failed = dict(
        status=Status.ERROR, error="engine-0: too long", reward=None, advantage=None, text=""
    )
    return [
        SampleGroup(5, [sample(5, 10, 7, routed_experts=experts), sample(5, 11, 2)]),
        SampleGroup(
            6, [sample(6, 12, 9, routed_experts=experts[:3]), sample(6, 12, 4), sample(6, 13, 1)]
        ),
        SampleGroup(9, [sample(9, 20, 3, **failed)]),
    ]


def test_what_is_loaded_is_what_was_recorded(tmp_path):
    recorder.record(tmp_path / "rollouts", 3, groups(), temperature=0.7, max_new_tokens=4)
    loaded = recorder.load(tmp_path / "rollouts", 3, temperature=0.7)
    assert [g.group_id for g in loaded] == [5, 6, 9]
    for mine, theirs in zip(groups(), loaded, strict=True):
        for a, b in zip(mine.samples, theirs.samples, strict=True):
            for name in (f.name for f in fields(Sample)):
                x, y = getattr(a, name), getattr(b, name)
                if isinstance(x, np.ndarray):
                    assert (
                        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
                    ), name
                else:
                    assert x == y and type(x) is type(y), name


def test_people_read_a_line_per_sample(tmp_path):
    recorder.record(tmp_path, 0, groups())
    lines = [json.loads(line) for line in (tmp_path / "step_0.jsonl").read_bytes().splitlines()]
    assert [(line["group"], line["rollout"]) for line in lines] == [
        (5, 10),
        (5, 11),
        (6, 12),
        (6, 12),
        (6, 13),
        (9, 20),
    ]
    assert lines[0]["tokens"] == [7, 4] and lines[5]["error"] == "engine-0: too long"


def test_other_settings_than_those_asked_for_are_refused_with_both_values(tmp_path):
    recorder.record(tmp_path, 0, groups(), temperature=0.7, max_new_tokens=4)
    with pytest.raises(
        RunError, match=r"step_0\.npz has samples of rollout\.temperature=0\.7, not 1\.0"
    ):
        recorder.load(tmp_path, 0, temperature=1.0, max_new_tokens=4)
    with pytest.raises(RunError, match=r"rollout\.max_new_tokens=4, not 5"):
        recorder.load(tmp_path, 0, temperature=0.7, max_new_tokens=5)


def test_a_rollout_without_samples_is_one(tmp_path):
    recorder.record(tmp_path, 0, [])
    assert recorder.load(tmp_path, 0) == []


def test_float32_and_token_ids_take_their_own_bytes_only(tmp_path):
    long = [SampleGroup(0, [s for g in groups() for s in g.samples][:1])]
    sample = long[0].samples[0]
    sample.token_ids, sample.loss_mask = np.zeros(50_000, np.int32), np.ones(50_000, bool)
    sample.rollout_logprobs = np.full(50_000, -1 / 3, np.float32)
    recorder.record(tmp_path, 0, long)
    assert (tmp_path / "step_0.npz").stat().st_size < 50_000 * 9 + 3_000


@pytest.mark.parametrize(
    "damage", ["missing", "truncated", "a flipped byte", "no zip", "method", "locked"]
)
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
    recorder.record(tmp_path, 0, groups())
    path = tmp_path / "step_0.npz"
    data = bytearray(path.read_bytes())
    place, change = data.index(groups()[0].samples[0].token_ids.tobytes()), 1
    entry = data.index(b"PK\x01\x02")  # of the directory at the end
    if damage == "method":  # of compression, one that does not exist
        place, change = entry + 10, 77
    elif damage == "locked":  # said to be encrypted
        place, change = entry + 8, 1
    data[place] ^= change
    whole = {"missing": None, "truncated": data[:-100], "no zip": b"{}"}
    damaged = whole.get(damage, data)
    path.unlink() if damaged is None else path.write_bytes(damaged)
    with pytest.raises(RunError, match=r"step_0\.npz is not a recorded rollout"):
        recorder.load(tmp_path, 0)
