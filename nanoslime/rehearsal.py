"""What a rehearsal trains on: a tiny Qwen3, half taught, and the digit problems to finish on.

The warm start is deliberately plain: one process, one thread, PyTorch and transformers,
next-token loss. It shares nothing with the trainers that the rehearsal is there to exercise,
and it is no recipe for supervised fine-tuning.

Its demonstrations are faulty: a share of their digits is wrong. A model that imitates them well
knows where each digit comes from, but samples the right answer about as often as its teacher
shows it, and that holds for every seed. GRPO, which sees no demonstration, has to prefer the
right ones among its own answers. Without the faults the same reward is met in the middle of a
steep climb, and how far GRPO then comes depends on the seed.
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
from nanoslime.models.tiny import (
    EOS,
    PAD,
    SPECIAL_TOKENS,
    Problem,
    digit_problems,
    tiny_qwen3_config,
)
from nanoslime.storage import commit
from nanoslime.storage.shared_files import publish_json, read_json
from nanoslime.types import RunError

logger = logging.getLogger(__name__)

# training problems that the warm start is not shown, but measured on
NUM_CHECKED = 400
# how much the faultless share of demonstrations exceeds the target reward, so that imitation
# reaches the target
TEACHER_LEAD = 1.1
MEASURE_EVERY_STEPS = 5
LOG_EVERY_STEPS = 50
BATCH_SIZE = 128
LR = 2e-3
WARMUP_STEPS = 20
SUMMARY = "rehearsal.json"


@dataclass(frozen=True, slots=True)
class RehearsalFiles:
    model: Path  # Hugging Face checkpoint with tokenizer
    train: Path  # JSON lines {"prompt", "label"}
    held_out: Path


@dataclass(frozen=True, slots=True)
class EncodedProblems:
    """Problems as token ids. All prompts of a task are equally long, and so are all answers."""

    prompts: Tensor  # int64 [N, P]
    answers: Tensor  # int64 [N, A], the end token included

    def __len__(self) -> int:
        return len(self.prompts)


def make(directory: Path, knobs: RehearsalConfig, deadline_s: float = 120.0) -> RehearsalFiles:
    """Makes `directory` with model/, train.jsonl, held_out.jsonl and rehearsal.json.

    It is there whole or not at all. The same knobs make the same files. A directory made before
    with these knobs is taken as it is; one made with others is replaced. Raises RunError when
    the warm start has not reached `target_reward` within `deadline_s`.
    """
    files = RehearsalFiles(
        model=directory / "model",
        train=directory / "train.jsonl",
        held_out=directory / "held_out.jsonl",
    )
    summary = directory / SUMMARY
    if summary.is_file() and read_json(summary)["knobs"] == asdict(knobs):
        logger.info("rehearsal: %s is there already", directory)
        return files
    train, held_out = digit_problems(knobs.task, knobs.seed, knobs.num_held_out)
    tokenizer = build_tokenizer()
    with _one_thread():
        checked = _encode(train[:NUM_CHECKED], tokenizer)
        shown = _encode(train[NUM_CHECKED:], tokenizer)
        model, warm_start = _warm_start(checked, shown, knobs, deadline_s)
    partial = commit.partial_dir(directory)
    model.save_pretrained(partial / "model")
    tokenizer.save_pretrained(partial / "model")
    _write_rows(partial / files.train.name, train)
    _write_rows(partial / files.held_out.name, held_out)
    publish_json(partial / SUMMARY, {"knobs": asdict(knobs), "warm_start": warm_start})
    commit.commit(partial, directory)
    return files


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer in which every byte is one token, without merges; ids are those of
    models/tiny.py.
    """
    vocab = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ids = {token: index for index, token in enumerate(vocab)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ("pad_token", "bos_token", "eos_token", "unk_token")
    special_tokens = dict(zip(names, SPECIAL_TOKENS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


def _warm_start(
    checked: EncodedProblems, shown: EncodedProblems, knobs: RehearsalConfig, deadline_s: float
) -> tuple[Qwen3ForCausalLM, dict[str, float]]:
    """A new model, taught from `shown` until a sample at temperature 1 is right often enough; and
    the steps and the seconds that this took, with the reward that was reached.

    "Often enough" is the probability `target_reward`, measured on the problems `checked`: the
    reward is the expected exact match of a sample.
    """
    target_reward = knobs.target_reward
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(knobs.seed)
        model = Qwen3ForCausalLM(Qwen3Config.from_dict(tiny_qwen3_config())).float()
        # transformers makes this row 0. The policy may sample the token, and the gradient of a norm
        # at 0 is a thousand times that of the others.
        embedding = model.get_input_embeddings().weight.data
        embedding[PAD].normal_(std=model.config.initializer_range)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    demonstrations = _demonstrations(shown, _fault_rate(shown, target_reward), knobs.seed)
    start = time.monotonic()
    step = 0
    reward = 0.0
    while reward < target_reward:
        step += 1
        optimizer.param_groups[0]["lr"] = LR * min(1.0, step / WARMUP_STEPS)
        batch = next(demonstrations)
        loss = -_answer_logprobs(model, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        is_close = reward > target_reward / 2
        if is_close or step % MEASURE_EVERY_STEPS == 0:
            reward = _expected_reward(model, checked)
        if step % LOG_EVERY_STEPS == 0:
            logger.info(
                "warm start: step %d, loss %.3f, expected reward %.3f", step, loss.item(), reward
            )
        if reward < target_reward and time.monotonic() - start > deadline_s:
            raise RunError(
                f"the warm start has an expected reward of {reward:.3f} after {step} steps, "
                f"{deadline_s:g} s, not rehearsal.target_reward={target_reward:g}; "
                "choose a lower one or a less busy machine"
            )
    seconds = time.monotonic() - start
    logger.info("warm start: %d steps, %.1f s, expected reward %.3f", step, seconds, reward)
    return model, {"steps": step, "reward": reward, "seconds": seconds}


def _fault_rate(problems: EncodedProblems, target_reward: float) -> float:
    """The share of wrong digits with which a whole answer is right a little above the target."""
    num_digits = problems.answers.shape[1] - 1
    right_answers = TEACHER_LEAD * target_reward
    return max(0.0, 1 - right_answers ** (1 / num_digits))


def _demonstrations(
    shown: EncodedProblems, fault_rate: float, seed: int
) -> Iterator[EncodedProblems]:
    """Endless random batches in which each digit is, at `fault_rate`, that of another answer.

    The end token is never at fault, because it is the same in all answers.
    """
    generator = torch.Generator().manual_seed(seed)
    answer_length = shown.answers.shape[1]
    while True:
        picked, others = torch.randint(len(shown), (2, BATCH_SIZE), generator=generator)
        is_wrong = torch.rand(BATCH_SIZE, answer_length, generator=generator) < fault_rate
        answers = torch.where(is_wrong, shown.answers[others], shown.answers[picked])
        yield EncodedProblems(shown.prompts[picked], answers)


@torch.no_grad()
def _expected_reward(model: Qwen3ForCausalLM, checked: EncodedProblems) -> float:
    """Mean probability of the right answer at temperature 1: the expected exact match,
    without noise.
    """
    answer_probs = _answer_logprobs(model, checked).sum(dim=1).exp()
    return answer_probs.mean().item()


def _answer_logprobs(model: Qwen3ForCausalLM, problems: EncodedProblems) -> Tensor:
    """[N, A]: log p of each answer token, given its prompt and the answer before it."""
    token_ids = torch.cat([problems.prompts, problems.answers], dim=1)
    logits = model(input_ids=token_ids, use_cache=False).logits
    prompt_length = problems.prompts.shape[1]
    predicting = logits[:, prompt_length - 1 : -1]  # position t predicts token t + 1
    logprobs = predicting.log_softmax(-1)
    return logprobs.gather(-1, problems.answers.unsqueeze(-1)).squeeze(-1)


def _encode(problems: list[Problem], tokenizer: PreTrainedTokenizerFast) -> EncodedProblems:
    encode_batch = tokenizer.backend_tokenizer.encode_batch
    prompts = encode_batch([problem.prompt for problem in problems])
    labels = encode_batch([problem.label for problem in problems])
    return EncodedProblems(
        prompts=torch.tensor([encoding.ids for encoding in prompts]),
        answers=torch.tensor([[*encoding.ids, EOS] for encoding in labels]),
    )


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
    lines = [json.dumps(problem._asdict()) + "\n" for problem in problems]
    path.write_text("".join(lines))
