"""What a rehearsal trains and on what: a tiny Qwen3, half taught, and the digit problems to finish on.

The warm start is deliberately plain: one process, one thread, PyTorch and transformers, next-token loss. It
shares nothing with the trainers that the rehearsal is there to exercise, and it is no recipe for supervised
fine-tuning.

Its demonstrations are faulty: a share of their digits is wrong. A model that imitates them well knows where
each digit comes from, but samples the right answer about as often as its teacher shows it, and that holds for
every seed. GRPO, which sees no demonstration, has to prefer the right ones among its own answers. Without the
faults the same reward is met in the middle of a steep climb, and how far GRPO then comes depends on the seed.
"""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from nanoslime.config.model import RehearsalConfig
from nanoslime.models.tiny import EOS, SPECIAL_TOKENS, Problem, digit_problems, tiny_qwen3_config
from nanoslime.storage import commit
from nanoslime.storage.shared_files import publish_json, read_json
from nanoslime.types import RunError

logger = logging.getLogger(__name__)

NUM_CHECKED = 400  # training problems that the warm start is not shown, but measured on
TEACHER_LEAD = (
    1.1  # faultless demonstrations over the target reward: imitation then does reach the target
)
MEASURE_EVERY, LOG_EVERY = 5, 50  # steps
BATCH_SIZE, LR, WARMUP_STEPS = 128, 2e-3, 20
SUMMARY = "rehearsal.json"

Encoded = tuple[
    Tensor, Tensor
]  # ids of prompts [N, P] and of their answers with the end token [N, A]


@dataclass(frozen=True, slots=True)
class RehearsalFiles:
    model: Path  # Hugging Face checkpoint with tokenizer
    train: Path  # JSON lines {"prompt", "label"}
    held_out: Path


def make(directory: Path, knobs: RehearsalConfig, deadline_s: float = 120.0) -> RehearsalFiles:
    """`directory` with model/, train.jsonl, held_out.jsonl and rehearsal.json: whole, or not there at all.

    The same knobs make the same files. A directory made before with them is taken as it is, one made with
    others is replaced. Raises RunError when the warm start has not reached `target_reward` by `deadline_s`.
    """
    files = RehearsalFiles(
        directory / "model", directory / "train.jsonl", directory / "held_out.jsonl"
    )
    summary = directory / SUMMARY
    if summary.is_file() and read_json(summary)["knobs"] == asdict(knobs):
        logger.info("rehearsal: %s is there already", directory)
        return files
    train, held_out = digit_problems(knobs.task, knobs.seed, knobs.num_held_out)
    tokenizer = build_tokenizer()
    with _one_thread():
        checked, shown = (
            _encode(rows, tokenizer) for rows in (train[:NUM_CHECKED], train[NUM_CHECKED:])
        )
        model, warm_start = _warm_start(checked, shown, knobs.seed, knobs.target_reward, deadline_s)
    partial = commit.partial_dir(directory)
    model.save_pretrained(partial / "model")
    tokenizer.save_pretrained(partial / "model")
    for file, rows in ((files.train, train), (files.held_out, held_out)):
        _write_rows(partial / file.name, rows)
    publish_json(partial / SUMMARY, {"knobs": asdict(knobs), "warm_start": warm_start})
    commit.commit(partial, directory)
    return files


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is one token, without merges; ids as models/tiny.py says."""
    vocab = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ids = {token: index for index, token in enumerate(vocab)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _warm_start(
    checked: Encoded, shown: Encoded, seed: int, target_reward: float, deadline_s: float
) -> tuple[Qwen3ForCausalLM, dict[str, float]]:
    """A new model, taught from `shown` until a sample at temperature 1 is right with prob. `target_reward`.

    Beside it: steps, seconds, and its reward, the expected exact match of a sample on the checked problems.
    """
    num_digits = shown[1].shape[1] - 1
    faulty = max(0.0, 1 - (TEACHER_LEAD * target_reward) ** (1 / num_digits))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(Qwen3Config.from_dict(tiny_qwen3_config())).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    batches = torch.Generator().manual_seed(seed)
    start, step, reward = time.monotonic(), 0, 0.0
    while reward < target_reward:
        step += 1
        optimizer.param_groups[0]["lr"] = LR * min(1.0, step / WARMUP_STEPS)
        picked, others = torch.randint(len(shown[0]), (2, BATCH_SIZE), generator=batches)
        wrong = torch.rand(BATCH_SIZE, num_digits + 1, generator=batches) < faulty
        answers = torch.where(
            wrong, shown[1][others], shown[1][picked]
        )  # the end token is the same in both
        loss = -_answer_logprobs(model, shown[0][picked], answers).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % MEASURE_EVERY == 0 or reward > target_reward / 2:
            reward = _expected_reward(model, checked)
        if step % LOG_EVERY == 0:
            logger.info(
                "warm start: step %d, loss %.3f, expected reward %.3f", step, loss.item(), reward
            )
        if time.monotonic() - start > deadline_s and reward < target_reward:
            raise RunError(
                f"the warm start has an expected reward of {reward:.3f} after {step} steps, {deadline_s:g} s,"
                f" not rehearsal.target_reward={target_reward:g}; choose a lower one or a less busy machine"
            )
    seconds = time.monotonic() - start
    logger.info("warm start: %d steps, %.1f s, expected reward %.3f", step, seconds, reward)
    return model, {"steps": step, "reward": reward, "seconds": seconds}


@torch.no_grad()
def _expected_reward(model: Qwen3ForCausalLM, checked: Encoded) -> float:
    """Mean probability of the right answer at temperature 1: the expected exact match, without noise."""
    return _answer_logprobs(model, *checked).sum(1).exp().mean().item()


def _answer_logprobs(model: Qwen3ForCausalLM, prompts: Tensor, answers: Tensor) -> Tensor:
    """[N, A]: log p of each answer token after its prompt and the answer before it; [N, P], [N, A] ids."""
    logits = model(input_ids=torch.cat([prompts, answers], dim=1), use_cache=False).logits
    predicting = logits[:, prompts.shape[1] - 1 : -1]  # position t predicts token t + 1
    return predicting.log_softmax(-1).gather(-1, answers.unsqueeze(-1)).squeeze(-1)


def _encode(problems: list[Problem], tokenizer: PreTrainedTokenizerFast) -> Encoded:
    """A task's problems are equally long."""
    encode = tokenizer.backend_tokenizer.encode_batch
    prompts = [encoding.ids for encoding in encode([problem.prompt for problem in problems])]
    answers = [[*encoding.ids, EOS] for encoding in encode([problem.label for problem in problems])]
    return torch.tensor(prompts), torch.tensor(answers)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread: deterministic sums, and no fight over the cores for matrices of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_rows(path: Path, problems: list[Problem]) -> None:
    path.write_text("".join(json.dumps(problem._asdict()) + "\n" for problem in problems))
