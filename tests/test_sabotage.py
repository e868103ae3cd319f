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
pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    old: str
    new: str
    test: str


WRITTEN_OUT = "tests/orchestration/test_written_out.py -k fsdp"
WIRING = "tests/orchestration/test_wiring.py"
BATCHES = "tests/orchestration/test_groups.py"
VERSIONS = "tests/orchestration/test_rollout_manager.py -k version"
SYNC = "tests/weight_sync/test_session.py"

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
        "nanoslime/weight_sync/broadcast.py",
        "        update = _Update(version, compares, list(self._weights.shards()))\n",
        "        now = [WeightShard(s.name, s.full_shape, s.slices, s.tensor.clone())\n"
        "               for s in self._weights.shards()]\n"
        "        late, self._late = getattr(self, '_late', now), now\n"
        "        update = _Update(version, compares, late)\n",
        "tests/orchestration/test_weight_sync.py -k broadcast_from_megatron",
    ),
    Fault(
        "mask shifted by one",
        "nanoslime/rollout/sample_builder.py",
        "mask = np.asarray(self._mask[:end], np.bool_)",
        "mask = np.roll(np.asarray(self._mask[:end], np.bool_), 1)",
        "tests/rollout/test_sample_builder.py",
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
        "nanoslime/weight_sync/exchange.py",
        "                places[wanted.number][wanted.box].copy_(values)\n",
        "                pass\n",
        "tests/weight_sync/test_trainer_weights.py",
    ),
    Fault(
        "old logprobs taken after the step",
        "nanoslime/orchestration/worker.py",
        "        steps = "
        "[self.backend.train_step(batch, gaps or self.algorithm) for batch in batches]\n",
        "        steps = []\n"
        "        for batch in batches:\n"
        "            batch.old_logprobs = self.backend.logprobs(batch, 'policy')\n"
        "            steps.append(self.backend.train_step(batch, gaps or self.algorithm))\n",
        "tests/orchestration/test_loop.py -k old_logprobs",
    ),
    Fault(
        "several steps without a pass",
        "nanoslime/config/run.py",
        "        several_steps = self.training.num_steps_per_rollout > 1\n",
        "        several_steps = False\n",
        "tests/orchestration/test_loop.py -k old_logprobs",
    ),
    Fault(
        "truncated samples stay in the denominators",
        "nanoslime/training/batching.py",
        "if options.mask_truncated and sample.status is Status.TRUNCATED:",
        "if False:",
        "tests/training/test_batching.py -k truncated",
    ),
    Fault(
        "a minimum over ranks is not the least",
        "nanoslime/training/metrics.py",
        "_keep_largest(self._negated_minima, name, -metric.value)",
        "_keep_largest(self._negated_minima, name, metric.value)",
        "tests/training/test_metrics.py",
    ),
    Fault(
        "a stale policy taken for the current one",
        "nanoslime/config/run.py",
        "if self.rollout.max_staleness and not algorithm.correction.compares_with_engine:",
        "if False:",
        "tests/config/test_load.py -k old_logprobs",
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
        "nanoslime/rollout/sample_builder.py",
        "self._mask = [False] * len(self.token_ids)",
        "self._mask = [False] + [True] * (len(self.token_ids) - 1)",
        "tests/rollout/test_sample_builder.py",
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
    Fault(
        "reference logprobs by the policy's weights",
        "nanoslime/training/backend.py",
        "torch._foreach_copy_(live, self._reference, non_blocking=True)\n",
        "pass\n",
        WRITTEN_OUT,
    ),
    Fault(
        "the trainer at another temperature than the engine",
        "nanoslime/orchestration/groups.py",
        "temperature=self.config.rollout.temperature,",
        "temperature=1.0,",
        BATCHES,
    ),
    Fault(
        "the denominator is always that of tokens",
        "nanoslime/orchestration/groups.py",
        "denominator=self.config.algorithm.denominator,",
        'denominator="tokens",',
        BATCHES,
    ),
    Fault(
        "the fixed denominator without its length",
        "nanoslime/orchestration/groups.py",
        "            fixed_length=self.config.rollout.max_new_tokens,\n",
        "",
        BATCHES,
    ),
    Fault(
        "an interleaved schedule with any number of micro-batches",
        "nanoslime/orchestration/groups.py",
        "microbatch_multiple=training.pp_size if training.vpp_size > 1 else 1,",
        "microbatch_multiple=1,",
        BATCHES,
    ),
    Fault(
        "evaluation at the temperature of training",
        "nanoslime/orchestration/evaluation.py",
        "temperature = evaluation.temperature if",
        "temperature = rollout.temperature if",
        f"{WIRING} -k temperature",
    ),
    Fault(
        "evaluation with top p of training",
        "nanoslime/orchestration/evaluation.py",
        "top_p=one.top_p if temperature else 1.0",
        "top_p=rollout.top_p if temperature else 1.0",
        f"{WIRING} -k top_p",
    ),
    Fault(
        "evaluation on all prompts",
        "nanoslime/orchestration/evaluation.py",
        "[one.title][: limit or None]",
        "[one.title]",
        WRITTEN_OUT,
    ),
    Fault(
        "evaluation with the seed of training",
        "nanoslime/orchestration/evaluation.py",
        "seed=seed_of(config.eval.seed, 1",
        "seed=seed_of(config.seed, 1",
        f"{WIRING} -k seed",
    ),
    Fault(
        "samples without the seed of the run",
        "nanoslime/orchestration/rollout_manager.py",
        "seed_of(self.config.seed, 0, group_id)",
        "seed_of(0, 0, group_id)",
        f"{WIRING} -k seed",
    ),
    Fault(
        "every rollout with the same seed",
        "nanoslime/orchestration/rollout_manager.py",
        "seed_of(self.config.seed, 0, group_id)",
        "seed_of(self.config.seed, 0, 0)",
        f"{WIRING} -k seed",
    ),
    Fault(
        "prompts in the same order whatever the seed",
        "nanoslime/orchestration/rollout_manager.py",
        "loaded.stream(config.seed, config.data.shuffle)",
        "loaded.stream(0, config.data.shuffle)",
        f"{WIRING} -k seed",
    ),
    Fault(
        "over-long responses are judged by length 0",
        "nanoslime/orchestration/rollout_manager.py",
        "algorithms.make(config.algorithm, config.rollout.max_new_tokens)\n"
        "        self._failures = SampleFailures()\n        self._loaded",
        "algorithms.make(config.algorithm)\n"
        "        self._failures = SampleFailures()\n        self._loaded",
        WRITTEN_OUT,
    ),
    Fault(
        "samples of any version are trained on",
        "nanoslime/orchestration/rollout_manager.py",
        "        self._check_versions(prepared.groups)\n",
        "",
        VERSIONS,
    ),
    Fault(
        "an engine's version is not looked at",
        "nanoslime/weight_sync/session.py",
        '        self._verify(version)\n        self._engines.each("resume")\n',
        '        self._engines.each("resume")\n',
        SYNC,
    ),
    Fault(
        "no engine is asked whether it has loaded what it is sent",
        "nanoslime/weight_sync/session.py",
        '        self._engines.each("agree", self._tensors)\n',
        "",
        f"{SYNC} -k agree",
    ),
    Fault(
        "what engines say of the probe is not looked at",
        "nanoslime/weight_sync/session.py",
        "        self._probed = _over_all([self._probed, metrics])\n"
        "        self._engines.fail(failures)\n",
        "        self._probed = _over_all([self._probed, metrics])\n",
        f"{SYNC} -k beyond",
    ),
    Fault(
        "a resumed run labels its weights 0",
        "nanoslime/train.py",
        "session.weights.sync(start)",
        "session.weights.sync(0)",
        f"{WIRING} -k resumed",
    ),
    Fault(
        "all samples of a prompt share a seed",
        "nanoslime/rollout/policy.py",
        "self._seed = (task.seed, index)",
        "self._seed = (task.seed, 0)",
        "tests/rollout/test_worker.py -k each_group",
    ),
    Fault(
        "each sample of a rollout has a reward of its own",
        "nanoslime/rollout/worker.py",
        "        await self._scorer.score(samples, task.prompt, task.reward)\n",
        "        for sample in samples:\n"
        "            await self._scorer.score([sample], task.prompt, task.reward)\n",
        "tests/rollout/test_worker.py -k share",
    ),
    Fault(
        "waiting for tokens is time of the environment",
        "nanoslime/rollout/policy.py",
        "            limit.reschedule(None)\n",
        "",
        "tests/rollout/test_worker.py -k waiting",
    ),
    Fault(
        "sequences in flight are never given back",
        "nanoslime/rollout/router.py",
        "slot.inflight -= n",
        "pass",
        "tests/rollout/test_router.py",
    ),
    Fault(
        "of a group, one sequence is given back",
        "nanoslime/rollout/router.py",
        "slot.inflight -= n",
        "slot.inflight -= 1",
        "tests/rollout/test_router.py",
    ),
    Fault(
        "a second BOS before a chat template's",
        "nanoslime/rollout/prompts.py",
        "add_special_tokens=not use_template",
        "add_special_tokens=True",
        "tests/rollout/test_prompts.py",
    ),
    Fault(
        "no BOS without a chat template",
        "nanoslime/rollout/prompts.py",
        "add_special_tokens=not use_template",
        "add_special_tokens=False",
        "tests/rollout/test_prompts.py",
    ),
    Fault(
        "groups of equal rewards are dropped though nobody asked",
        "nanoslime/algorithms/prepare.py",
        "drop_zero_std=algorithm.config.filter_zero_std",
        "drop_zero_std=True",
        "tests/algorithms/test_prepare.py",
    ),
    Fault(
        "advantages of what the filter drops",
        "nanoslime/algorithms/prepare.py",
        "algorithm.advantages(kept)",
        "algorithm.advantages(groups)",
        "tests/algorithms/test_prepare.py",
    ),
    Fault(
        "rewards differ by the biased standard deviation",
        "nanoslime/algorithms/rewards.py",
        "return float(values.std(ddof=1)) > ZERO_STD",
        "return float(values.std(ddof=0)) > ZERO_STD",
        "tests/algorithms/test_rewards.py",
    ),
    Fault(
        "whitening without its epsilon",
        "nanoslime/algorithms/policy_gradient.py",
        "(variance + 1e-8).rsqrt()",
        "variance.rsqrt()",
        "tests/algorithms/test_policy_gradient.py",
    ),
    Fault(
        "a schedule as long as the rollouts, not their steps",
        "nanoslime/training/backend.py",
        "self._config.rollout.num_rollout * self._training.num_steps_per_rollout",
        "self._config.rollout.num_rollout",
        WRITTEN_OUT,
    ),
    Fault(
        "small gradients are scaled up to the clip",
        "nanoslime/training/backend.py",
        "if not 0 < scale < 1:",
        "if not 0 < scale:",
        WRITTEN_OUT,
    ),
    Fault(
        "no entropy under FSDP",
        "nanoslime/training/fsdp.py",
        "algorithm.loss(logprobs, entropy, batch)",
        "algorithm.loss(logprobs, entropy * 0, batch)",
        WRITTEN_OUT,
    ),
    Fault(
        "the reference replays the policy's experts",
        "nanoslime/training/megatron/backend.py",
        "            shard = replace(shard, routed_experts=None)\n",
        "            pass\n",
        "tests/training/megatron/test_routing_replay.py -k reference_chooses",
    ),
    Fault(
        "a rank rounds the biases that are always float32",
        "nanoslime/weight_sync/exchange.py",
        "values.copy_(shards[part.number].tensor[part.box])",
        "values.copy_(shards[part.number].tensor[part.box].to(torch.bfloat16))",
        "tests/weight_sync/test_trainer_weights.py",
    ),
    Fault(
        "an engine does not look at the bytes of a bucket",
        "nanoslime/sealed_bucket.py",
        "    if checksum(flat[HEADER_BYTES:]).tolist() != [first, second]:\n",
        "    if False:\n",
        "tests/test_sealed_bucket.py",
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


def test_the_lines_of_every_fault_are_those_of_the_code():
    missing = [
        fault.name for fault in FAULTS if (ROOT / fault.file).read_text().count(fault.old) != 1
    ]
    assert not missing


@pytest.mark.matrix
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_a_fault_turns_its_test_red(checkout, fault):
    file = checkout / fault.file
    sound = file.read_text()
    try:
        file.write_text(sound.replace(fault.old, fault.new))
        done = run_test(checkout, fault.test)
    finally:
        file.write_text(sound)
    output = done.stdout[-3000:] + done.stderr[-1000:]
    assert done.returncode == 1, output
    assert " failed" in done.stdout, output


@pytest.mark.matrix
@pytest.mark.parametrize("test", sorted({f.test for f in FAULTS}))
def test_without_faults_they_pass(checkout, test):
    done = run_test(checkout, test)
    assert done.returncode == 0, done.stdout[-3000:]
