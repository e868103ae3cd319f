"""A reward that rises also rises with subtly wrong maths: one-line faults, each noticed by a test.

Every fault is put into a copy of the checkout, where the named test then has to fail. Without
the fault the test passes. The tests named run without a server wherever the fault can be seen
there.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.matrix, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    old: str
    new: str
    test: str


FAULTS = [
    Fault(
        "advantages shuffled across groups",
        "nanoslime/algorithms/policy_gradient.py",
        "sample.advantage = found[sample.group_id, sample.rollout_id]",
        "keys = sorted(found)\n"
        "            own = keys.index((sample.group_id, sample.rollout_id))\n"
        "            sample.advantage = found[keys[~own]]",
        "tests/algorithms/test_rewards.py",
    ),
    Fault(
        "k3 with the wrong sign",
        "nanoslime/algorithms/kl.py",
        "d = (ref_logprobs - logprobs).clamp",
        "d = (logprobs - ref_logprobs).clamp",
        "tests/algorithms/test_kl.py",
    ),
    Fault(
        "weights stale by one version",
        "nanoslime/weight_sync/assemble.py",
        "        return list(self._shards())\n",
        "        now = [WeightShard(s.name, s.full_shape, s.slices, s.tensor.clone())\n"
        "               for s in self._shards()]\n"
        "        late, self._late = getattr(self, '_late', now), now\n"
        "        return late\n",
        "tests/orchestration/test_weight_sync.py -k broadcast_from_megatron",
    ),
    Fault(
        "mask shifted by one",
        "nanoslime/rollout/generate.py",
        "loss_mask=np.arange(num_prompt + num_response) >= num_prompt",
        "loss_mask=np.arange(num_prompt + num_response) > num_prompt",
        "tests/rollout/test_generate.py",
    ),
    Fault(
        "temperature dropped from the trainer's logprobs",
        "nanoslime/training/logprobs.py",
        "scale=1.0 / temperature,",
        "scale=1.0,",
        "tests/training/test_logprobs.py",
    ),
    Fault(
        "a TP rank's part not synced",
        "nanoslime/weight_sync/assemble.py",
        "                dist.recv(part, src=source.rank)\n"
        "                full[source.box] = part\n",
        "                dist.recv(part, src=source.rank)\n",
        "tests/weight_sync/test_assemble.py",
    ),
    Fault(
        "old logprobs taken after the step",
        "nanoslime/orchestration/worker.py",
        "        steps = [self.backend.train_step(batch, self.algorithm) for batch in batches]\n",
        "        steps = []\n"
        "        for batch in batches:\n"
        "            batch.old_logprobs = self.backend.logprobs(batch, 'policy')\n"
        "            steps.append(self.backend.train_step(batch, self.algorithm))\n",
        "tests/orchestration/test_loop.py -k old_logprobs",
    ),
    Fault(
        "padded vocabulary in the softmax",
        "nanoslime/training/logprobs.py",
        "num_columns = min(max(vocab_size - vocab_start, 0), len(weight))",
        "num_columns = len(weight)",
        "tests/training/test_logprobs.py",
    ),
    Fault(
        "gradients summed instead of averaged over DP",
        "nanoslime/training/batching.py",
        "denominator=float(denominator),",
        "denominator=float(denominator / options.dp_size),",
        "tests/training/test_batching.py",
    ),
    Fault(
        "prompt tokens in the loss",
        "nanoslime/rollout/generate.py",
        "loss_mask=np.arange(num_prompt + num_response) >= num_prompt",
        "loss_mask=np.arange(num_prompt + num_response) >= 1",
        "tests/rollout/test_generate.py",
    ),
    Fault(
        "an answer inside of an unfinished thought pays",
        "nanoslime/rollout/rewards/thoughts.py",
        "    if _OPEN in answer:\n        return None\n",
        "",
        "tests/rollout/test_math_answer.py -k thoughts",
    ),
    Fault(
        "the reward takes every sample for a completed one",
        "nanoslime/rollout/rewards/__init__.py",
        '"status": sample.status',
        '"status": "completed"',
        "tests/rollout/test_rewards.py",
    ),
    Fault(
        "numbers near zero are all alike",
        "nanoslime/rollout/rewards/math_judge_program.py",
        "return not _differ_near_zero(wanted[0], given[0])",
        "return True",
        "tests/rollout/test_math_answer.py -k right_answers",
    ),
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("sabotage") / "checkout"
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True)
    for name in listed.splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    return copy


def run_test(checkout: Path, test: str) -> subprocess.CompletedProcess[str]:
    quietly = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore"]
    command = [sys.executable, "-m", "pytest", *quietly, *test.split()]
    env = os.environ | {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        command, cwd=checkout, capture_output=True, text=True, timeout=580, env=env
    )


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_a_fault_turns_its_test_red(checkout, fault):
    file = checkout / fault.file
    sound = file.read_text()
    count = sound.count(fault.old)
    assert count == 1, f"{fault.old!r} stands {count} times in {fault.file}"
    try:
        file.write_text(sound.replace(fault.old, fault.new))
        done = run_test(checkout, fault.test)
    finally:
        file.write_text(sound)
    output = done.stdout[-3000:] + done.stderr[-1000:]
    assert done.returncode == 1, output
    assert " failed" in done.stdout, output


@pytest.mark.parametrize("test", sorted({f.test for f in FAULTS}))
def test_without_faults_they_pass(checkout, test):
    done = run_test(checkout, test)
    assert done.returncode == 0, done.stdout[-3000:]
