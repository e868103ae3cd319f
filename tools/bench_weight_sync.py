"""How fast weights come from trainer ranks to engines on the CPU, and what that takes.

    python tools/bench_weight_sync.py [--only wire disk sglang] [--gb 1] [--rounds 5]

Every rank and every engine is a process of its own; they speak gloo and HTTP over loopback. The
driver is the product's SyncSession, the ranks are its TrainWorker. Three tables, medians of
`rounds` syncs after one that is not counted:

wire    synthetic trainers (shards of made-up bfloat16 parameters in Megatron's layout, no
        training) and synthetic engines (tools/synthetic_engine.py, which check seals and load
        nothing). A bare broadcast takes turns with a sync: the same buckets from trainer rank 0
        to the same engines, already filled, without gathering, seals or a call for each.
          GB               of the model; `buckets` at weight_sync.bucket_bytes of --bucket-mb
          bytes/engine     received by an engine in a sync, over bytes of the model
          bare GB/s        bytes of the model over the seconds of a bare broadcast
          send/bare        throughput of `send`, which is the pause without its HTTP calls, over
                           that of the bare broadcast of the same round
          sync/bare        the same of the whole sync, prepare and HTTP calls included
          pause/wire       seconds that engines stand still, over `wire` (below)
          CPU/bare         processor seconds of all ranks and engines in a sync, over those of a
                           bare broadcast: where two cores are the limit, so is this
          peak/bucket      the most memory that a rank had in a sync beyond what it had before,
                           over weight_sync.bucket_bytes; the largest of the ranks
disk    all ranks write a checkpoint for engines; `cp` copies its files, and fsync brings the
        copies to the disk, in turns. Every rank's bytes; seconds with hashes and fsync.
sglang  real trainers and real SGLang, whose models have random weights.
          prepare s        before the pause: the first buckets, or all files
          pause s          engines stand still, /pause_generation to /continue_generation
          gather s         in ranks that fill buckets, the slowest one; beside wire and load
          wire s           all broadcasts, from announcing a run of buckets to its last byte sent;
                           engines load a bucket of a run before they receive the next one
          load s           from there to all engines' answers: seals and loading
          HTTP s           the pause without `send`: the other calls of a sync, and the driver's
                           to the ranks
          pause/wire, pause/total
        With disk and tensor engines are handed files and payloads: `load` is all of that.

The figures of a table are of one run; ratios say more than seconds do.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from ctypes import CDLL
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from nanoslime.config import ModelConfig, RolloutConfig, RunConfig, TrainingConfig
from nanoslime.config.rollout import WeightSyncConfig
from nanoslime.engine_kind import EngineStart
from nanoslime.models.rules import tensors
from nanoslime.models.shape import ModelShape
from nanoslime.models.tiny import tiny_qwen3_config
from nanoslime.orchestration.worker import TrainWorker
from nanoslime.processes.ports import free_port
from nanoslime.rehearsal import build_tokenizer
from nanoslime.rollout.engines.sglang_client import SGLangEngine
from nanoslime.rollout.engines.sglang_server import SGLangServer
from nanoslime.training.megatron.weights import owned_shards
from nanoslime.weight_sync.devices import SeparateDevices
from nanoslime.weight_sync.engine_pool import EnginePool
from nanoslime.weight_sync.session import SyncSession
from tools.rank_processes import HOST, Ranks, SyntheticWorker, quick_context
from tools.synthetic_engine import synthetic_engines

PARTS = ("wire", "disk", "sglang")
DEADLINE_S = 240.0
MEGABYTE = 1_000_000

LAYOUTS = {
    "1 rank": TrainingConfig(),
    "TP2": TrainingConfig(tp_size=2),
    "PP2": TrainingConfig(pp_size=2),
    "EP2": TrainingConfig(ep_size=2),
    "FSDP DP2": TrainingConfig(backend="fsdp"),
}


def model_config(num_bytes: float, *, is_moe: bool = False) -> dict[str, Any]:
    """config.json of a Qwen3 of about so many bytes in bfloat16; its layers are even in number."""
    config = tiny_qwen3_config() | {"dtype": "bfloat16"}
    is_large = num_bytes > 300 * MEGABYTE
    config["hidden_size"] = 2048 if is_large else 512
    config["intermediate_size"] = 3 * config["hidden_size"]
    config["num_attention_heads"] = config["hidden_size"] // 64
    config["num_key_value_heads"] = config["num_attention_heads"] // 2
    config["head_dim"] = 64
    if is_moe:
        experts = {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
        config |= experts | {"moe_intermediate_size": config["intermediate_size"] // 8}
        config |= {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    sizes = [
        2 * ModelShape.from_config(config | {"num_hidden_layers": n}).num_parameters for n in (2, 4)
    ]
    num_pairs = max(1, round((num_bytes - sizes[0]) / (sizes[1] - sizes[0])) + 1)
    return config | {"num_hidden_layers": 2 * num_pairs}


def save_model(directory: Path, config: dict[str, Any]) -> Path:
    """A checkpoint with random weights, and a tokenizer of bytes."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    build_tokenizer().save_pretrained(directory)
    values = {}
    for name, shape in tensors(ModelShape.from_config(config)).items():
        values[name] = torch.empty(shape, dtype=torch.bfloat16)
        if len(shape) == 1:
            values[name].fill_(1.0)
        else:
            values[name].normal_(std=0.02)
    save_file(values, directory / "model.safetensors", {"format": "pt"})
    return directory


def run_config(training: TrainingConfig, bucket_bytes: int) -> RunConfig:
    return RunConfig(
        model=ModelConfig(dtype="bfloat16"),
        rollout=RolloutConfig(sglang={"max_total_tokens": 2048, "max_running_requests": 8}),
        training=training,
        weight_sync=WeightSyncConfig(bucket_bytes=bucket_bytes, deadline_s=DEADLINE_S),
    )


def _bucket_sizes(worker: TrainWorker) -> dict[int, int]:
    """Bytes of the buckets that this rank sends, by number."""
    return {number: flat.nbytes for number, flat in worker._sender._flat_buckets.items()}


def _broadcast_bare(worker: TrainWorker, sizes: list[int]) -> float:
    """Seconds, on rank 0."""
    if worker._weights.rank:
        return 0.0
    group = worker._sender._wire._group
    filled = torch.ones(max(sizes), dtype=torch.uint8)
    begin = time.monotonic()
    for num_bytes in sizes:
        dist.broadcast(filled[:num_bytes], group_src=0, group=group)
    return time.monotonic() - begin


def _begin_peak(worker: TrainWorker) -> int:
    """Bytes of memory now; the peak is counted from here."""
    CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _peak(worker: TrainWorker) -> int:
    return _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(key)]
    return 1024 * int(line.split()[1])


def _processor_s(worker: TrainWorker) -> float:
    return time.process_time()


@dataclass
class Bench:
    """What was asked, and where files go."""

    asked: argparse.Namespace
    directory: Path
    versions: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def bucket_bytes(self) -> int:
        return int(self.asked.bucket_mb * MEGABYTE)

    def median_of_syncs(
        self, session: SyncSession, ranks: Ranks, beside: Callable[[], Any] = lambda: None
    ) -> dict[str, float]:
        """Medians over the rounds; `beside` comes before each of them."""
        session.sync(next(self.versions))
        rows = []
        for _ in range(self.asked.rounds):
            beside()
            times = session.sync(next(self.versions))
            row = {"total": times["time/weight_sync_s"], "pause": times["time/weight_sync_pause_s"]}
            rows.append(row | ranks.seconds)
        return {name: median(row[name] for row in rows) for name in rows[0]}

    def wire(self) -> None:
        columns = ("trainers", "GB", "buckets", "engines", "bytes/engine", "bare GB/s")
        print_header(*columns, "send/bare", "sync/bare", "pause/wire", "CPU/bare", "peak/bucket")
        gb = self.asked.gb
        small = gb / 20
        self.wire_row("1 rank", small, 1)
        for trainers in ("1 rank", "TP2", "PP2", "EP2"):
            self.wire_row(trainers, gb, 1)
        for num_engines in (2, 4):
            self.wire_row("1 rank", gb, num_engines)

    def wire_row(self, trainers: str, gb: float, num_engines: int) -> None:
        training = LAYOUTS[trainers]
        shape = ModelShape.from_config(model_config(gb * 1e9, is_moe=training.ep_size > 1))
        num_ranks = training.tp_size * training.pp_size * training.ep_size
        owned = owned_shards(shape, training, num_ranks)
        make = partial(
            SyntheticWorker, owned, run_config(training, self.bucket_bytes), self.directory
        )
        with (
            synthetic_engines(num_engines, quick_context()) as engines,
            closing(Ranks(num_ranks, make)) as ranks,
        ):
            session = open_session(ranks, engines, "broadcast", self.directory)
            self.wire_measured(trainers, 2 * shape.num_parameters, engines, ranks, session)

    def wire_measured(
        self,
        trainers: str,
        model_bytes: int,
        engines: Sequence[SGLangEngine],
        ranks: Ranks,
        session: SyncSession,
    ) -> None:
        by_rank = ranks.run(_bucket_sizes)
        sizes = [size for of_rank in by_rank for size in of_rank.values()]
        session.sync(next(self.versions))
        bares = []
        rows = []
        received, _ = counts(engines)
        for _ in range(self.asked.rounds):
            begin_s = processor_s(engines, ranks)
            bares.append(bare_s(engines, ranks, sizes))
            middle_s = processor_s(engines, ranks)
            before = ranks.run(_begin_peak)
            times = session.sync(next(self.versions))
            extra = [peak - rss for peak, rss in zip(ranks.run(_peak), before, strict=True)]
            end_s = processor_s(engines, ranks)
            total_s = times["time/weight_sync_s"]
            row = (
                bares[-1] / ranks.seconds["send"],
                bares[-1] / total_s,
                times["time/weight_sync_pause_s"] / ranks.seconds["wire"],
                (end_s - middle_s) / (middle_s - begin_s),
                max(extra) / self.bucket_bytes,
            )
            rows.append(row)
        per_sync = (counts(engines)[0] - received) / self.asked.rounds / len(engines)
        medians = [median(values) for values in zip(*rows, strict=True)]
        print_row(
            trainers,
            f"{model_bytes / 1e9:.2f}",
            len(sizes),
            len(engines),
            f"{per_sync / model_bytes:.4f}",
            f"{model_bytes / median(bares) / 1e9:.2f}",
            *(f"{value:.2f}" for value in medians),
        )

    def disk(self) -> None:
        print_header("trainers", "GB by rank", "all ranks write s", "cp + fsync s", "ratio")
        self.disk_rows(("1 rank", "TP2", "PP2"))

    def disk_rows(self, layouts: Sequence[str]) -> None:
        for trainers in layouts:
            training = LAYOUTS[trainers]
            shape = ModelShape.from_config(model_config(self.asked.gb * 1e9))
            num_ranks = training.tp_size * training.pp_size
            owned = owned_shards(shape, training, num_ranks)
            make = partial(
                SyntheticWorker, owned, run_config(training, self.bucket_bytes), self.directory
            )
            with closing(Ranks(num_ranks, make)) as ranks:
                self.disk_row(trainers, ranks)

    def disk_row(self, trainers: str, ranks: Ranks) -> None:
        open_session(ranks, [], "disk", self.directory)
        copied = self.directory / "copied"
        writes = []
        copies = []
        for number in range(self.asked.rounds + 1):
            version = next(self.versions)
            ranks.call("prepare", version, what="write")
            sent = ranks.call("send", version, what="send")
            written = self.directory / "weights" / f"version_{version}"
            begin = time.monotonic()
            subprocess.run(["cp", "-r", written, copied], check=True)
            for file in copied.iterdir():
                with open(file) as opened:
                    os.fsync(opened)
            copy_s = time.monotonic() - begin
            if number:
                writes.append(ranks.seconds["prepare"])
                copies.append(copy_s)
            shutil.rmtree(copied)
            shutil.rmtree(written)
        ratios = [write / copy for write, copy in zip(writes, copies, strict=True)]
        by_rank = " + ".join(f"{of_rank.num_bytes / 1e9:.2f}" for of_rank in sent)
        figures = (f"{median(values):.2f}" for values in (writes, copies, ratios))
        print_row(trainers, by_rank, *figures)

    def sglang(self) -> None:
        columns = ("trainers", "MB", "engines", "way", "prepare s", "pause s", "gather s")
        print_header(*columns, "wire s", "load s", "HTTP s", "pause/wire", "pause/total")
        large_gb = self.asked.gb
        dense = save_model(self.directory / "dense", model_config(large_gb * 1e9 / 20))
        with self.servers(dense, 4) as engines:
            for way in ("broadcast", "disk", "tensor"):
                self.sglang_rows("FSDP DP2", dense, engines, {way: (1,)})
            self.sglang_rows("TP2", dense, engines, {"broadcast": (1, 2, 4), "disk": (4,)})
            self.sglang_rows("PP2", dense, engines, {"broadcast": (1,)})
        moe = save_model(self.directory / "moe", model_config(large_gb * 1e9 / 20, is_moe=True))
        with self.servers(moe, 1) as engines:
            self.sglang_rows("EP2", moe, engines, {"broadcast": (1,)})
        large = save_model(self.directory / "large", model_config(large_gb * 1e9))
        with self.servers(large, 1) as engines:
            self.sglang_rows("TP2", large, engines, {"broadcast": (1,), "disk": (1,)})

    def sglang_rows(
        self,
        trainers: str,
        model: Path,
        engines: Sequence[SGLangEngine],
        ways: dict[str, Sequence[int]],
    ) -> None:
        """`ways`: to how many of the engines each transport sends."""
        make = partial(TrainWorker, run_config(LAYOUTS[trainers], self.bucket_bytes), model)
        model_bytes = 2 * ModelShape.read(model).num_parameters
        with closing(Ranks(2, make)) as ranks:
            for way, numbers in ways.items():
                for number in numbers:
                    session = open_session(ranks, engines[:number], way, self.directory)
                    row = self.median_of_syncs(session, ranks)
                    session._disconnect()
                    self.print_split(trainers, f"{model_bytes / MEGABYTE:.0f}", number, way, row)

    def print_split(
        self, trainers: str, model_mb: str, engines: int, way: str, row: dict[str, float]
    ) -> None:
        prepare_s = row["total"] - row["pause"]
        load_s = row.get("load", 0.0)
        http_s = row["pause"] - row.get("send", 0.0)
        ratio = ""
        if way == "disk":
            load_s, http_s = http_s, 0.0
        elif way == "tensor":
            load_s = row["send"]
        else:
            ratio = f"{row['pause'] / row['wire']:.2f}"
        beside = (row.get("gather", 0.0), row.get("wire", 0.0))
        figures = (prepare_s, row["pause"], *beside, load_s, http_s)
        texts = [f"{seconds:.3f}" if seconds else "" for seconds in figures]
        print_row(
            trainers,
            model_mb,
            engines,
            way,
            *texts,
            ratio,
            f"{row['pause'] / row['total']:.2f}",
        )

    @contextmanager
    def servers(self, model: Path, number: int) -> Iterator[list[SGLangEngine]]:
        """SGLang servers, which start side by side."""
        config = run_config(TrainingConfig(), self.bucket_bytes)
        with ExitStack() as stack:
            servers = []
            for index in range(number):
                log = self.directory / f"{model.name}-{index}.log"
                start = EngineStart(config, index, model, device="cpu", host=HOST, log=log)
                server = SGLangServer(start, free_port(HOST))
                stack.callback(server.close)
                servers.append(server)
            with ThreadPoolExecutor(number) as threads:
                engines = list(threads.map(lambda server: server.start(DEADLINE_S), servers))
            yield engines


def open_session(
    ranks: Ranks, engines: Sequence[SGLangEngine], way: str, directory: Path
) -> SyncSession:
    session = SyncSession(
        ranks,
        EnginePool(engines),
        SeparateDevices(),
        transport=way,
        directory=directory / "weights",
        deadline_s=DEADLINE_S,
    )
    session.open([[0]] * len(engines))
    return session


def bare_s(engines: Sequence[SGLangEngine], ranks: Ranks, sizes: list[int]) -> float:
    """Seconds of bare broadcasts, until every engine has all."""
    begin = time.monotonic()
    with ThreadPoolExecutor(len(engines)) as threads:
        asked = [threads.submit(engine._post, "/receive_bare", sizes=sizes) for engine in engines]
        ranks.run(_broadcast_bare, sizes)
        for answer in asked:
            answer.result()
    return time.monotonic() - begin


def counts(engines: Sequence[SGLangEngine]) -> tuple[int, float]:
    """Bytes that synthetic engines received, and seconds of processor time, of all together."""
    answers = [json.loads(engine._post("/counts")["message"]) for engine in engines]
    return sum(num_bytes for num_bytes, _ in answers), sum(seconds for _, seconds in answers)


def processor_s(engines: Sequence[SGLangEngine], ranks: Ranks) -> float:
    return counts(engines)[1] + sum(ranks.run(_processor_s))


def print_header(*columns: str) -> None:
    print()
    print_row(*columns)
    print("|" + "---|" * len(columns), flush=True)


def print_row(*values: object) -> None:
    print("| " + " | ".join(str(value) for value in values) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--gb", type=float, default=1.0, help="the larger model; the other is 1/20")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bucket-mb", type=float, default=64.0, help="weight_sync.bucket_bytes")
    parser.add_argument("--directory", type=Path, help="where files are written for the time")
    asked = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(dir=asked.directory) as directory:
        bench = Bench(asked, Path(directory))
        for part in asked.only:
            getattr(bench, part)()
    print(f"\n{time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
