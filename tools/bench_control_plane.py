"""What a step costs beside sampling and training: the control plane and the data path, for real.

    python tools/bench_control_plane.py [--samples 256] [--record none|text|full] [--dense]

64 stub servers, in a few processes, answer /generate as SGLang does: token ids, logprobs, and the
experts of 48 layers in base64. All behind them is the product itself, on a Ray of this machine: a
rollout worker with its HTTP client, environment, reward and recorder, the producer, the planning
of batches, 32 data-parallel ranks that fetch the arrays of their samples and fill their batches
(in a few processes, in turns; their optimizer steps are stubs), and the metrics.

One step of a large run has 8,192 samples of 8,192 tokens, on 8 nodes with engines. This machine
makes a part of the samples (256: one in 32), each of full size. The last column extrapolates,
linearly: the driver has 8,192 samples, each engine node 1,024, each rank 256. Nodes and ranks
work beside one another, and a node reads its answers while other samples are still being
generated; the driver is alone.
"""

import asyncio
import re
import statistics
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import psutil
import torch.distributed as dist
from transformers import AutoTokenizer, Qwen3MoeConfig

from nanoslime.batch import BatchPlan, StepMetrics, TrainBatch
from nanoslime.config import RunConfig
from nanoslime.config.deadlines import Deadline
from nanoslime.layout import Layout, TrainerPlace
from nanoslime.models.parallel_sizes import ParallelDims
from nanoslime.models.shape import ModelShape
from nanoslime.orchestration.ray import cluster
from nanoslime.orchestration.ray.actors import ActorPlace, Actors, RunOnRay
from nanoslime.orchestration.ray.trainers import RayTrainGroup
from nanoslime.orchestration.ray.workers import RayWorker, WorkerActor
from nanoslime.orchestration.rollout_manager import Assignment, RolloutManager
from nanoslime.rehearsal import build_tokenizer
from nanoslime.rollout.engines.sglang_client import SGLangEngine
from nanoslime.rollout.policy import Policy, ServedModel
from nanoslime.rollout.producer import Serving
from nanoslime.rollout.prompts import RunPrompts
from nanoslime.rollout.recorder import Recording, record
from nanoslime.rollout.rewards.scorer import Scorer
from nanoslime.rollout.router import Router
from nanoslime.rollout.sample_builder import SampleBuilder
from nanoslime.rollout.tasks import GroupTask, Sampling, WorkerSetup
from nanoslime.run_dir import Attempt, RunDir
from nanoslime.tracking import Sink, make_tracker
from nanoslime.training.backend import RankEnv
from nanoslime.training.batching import BatchingOptions, fill, plan_train_batches
from nanoslime.types import Group
from nanoslime.weight_sync.engine_pool import EnginePool
from tools.stub_sglang import NUM_EXPERTS, NUM_LAYERS, TOPK, Sizes, serving

GROUP_SIZE = 8
# The step that is extrapolated to.
FULL_SAMPLES, FULL_NODES, FULL_RANKS = 8192, 8, 32
NOT_FINISHED_S = 300.0
SETTINGS = Sampling(n_samples_per_prompt=1, max_new_tokens=1, temperature=1.0)
ONE_BATCH = BatchingOptions(
    num_steps=1, dp_size=1, max_tokens=1 << 20, denominator="tokens", temperature=1.0
)


class StubBackend:
    """A trainer backend of one process without a model: its optimizer step looks at its batch."""

    is_last_stage = False
    writes_logprobs = False

    def __init__(self, config: RunConfig, model_dir: Path, env: RankEnv) -> None:
        self.dp_rank = env.rank
        self.dp_size = env.world_size
        self.skipped_dir: Path | None = None
        dist.init_process_group(
            "gloo", init_method=env.init_method, rank=env.rank, world_size=env.world_size
        )

    def weight_shards(self) -> list[Any]:
        return []

    def owned_shards(self) -> list[list[Any]]:
        return [[] for _ in range(self.dp_size)]

    def logprobs(self, batch: TrainBatch, weights: str) -> None:
        return None

    def train_step(self, batch: TrainBatch, algorithm: Any) -> StepMetrics:
        num_tokens = sum(len(token_ids) for token_ids in batch.token_ids)
        means = {"train/num_tokens": float(num_tokens)}
        return StepMetrics(loss=0.0, grad_norm=0.0, lr=0.0, skipped=False, means=means, maxima={})


class StubTrainers(RayTrainGroup):
    """`num_ranks` data-parallel ranks, for which the few processes take turns."""

    def __init__(self, *args: Any, num_ranks: int, workers: Sequence[Any]) -> None:
        super().__init__(*args, workers)
        self._num_ranks = num_ranks
        self.fetch_s: list[float] = []

    def setup(self) -> None:
        super().setup()
        self._num_processes = self.dp_size
        self.dp_size = self._num_ranks

    def _train(self, shards: list[list[BatchPlan]]) -> dict[str, float]:
        row: dict[str, float] = {}
        for first in range(0, len(shards), self._num_processes):
            row = super()._train(shards[first : first + self._num_processes])
            self.fetch_s.append(row["time/fetch_s"])
        return row


@dataclass
class Weights:
    """Stands for the weight sync of a run."""

    version: int = 0


@dataclass(frozen=True)
class Plane:
    """The parts of a run that a step passes through."""

    engines: list[SGLangEngine]
    rollout: RolloutManager
    trainer: StubTrainers
    weights: Weights
    actor: RayWorker
    process: psutil.Process  # of the actor
    run: RunDir
    record: str


def make_model(path: Path) -> Path:
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(path)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=NUM_LAYERS,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOPK,
        max_position_embeddings=1 << 17,
        architectures=["Qwen3MoeForCausalLM"],
    )
    config.save_pretrained(path)
    return path


def make_config(options: Namespace, prompts: Path) -> RunConfig:
    rows = [
        {"prompt": f"{number:08d}".ljust(options.prompt_tokens, "."), "label": str(number)}
        for number in range(options.samples // GROUP_SIZE)
    ]
    prompts.write_bytes(b"\n".join(orjson.dumps(row) for row in rows))
    config = RunConfig(
        data={"prompts": str(prompts), "reward": options.reward},
        rollout={
            "num_rollout": options.steps,
            "rollout_batch_size": options.samples // GROUP_SIZE,
            "n_samples_per_prompt": GROUP_SIZE,
            "max_new_tokens": options.tokens - options.prompt_tokens,
            "record": options.record,
            "record_keep": 1,
        },
        algorithm={"name": "grpo", "filter_zero_std": False},
        training={"max_tokens_per_microbatch": 2 * options.tokens},
        tracking={"use_tensorboard": False},
    )
    # The configuration knows the backends of the product only.
    object.__setattr__(config.training, "backend", "tools.bench_control_plane:StubBackend")
    return config


@contextmanager
def plane(options: Namespace, work: Path) -> Iterator[Plane]:
    """All parts, each as a run has it."""
    model_dir = make_model(work / "model")
    config = make_config(options, work / "prompts.jsonl")
    attempt = RunDir.create(work, "run").new_attempt()
    prompts = RunPrompts.load(config, model_dir)
    [source] = prompts.train.values()
    shape = ModelShape.read(model_dir)
    sizes = Sizes(
        num_tokens=options.tokens,
        num_prompt_tokens=len(source.prompts[0].token_ids),
        vocab_size=shape.vocab_size,
        has_experts=not options.dense,
        wide_experts=options.wide,
    )
    with ExitStack() as stack:
        stub_servers = serving(
            sizes, options.engines, options.server_processes, shape, work / "log"
        )
        engines = stack.enter_context(stub_servers)
        cluster.start_local(options.rank_processes, "cpu", attempt.make_ray_token())
        stack.callback(cluster.disconnect)
        actors, process = open_worker(options, config, attempt, model_dir)
        worker = RayWorker(actors, 0)
        trainer = make_trainer(options, config, attempt, model_dir, actors.actors)
        stack.callback(trainer.close)
        trainer.setup()
        pool = EnginePool(engines)
        assignment = Assignment([worker], {})
        pool.subscribe(assignment.set_engines, assignment.drain)
        serves = Serving([worker], lost=pool.lost, service=lambda: pool.service(lambda: None))
        weights = Weights()
        rollout = RolloutManager(config, attempt.run, prompts, weights, serves)
        stack.callback(rollout.close)
        pool.serve()
        record = options.record
        yield Plane(engines, rollout, trainer, weights, worker, process, attempt.run, record)


def make_trainer(
    options: Namespace, config: RunConfig, attempt: Attempt, model_dir: Path, workers: Sequence[Any]
) -> StubTrainers:
    num_processes = options.rank_processes
    layout = Layout(
        num_nodes=1,
        slots_per_node=num_processes,
        device="cpu",
        backend="megatron",
        parallel=ParallelDims(tp=1, pp=1, cp=1, ep=1, dp=num_processes),
        trainers=tuple(TrainerPlace(rank, 0, rank) for rank in range(num_processes)),
        engines=(),
    )
    run = RunOnRay(config, attempt, model_dir)
    return StubTrainers(run, layout, num_ranks=options.ranks, workers=workers)


def open_worker(
    options: Namespace, config: RunConfig, attempt: Attempt, model_dir: Path
) -> tuple[Actors, psutil.Process]:
    """The rollout worker as an actor of Ray, and its process."""
    places = [ActorPlace(index=0, node=0, num_slots=0)]
    run = RunOnRay(config, attempt, model_dir)
    actors = Actors(WorkerActor, "rollout worker", "worker", places, run, 64)
    setup = WorkerSetup(config, model_dir, attempt.run.rollouts, num_engines=options.engines)
    opened = actors.start_on_each("open_worker", setup)
    actors.gather(opened, "open its worker", Deadline(120.0, "the time for it"))
    log = attempt.log("worker", 0).read_text()
    [pid] = re.findall(r"rollout worker 0, pid (\d+)", log)
    return actors, psutil.Process(int(pid))


class Table:
    """Seconds of each step by phase. `share` is by how much more a whole run's step has of it."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], list[float]] = {}

    def add(self, where: str, phase: str, seconds: float) -> None:
        self._rows.setdefault((where, phase), []).append(seconds)

    def print(self, shares: dict[str, float]) -> None:
        print("| where | phase | s a step here | s, whole |\n|---|---|---|---|")
        totals = dict.fromkeys(shares, 0.0)
        for (where, phase), seconds in self._rows.items():
            # The first step warms up.
            middle = statistics.median(seconds[1:] or seconds)
            share = shares.get(where)
            whole = "" if share is None else f"{middle * share:.2f}"
            print(f"| {where} | {phase} | {middle:.3f} | {whole} |")
            if share is not None:
                totals[where] += middle * share
        for where, total in totals.items():
            print(f"| {where} | together | | {total:.2f} |")


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def one_step(plane: Plane, step: int, table: Table, log: Sink) -> None:
    """Makes a rollout and trains on it."""
    for engine in plane.engines:
        engine.update_weights_from_disk("", step)
    plane.weights.version = step
    node_cpu_s = cpu_s(plane.process)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    groups = plane.rollout.generate(step)
    generate_s = time.perf_counter() - begin
    generate_cpu_s = time.process_time() - begin_cpu
    node_cpu_s = cpu_s(plane.process) - node_cpu_s
    row = dict(plane.rollout.metrics)
    waited_s = row["time/generate_s"]
    parse_s = row["time/parse_s"]
    table.add("node", "parse", parse_s)
    table.add("node", "receive, decode, build, score (CPU)", node_cpu_s - parse_s)
    table.add("driver", "tasks out, reports in (CPU)", generate_cpu_s - (generate_s - waited_s))
    table.add("driver", "advantages, metrics, finish", generate_s - waited_s)

    plane.trainer.fetch_s.clear()
    begin_cpu = time.process_time()
    row |= plane.trainer.train(groups, step)
    train_cpu_s = time.process_time() - begin_cpu
    table.add("driver", "plan", row["time/plan_s"])
    table.add("driver", "plans out (CPU)", train_cpu_s - row["time/plan_s"])
    table.add("rank", "fetch and fill", statistics.mean(plane.trainer.fetch_s))
    begin = time.perf_counter()
    log(step, row)
    table.add("driver", "log", time.perf_counter() - begin)
    table.add("recorder", f"record: {plane.record}", recording_s(plane, step))
    table.add("wall", "rollout", waited_s)


def recording_s(plane: Plane, step: int) -> float:
    """Waits until the rollout is recorded; the seconds of the recorder's thread."""
    seconds = 0.0
    end = time.monotonic() + NOT_FINISHED_S
    while plane.record != "none" and seconds == 0.0:
        if time.monotonic() > end:
            raise RuntimeError(f"rollout {step} was not recorded in {NOT_FINISHED_S:.0f} s")
        time.sleep(0.1)
        seconds = plane.actor.metrics()["time/record_s"]
    return seconds


async def one_sample(plane: Plane, model_dir: Path, directory: Path) -> None:
    """What each stage takes for a sample alone, in ms: the median of some."""
    config = plane.rollout.config
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    router = Router(plane.engines)
    model = ServedModel.of(config, router, tokenizer, ModelShape.read(model_dir))
    [source] = RunPrompts.load(config, model_dir).train.values()
    scorer = Scorer(config.data)
    stages = Table()
    for number, prompt in enumerate(source.prompts[:16]):
        task = GroupTask(number, prompt, Sampling.of(config.rollout), 0, config.data.reward)
        policy = Policy(task, 0, model)
        builder = SampleBuilder(prompt, policy)
        times = [time.perf_counter()]
        generation = await policy.generate(builder.token_ids)
        times.append(time.perf_counter())
        policy.decode(generation.token_ids)
        times.append(time.perf_counter())
        builder.generated(generation)
        sample = builder.build()
        times.append(time.perf_counter())
        await scorer.score([sample], prompt, config.data.reward)
        times.append(time.perf_counter())
        report = sample.report(sample.arrays)
        times.append(time.perf_counter())
        sample.advantage = report.advantage = 0.0
        [[plan]] = plan_train_batches([Group(number, [report])], ONE_BATCH)
        times.append(time.perf_counter())
        fill(plan)
        times.append(time.perf_counter())
        for mode in ("text", "full"):
            record(Recording(directory, SETTINGS, mode, keep=1), number, [Group(number, [sample])])
            times.append(time.perf_counter())
        parse_s = router.metrics()["time/parse_s"]
        seconds = [after - before for before, after in pairwise(times)]
        stages.add("", "request and answer, without parse", seconds[0] - parse_s)
        stages.add("", "parse", parse_s)
        names = ("decode", "decode and build", "score", "report", "plan", "fill")
        for name, of_stage in zip((*names, "record text", "record full"), seconds[1:], strict=True):
            stages.add("", name, of_stage)
    await scorer.close()
    await router.close()
    stages.print({"": 1e3})


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256, help="a multiple of 8")
    parser.add_argument("--tokens", type=int, default=8192, help="of a sample, with its prompt")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--dense", action="store_true", help="without routed experts")
    parser.add_argument("--wide", action="store_true", help="experts of 4 bytes, not of 1")
    parser.add_argument("--record", choices=("none", "text", "full"), default="full")
    parser.add_argument("--reward", default="gsm8k")
    parser.add_argument("--steps", type=int, default=4, help="the first one warms up")
    parser.add_argument("--engines", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=32)
    parser.add_argument("--server-processes", type=int, default=2)
    parser.add_argument("--rank-processes", type=int, default=2)
    options = parser.parse_args()
    if options.samples % GROUP_SIZE or options.ranks % options.rank_processes:
        parser.error("--samples is a multiple of 8, --ranks one of --rank-processes")
    driver = psutil.Process()
    with tempfile.TemporaryDirectory() as directory, plane(options, Path(directory)) as parts:
        table = Table()
        begin_mb = driver.memory_info().rss / 1e6
        with make_tracker(parts.rollout.config, parts.run, 0) as tracker:
            for step in range(options.steps):
                one_step(parts, step, table, tracker.log)
        end_mb = driver.memory_info().rss / 1e6
        part = options.samples / FULL_SAMPLES
        shares = {
            "driver": 1 / part,
            "node": 1 / part / FULL_NODES,
            "rank": options.ranks / FULL_RANKS / part,
            "recorder": 1 / part / FULL_NODES,
        }
        table.print(shares)
        whole_mb = begin_mb + (end_mb - begin_mb) / part
        print(f"\ndriver RSS {begin_mb:.0f} MB before, {end_mb:.0f} MB after; whole {whole_mb:.0f}")
        worker_mb = parts.process.memory_info().rss / 1e6
        print(f"worker RSS {worker_mb:.0f} MB\n\nA sample alone, on two cores, in s and ms:\n")
        asyncio.run(one_sample(parts, Path(directory) / "model", Path(directory)))


if __name__ == "__main__":
    main()
