"""Memory and time of logprobs and entropies, forward and backward, beside those by whole logits.

    python tools/bench_logprobs.py [--tokens 8192] [--hidden 1024] [--vocab 151936] [--dtype float32]
        [--gradient both|logprobs] [--rounds 3] [--device cpu|cuda] [--only nanoslime|naive]

naive: float32 logits = hidden weight^T / temperature of all tokens, log_softmax, gather, entropy, autograd.
Every measurement is a process of its own, the two in turn; medians. Extra memory is the peak (CPU: VmHWM of
/proc/self/status, CUDA: max_memory_allocated) less what was there before the call (hidden, weight, targets,
the gradients given) and less what both return: logprobs, entropy, the gradients of hidden and weight.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from torch import Tensor

from nanoslime.training.logprobs import linear_logprobs

TEMPERATURE, WAYS = 0.8, ("naive", "nanoslime")


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logs = (hidden.float() @ weight.float().T / TEMPERATURE).log_softmax(dim=-1)
    return logs.gather(1, targets[:, None]).squeeze(1), -(logs.exp() * logs).sum(dim=-1)


def nanoslime(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
    sizes = {"temperature": TEMPERATURE, "vocab_size": len(weight)}
    return linear_logprobs(hidden, weight, targets, **sizes, with_entropy=True)


def both_ways(way: str, inputs: list[Tensor], upstream: Tensor, entropy_too: bool) -> list[Tensor]:
    """Logprobs [T], entropy [T] and the gradients of hidden [T, H] and weight [V, H]."""
    results, used = (naive if way == "naive" else nanoslime)(*inputs), 2 if entropy_too else 1
    gradients = torch.autograd.grad(results[:used], inputs[:2], list(upstream[:used]))
    return [*(result.detach() for result in results), *gradients]


def measure(options: Namespace, results: Path | None) -> dict[str, float]:
    """In this process: seconds and extra bytes of one call, whose results go to the file `results`."""
    torch.manual_seed(0)
    where = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    hidden = torch.randn(options.tokens, options.hidden, **where).requires_grad_()
    weight = torch.randn(options.vocab, options.hidden, **where).mul_(0.05).requires_grad_()
    targets = torch.randint(options.vocab, (options.tokens,), device=options.device)
    upstream = torch.randn(2, options.tokens, device=options.device) / options.tokens
    entropy_too = options.gradient == "both"
    small = [hidden[:16], weight[:512], targets[:16] % 512]  # loads what is loaded once
    both_ways(options.measure, small, upstream[:, :16], entropy_too)
    before = memory(options.device)
    start = time.perf_counter()
    found = both_ways(options.measure, [hidden, weight, targets], upstream, entropy_too)
    peak = memory(options.device, peak=True)  # waits for the device
    seconds = time.perf_counter() - start
    if results:
        torch.save(found, results)
    return {"s": seconds, "bytes": peak - before - sum(tensor.nbytes for tensor in found)}


def memory(device: str, *, peak: bool = False) -> int:
    """Bytes in use, after which the peak starts anew; or the peak since then."""
    if device == "cuda":
        torch.cuda.synchronize()
        if not peak:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")
    name = "VmHWM" if peak else "VmRSS"
    return int(re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    for name, default in (("tokens", 8192), ("hidden", 1024), ("vocab", 151_936), ("rounds", 3)):
        add(f"--{name}", type=int, default=default, help="%(default)s")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the inputs")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--gradient", choices=("both", "logprobs"), default="both", help="what it is taken of")
    add("--only", choices=WAYS, help="where there is no memory for the other")
    add("--measure", choices=WAYS, help=SUPPRESS)
    add("--results", type=Path, help=SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        print(json.dumps(measure(options, options.results)))
        return 0
    ways = [options.only] if options.only else WAYS
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as directory:
        for number in range(options.rounds):
            for way in ways:
                save = [] if number else ["--results", f"{directory}/{way}"]
                command = [sys.executable, __file__, *argv, "--measure", way, *save]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found[way].append(json.loads(done.stdout))
        tensors = [torch.load(f"{directory}/{way}", map_location="cpu", mmap=True) for way in ways]
    sizes = f"[{options.tokens}, {options.hidden}] x [{options.vocab}, {options.hidden}]"
    print(f"{sizes}, {options.dtype}, gradient of {options.gradient}, {options.device}\n")
    print("| | median s | extra memory, GB |\n|---|---|---|")
    s, gb = (
        [statistics.median(r[key] for r in found[way]) for way in ways] for key in ("s", "bytes")
    )
    for i, way in enumerate(ways):
        print(f"| {way} | {s[i]:.2f} | {gb[i] / 1e9:.3f} |")
    if len(ways) == 2:
        print(f"| nanoslime / naive | {s[1] / s[0]:.2f} | 1/{gb[0] / gb[1]:.1f} |\n")
        differences = [f"{(a - b).abs().max():.1e}" for a, b in zip(*tensors, strict=True)]
        print(
            "max |difference| of logprobs, entropy, hidden gradient, weight gradient:", *differences
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
