"""Memory and time of logprobs and entropies, forward and backward, beside those by whole
logits.

    python tools/bench_logprobs.py [--tokens 8192] [--hidden 1024] [--vocab 151936]
        [--dtype float32] [--gradient both|logprobs] [--rounds 3] [--device cpu|cuda]
        [--beside naive|logprobs_only] [--only nanoslime|naive|logprobs_only]

naive: float32 logits = hidden weight^T / temperature of all tokens, log_softmax, gather,
entropy, autograd. logprobs_only: nanoslime without the entropy. Every measurement is a
process of its own, the two ways in turn; the table shows medians. Extra memory is the peak
(CPU: VmHWM of /proc/self/status, CUDA: max_memory_allocated) less what is there before the
call (hidden, weight, targets, the gradients given) and less what is returned: logprobs,
entropy, the gradients of hidden and weight.
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

TEMPERATURE = 0.8
WAYS = ("naive", "nanoslime")
ALL_WAYS = (*WAYS, "logprobs_only")


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logprobs [T] and entropy [T] by whole logits, of hidden [T, H], weight [V, H],
    targets [T].
    """
    logits = hidden.float() @ weight.float().T / TEMPERATURE
    log_probabilities = logits.log_softmax(dim=-1)
    logprobs = log_probabilities.gather(1, targets[:, None]).squeeze(1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
    return logprobs, entropy


def nanoslime(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, with_entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """As `naive`, by the function that the trainers use."""
    return linear_logprobs(
        hidden,
        weight,
        targets,
        temperature=TEMPERATURE,
        vocab_size=len(weight),
        with_entropy=with_entropy,
    )


def forward_and_backward(
    way: str, inputs: list[Tensor], upstream: Tensor, *, entropy_gradient: bool
) -> list[Tensor]:
    """Logprobs [T], entropy [T] where there is one, and the gradients of hidden [T, H] and
    weight [V, H].

    `upstream` [2, T] are the gradients of logprobs and entropy.
    """
    if way == "naive":
        results = naive(*inputs)
    else:
        results = nanoslime(*inputs, with_entropy=way == "nanoslime")
    found = [result for result in results if result is not None]
    num_differentiated = len(found) if entropy_gradient else 1
    gradients = torch.autograd.grad(
        found[:num_differentiated], inputs[:2], list(upstream[:num_differentiated])
    )
    return [*(result.detach() for result in found), *gradients]


def measure(options: Namespace, results: Path | None) -> dict[str, float]:
    """Seconds and extra bytes of one call in this process; its results go to the file
    `results`.
    """
    torch.manual_seed(0)
    place = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    hidden = torch.randn(options.tokens, options.hidden, **place).requires_grad_()
    weight = torch.randn(options.vocab, options.hidden, **place).mul_(0.05).requires_grad_()
    targets = torch.randint(options.vocab, (options.tokens,), device=options.device)
    upstream = torch.randn(2, options.tokens, device=options.device) / options.tokens
    entropy_gradient = options.gradient == "both"
    # A small call loads what is loaded only once.
    small = [hidden[:16], weight[:512], targets[:16] % 512]
    forward_and_backward(
        options.measure, small, upstream[:, :16], entropy_gradient=entropy_gradient
    )
    before = start_peak_memory(options.device)
    start = time.perf_counter()
    found = forward_and_backward(
        options.measure, [hidden, weight, targets], upstream, entropy_gradient=entropy_gradient
    )
    peak = peak_memory(options.device)  # waits for the device
    seconds = time.perf_counter() - start
    if results:
        torch.save(found, results)
    returned = sum(tensor.nbytes for tensor in found)
    return {"s": seconds, "bytes": peak - before - returned}


def start_peak_memory(device: str) -> int:
    """Bytes in use; from here on the peak counts anew."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _process_bytes("VmRSS")


def peak_memory(device: str) -> int:
    """The most bytes in use since `start_peak_memory`."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _process_bytes("VmHWM")


def _process_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    (kilobytes,) = re.findall(rf"{name}:\s+(\d+) kB", status)
    return int(kilobytes) * 1024


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="%(default)s")
    parser.add_argument("--hidden", type=int, default=1024, help="%(default)s")
    parser.add_argument("--vocab", type=int, default=151_936, help="%(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="%(default)s")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the inputs"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--gradient",
        choices=("both", "logprobs"),
        default="both",
        help="the results whose gradient is taken",
    )
    parser.add_argument("--beside", choices=("naive", "logprobs_only"), default="naive")
    parser.add_argument(
        "--only", choices=ALL_WAYS, help="where there is no memory for the other way"
    )
    parser.add_argument("--measure", choices=ALL_WAYS, help=SUPPRESS)
    parser.add_argument("--results", type=Path, help=SUPPRESS)
    return parser


def measure_in_child(argv: list[str], way: str, results: Path | None) -> dict[str, float]:
    command = [sys.executable, __file__, *argv, "--measure", way]
    if results:
        command += ["--results", str(results)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main(argv: list[str]) -> int:
    options = make_parser().parse_args(argv)
    if options.measure:
        print(json.dumps(measure(options, options.results)))
        return 0
    ways = [options.only] if options.only else [options.beside, "nanoslime"]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    extra_bytes: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as directory:
        files = {way: Path(directory) / way for way in ways}
        for number in range(options.rounds):
            for way in ways:
                results = files[way] if number == 0 else None
                measured = measure_in_child(argv, way, results)
                seconds[way].append(measured["s"])
                extra_bytes[way].append(measured["bytes"])
        tensors = [torch.load(files[way], map_location="cpu", mmap=True) for way in ways]
    sizes = f"[{options.tokens}, {options.hidden}] x [{options.vocab}, {options.hidden}]"
    print(f"{sizes}, {options.dtype}, gradient of {options.gradient}, {options.device}\n")
    print("| | median s | extra memory, GB |\n|---|---|---|")
    median_s = {way: statistics.median(seconds[way]) for way in ways}
    median_gb = {way: statistics.median(extra_bytes[way]) / 1e9 for way in ways}
    for way in ways:
        print(f"| {way} | {median_s[way]:.2f} | {median_gb[way]:.3f} |")
    if len(ways) == 2:
        other = options.beside
        time_ratio = median_s["nanoslime"] / median_s[other]
        memory_ratio = median_gb[other] / median_gb["nanoslime"]
        print(f"| nanoslime / {other} | {time_ratio:.2f} | 1/{memory_ratio:.1f} |\n")
    if ways == list(WAYS):
        differences = []
        for by_naive, by_nanoslime in zip(*tensors, strict=True):
            differences.append(f"{(by_naive - by_nanoslime).abs().max():.1e}")
        print(
            "max |difference| of logprobs, entropy, hidden gradient, weight gradient:",
            *differences,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
