"""The work of one trainer rank: steps, checkpoints, and its part in weight sync."""

import errno
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from nanoslime import algorithms
from nanoslime.algorithms.policy_gradient import PolicyGradient
from nanoslime.batch import BatchPlan, Metric, MicroBatch, StepMetrics, TrainBatch
from nanoslime.config import RunConfig
from nanoslime.plugins import resolve
from nanoslime.run_dir import RunDir
from nanoslime.storage import manifest
from nanoslime.storage.token_gaps import gaps_file, write_gaps
from nanoslime.training import BACKENDS
from nanoslime.training.backend import RankEnv, TrainBackend, collectives
from nanoslime.training.batching import fill
from nanoslime.types import KeptArrays, RunError, SampleArrays, TensorKind
from nanoslime.weight_sync.disk import CheckpointWriter
from nanoslime.weight_sync.engine_calls import EnginesFailed
from nanoslime.weight_sync.plan import TrainerWeights
from nanoslime.weight_sync.transport import EngineSide, RankSide, Sender, Sent

# torch does not say that a disk is full, but by how much less was written than it expected.
_FULL_DISK_BYTES = 1 << 20


class GapNotes:
    """Stands for an algorithm, and notes on each token in its loss how far trainer and engine are
    apart, for people who look at samples."""

    def __init__(self, algorithm: PolicyGradient) -> None:
        self._algorithm = algorithm
        # The lengths of its sequences, tokens [T] and gaps [T] of each micro-batch.
        self._noted: list[tuple[list[int], Tensor, Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._algorithm, name)

    def loss(
        self, logprobs: Tensor, entropy: Tensor | None, batch: MicroBatch
    ) -> tuple[Tensor, dict[str, Metric]]:
        # As for train/logprob_gap_mean: the old logprobs are of the policy that sampled.
        trainer = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        in_loss = torch.where(batch.loss_mask, trainer - batch.rollout_logprobs, torch.nan)
        # They stay on the device: nobody waits for them during the step.
        self._noted.append((batch.lengths, batch.token_ids.int(), in_loss.half()))
        return self._algorithm.loss(logprobs, entropy, batch)

    def write(self, path: Path) -> None:
        """Writes the gaps of all sequences that were noted."""
        sequences = []
        for lengths, token_ids, gaps in self._noted:
            of_tokens = token_ids.cpu().split(lengths)
            of_gaps = gaps.cpu().split(lengths)
            sequences += zip(of_tokens, of_gaps, strict=True)
        write_gaps(path, [(tokens.numpy(), gaps.numpy()) for tokens, gaps in sequences])


class TrainWorker:
    """Every method is collective: all ranks call it, in the same order."""

    def __init__(self, config: RunConfig, model_dir: Path, env: RankEnv, run: RunDir | None = None):
        """`run` is where files about batches and tokens go; there are none without it."""
        if env.device == "cuda" and not torch.cuda.is_available():
            raise RunError(
                f"trainer rank {env.rank}: torch {torch.__version__} sees no CUDA on a node that "
                "has GPUs; make the environment with `bash env/run.sh --target cuda true` and "
                "name it in cluster.venv"
            )
        self.config = config
        self.model_dir = model_dir
        self.env = env
        backend = resolve(config.training.backend, BACKENDS, "training.backend")
        self.backend: TrainBackend = backend(config, model_dir, env)
        self._run = run
        self.backend.skipped_dir = run.skipped if run else None
        self.dp_rank = self.backend.dp_rank
        self.dp_size = self.backend.dp_size
        self.algorithm = algorithms.make(config.training_algorithm, config.rollout.max_new_tokens)
        self._weights = TrainerWeights(
            self.backend.weight_shards,
            self.backend.owned_shards(),
            rank=env.rank,
            dtype=getattr(torch, config.model.dtype),
            device=env.torch_device,
        )
        self._sender: Sender | None = None
        # The version that the engines had last; the next rollout that is trained on has its number.
        self._version: int | None = None

    def train_plans(
        self, plans: list[BatchPlan], fetch: Callable[[], Mapping[KeptArrays, SampleArrays]] = dict
    ) -> dict[str, float]:
        """`train` on the batches of these plans. `fetch` gets what rollout workers keep of them."""
        begin = time.monotonic()
        fetched = fetch()
        batches = [fill(plan, fetched) for plan in plans]
        fetch_s = time.monotonic() - begin
        if not batches:
            return {}
        return {"time/fetch_s": fetch_s} | self.train(batches)

    def train(self, batches: list[TrainBatch]) -> dict[str, float]:
        """Makes one optimizer step for each batch of the rollout.

        Before the first step all batches get old and reference logprobs, and token
        advantages, which may be whitened over the rollout. Returns the metrics of the
        rollout's row; none without batches.
        """
        if not batches:
            return {}
        with collectives(self.config.training):
            return self._train(batches)

    def _train(self, batches: list[TrainBatch]) -> dict[str, float]:
        begin = time.monotonic()
        if self.algorithm.needs_old_logprobs:
            for batch in batches:
                batch.old_logprobs = self.backend.logprobs(batch, "policy")
        if self.algorithm.needs_reference:
            with self.backend.reference():
                for batch in batches:
                    batch.ref_logprobs = self.backend.logprobs(batch, "ref")
        if self.backend.is_last_stage:
            self._set_token_advantages(batches)
        middle = time.monotonic()
        gaps = self._gap_notes()
        steps = [self.backend.train_step(batch, gaps or self.algorithm) for batch in batches]
        if gaps is not None:
            self._write_gaps(gaps)
        end = time.monotonic()
        times = {"time/logprobs_s": middle - begin, "time/train_s": end - middle}
        return times | metrics_row(steps)

    def save(self, path: Path) -> dict[str, str]:
        """Writes the backend's state into the existing empty directory `path`.

        Returns the hashes of the files that this rank wrote.
        """
        with collectives(self.config.training), _full_disk_is_named(path):
            self.backend.save(path)
        return manifest.hash_own(path, self.env.rank)

    def load(self, path: Path) -> None:
        with collectives(self.config.training):
            self.backend.load(path)

    def sleep(self) -> None:
        self.backend.sleep()

    def wake(self) -> None:
        self.backend.wake()

    def connect(self, sender: str, engines: EngineSide) -> Sent:
        """Makes this rank's sender to the engines, in place of an earlier one; `sender` is that
        of a Transport.
        """
        self.close()
        make_sender = resolve(sender, {}, "weight_sync.transport")
        rank = RankSide(
            weights=self._weights,
            bucket_bytes=self.config.weight_sync.bucket_bytes,
            model_dir=self.model_dir,
            deadline_s=self.config.weight_sync.deadline_s,
        )
        try:
            self._sender = make_sender(rank, engines)
        except EnginesFailed as e:
            return Sent(failures=e.failures, problem=str(e))
        return Sent()

    def tensor_kinds(self) -> list[TensorKind]:
        """What engines are sent, on rank 0; nothing elsewhere."""
        return self._weights.kinds() if self._weights.rank == 0 else []

    def prepare(self, version: int) -> None:
        """Begins to send the current weights as `version`, as far as no engine is needed for it."""
        self._version = version
        if self._sender is not None:
            self._sender.prepare(version)

    def send(self, version: int, compares: bool = False) -> Sent:
        """Sends the current weights as `version`; see Sender."""
        assert self._sender is not None, "connect() comes before send()"
        try:
            return self._sender.send(version, compares=compares)
        except EnginesFailed as e:
            return Sent(failures=e.failures, problem=str(e))

    def score(self, token_ids: list[int]) -> list[float] | None:
        """The policy's logprob of each token but the first; None before the last pipeline stage."""
        length = len(token_ids)
        training = self.config.training
        # Stages that are interleaved need as many micro-batches.
        num_microbatches = training.pp_size if training.vpp_size > 1 else 1
        batch = TrainBatch(
            token_ids=[torch.tensor(token_ids)],
            loss_mask=[torch.ones(length, dtype=torch.bool)],
            rollout_logprobs=[torch.zeros(length)],
            advantages=[0.0],
            token_weights=[1.0],
            microbatches=[[0]] * num_microbatches,
            denominator=1.0,
            num_tokens=length,
            num_sequences=1,
            temperature=1.0,
        )
        with collectives(training):
            logprobs = self.backend.logprobs(batch, "policy")
        return None if logprobs is None else logprobs[0][1:].tolist()

    def write_hf(self, destination: Path) -> None:
        """Writes the current weights as a Hugging Face checkpoint.

        Tokenizer and config are those of the original. What is not trained is left out:
        a repeated output layer, multi-token prediction.
        """
        writer = CheckpointWriter(self._weights, self.config.weight_sync.bucket_bytes)
        writer.write(destination, like=self.model_dir)

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    def _gap_notes(self) -> GapNotes | None:
        """Where this rank notes its tokens' gaps to the engine; None where it does not."""
        is_recorded = self.config.rollout.record == "full" and self._version is not None
        if self._run is None or not is_recorded or not self.backend.writes_logprobs:
            return None
        return GapNotes(self.algorithm)

    def _write_gaps(self, gaps: GapNotes) -> None:
        gaps.write(gaps_file(self._run.rollouts, self._version, self.dp_rank))
        keep = self.config.rollout.record_keep
        if keep:
            old = gaps_file(self._run.rollouts, self._version - keep, self.dp_rank)
            old.unlink(missing_ok=True)

    def _set_token_advantages(self, batches: list[TrainBatch]) -> None:
        joined = _joined(batches)
        values = iter(self.algorithm.token_advantages(joined, self.backend.all_sum))
        for batch in batches:
            batch.token_advantages = list(islice(values, len(batch.token_ids)))


@contextmanager
def _full_disk_is_named(path: Path) -> Iterator[None]:
    """Raises OSError that says so where writing to `path` fails because its disk is full."""
    try:
        yield
    except (Exception, CheckpointException) as e:
        if shutil.disk_usage(path).free < _FULL_DISK_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from e
        raise


def _joined(batches: list[TrainBatch]) -> TrainBatch:
    """The sequences of all batches, with the fields that token advantages need."""
    fields: dict[str, Any] = {}
    for name in ("loss_mask", "advantages", "rollout_logprobs", "old_logprobs", "ref_logprobs"):
        of_batches = [getattr(batch, name) for batch in batches]
        if of_batches[0] is not None:
            fields[name] = list(chain.from_iterable(of_batches))
    return replace(batches[0], **fields)


def metrics_row(steps: list[StepMetrics]) -> dict[str, float]:
    """Makes one row of a rollout's steps: means of means, maxima of maxima, minima of minima."""
    values: dict[str, list[float]] = defaultdict(list)
    reduction: dict[str, Callable[[list[float]], float]] = {}
    for step in steps:
        own_names = ("loss", "grad_norm", "lr", "skipped")
        own = {f"train/{name}": float(getattr(step, name)) for name in own_names}
        for found, reduce in ((own | step.means, _mean), (step.maxima, max), (step.minima, min)):
            for name, value in found.items():
                values[name].append(value)
                reduction[name] = reduce
    row = {name: reduction[name](of_steps) for name, of_steps in values.items()}
    row["train/num_skipped"] = float(steps[-1].num_skipped)
    return row


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
