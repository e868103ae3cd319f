"""Attention over packs is that of each sequence alone, and makes no mask of the whole pack."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from nanoslime.batch import MicroBatch, TrainBatch
from nanoslime.training.flash_attention import Pack
from nanoslime.training.fsdp_model import Policy
from nanoslime.training.packed_attention import PACKED, _attend
from nanoslime.types import RunError

VOCAB = 61
LENGTHS = [1, 7, 30, 2, 19, 19]
WINDOW = 5
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
)
EXPERTS = dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
# name: (family, settings, how attention is computed)
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "grouped heads": ("Qwen3", dict(head_dim=16), PACKED),
    "a head for each": ("Llama", dict(num_key_value_heads=4), PACKED),
    "a window in all layers": ("Mistral", dict(sliding_window=WINDOW), PACKED),
    "a window in some layers": (
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
        PACKED,
    ),
    "a window that only the mask knows": (
        "Qwen2Moe",
        dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2, **EXPERTS),
        PACKED,
    ),
    "a window longer than all": ("Mistral", dict(sliding_window=64), PACKED),
    "values narrower than keys": (
        "DeepseekV3",
        dict(
            num_key_value_heads=4,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=6,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            moe_intermediate_size=16,
        ),
        PACKED,
    ),
    "capped logits": (
        "Gemma2",
        dict(
            head_dim=8, attn_logit_softcapping=0.5, final_logit_softcapping=None, sliding_window=5
        ),
        "eager",
    ),
}


def make_model(family: str, settings: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | settings)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def make_pack(lengths: list[int]) -> MicroBatch:
    generator = torch.Generator().manual_seed(1)
    batch = TrainBatch(
        token_ids=[torch.randint(0, VOCAB, (length,), generator=generator) for length in lengths],
        loss_mask=[torch.ones(length, dtype=torch.bool) for length in lengths],
        rollout_logprobs=[torch.zeros(length) for length in lengths],
        advantages=[1.0] * len(lengths),
        token_weights=[1.0] * len(lengths),
        microbatches=[list(range(len(lengths)))],
        denominator=1.0,
        num_tokens=sum(lengths),
        num_sequences=len(lengths),
        temperature=1.0,
    )
    return batch.microbatch(range(len(lengths)))


def with_gradients(logprobs: Tensor, model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    """The logprobs, and the gradients of their sum, each token weighted differently."""
    model.zero_grad()
    (logprobs * torch.linspace(0.5, 1.5, len(logprobs))).sum().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.clone()
    return logprobs.detach(), gradients


def one_at_a_time(model: PreTrainedModel, pack: MicroBatch) -> Tensor:
    """Logprobs [T] by the model's own code, each sequence in a forward of its own."""
    model.set_attn_implementation("eager")
    logprobs = []
    for token_ids in pack.token_ids.split(pack.lengths):
        logits = model(input_ids=token_ids[None]).logits[0]
        following = logits[:-1].log_softmax(-1).gather(1, token_ids[1:, None])[:, 0]
        logprobs.append(torch.cat([torch.zeros(1), following]))
    return torch.cat(logprobs)


@pytest.mark.parametrize("name", CASES)
def test_logprobs_and_gradients_are_those_of_each_sequence_alone(name):
    family, settings, attention = CASES[name]
    model = make_model(family, settings)
    pack = make_pack(LENGTHS)
    expected, expected_gradients = with_gradients(one_at_a_time(model, pack), model)

    policy = Policy(model)
    assert model.config._attn_implementation == attention
    logprobs, gradients = with_gradients(policy(pack)[0], model)

    torch.testing.assert_close(logprobs, expected, rtol=0, atol=5e-6)
    assert gradients.keys() == expected_gradients.keys()
    for parameter, gradient in expected_gradients.items():
        largest = gradient.abs().max().clamp(min=1e-3)
        assert (gradients[parameter] - gradient).abs().max() <= 1e-5 * largest, parameter


@pytest.mark.parametrize("name", ["grouped heads", "a window in some layers"])
def test_logprobs_and_gradients_are_those_with_a_mask(name):
    family, settings, _ = CASES[name]
    model = make_model(family, settings)
    pack = make_pack(LENGTHS)
    policy = Policy(model)
    logprobs, gradients = with_gradients(policy(pack)[0], model)
    policy._attention = "sdpa"
    model.set_attn_implementation("sdpa")
    expected, expected_gradients = with_gradients(policy(pack)[0], model)
    torch.testing.assert_close(logprobs, expected, rtol=1e-6, atol=1e-6)
    for parameter, gradient in expected_gradients.items():
        gap = (gradients[parameter] - gradient).abs().max()
        assert gap <= 1e-5 * gradient.abs().max(), parameter


class Operators(TorchDispatchMode):
    """Notes the operators that run, and the largest tensor that one of them gives."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        self.names.add(str(func))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.untyped_storage().nbytes())
        return result


def test_memory_grows_with_the_tokens_not_with_their_square():
    policy = Policy(make_model("Qwen2", CASES["a window in some layers"][1]))
    largest = []
    for num_sequences in (16, 64):
        with Operators() as operators:
            policy(make_pack([16] * num_sequences))
        largest.append(operators.largest)
    assert largest[1] == 4 * largest[0]


def attend_on_cuda(dtype: torch.dtype, head_dim: int, value_dim: int, window: int | None):
    """The operators of a pack's attention on a GPU, and the shape of its result."""
    with FakeTensorMode(), Operators() as operators:
        query = torch.empty(1, 4, 60, head_dim, dtype=dtype, device="cuda")
        key = torch.empty(1, 2, 60, head_dim, dtype=dtype, device="cuda")
        value = torch.empty(1, 2, 60, value_dim, dtype=dtype, device="cuda")
        cu_seqlens = torch.empty(4, dtype=torch.int32, device="cuda")
        packed = Pack([10, 20, 30], cu_seqlens)
        out, _ = _attend(
            torch.nn.Module(), query, key, value, window, scaling=0.1, packed_sequences=packed
        )
    return operators.names, tuple(out.shape)


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "value_dim", "varlen"),
    [
        (torch.bfloat16, 128, 128, True),
        (torch.bfloat16, 192, 128, True),
        (torch.bfloat16, 128, 192, False),
        (torch.bfloat16, 512, 512, False),
        (torch.bfloat16, 100, 100, False),
        (torch.float32, 128, 128, False),
    ],
)
def test_cuda_takes_the_kernel_for_packs_where_it_serves(
    dtype, head_dim, value_dim, varlen, window
):
    names, shape = attend_on_cuda(dtype, head_dim, value_dim, window)
    assert shape == (1, 60, 4, value_dim)
    assert ("torch_attn._varlen_attn.default" in names) == varlen


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("GptOss", dict(head_dim=8, num_local_experts=4, num_experts_per_tok=2)),
        ("Qwen3Next", dict(head_dim=8, shared_expert_intermediate_size=16, **EXPERTS)),
    ],
)
def test_layers_that_mix_packed_sequences_are_refused(family, settings):
    with pytest.raises(RunError, match=f"{family}ForCausalLM has layers that do not keep"):
        Policy(make_model(family, settings))


def test_logits_that_are_more_than_scaled_are_refused():
    query = torch.zeros(1, 2, 3, 4)
    packed = Pack([3], torch.tensor([0, 3], dtype=torch.int32))
    with pytest.raises(RunError, match="gives its attention s_aux"):
        _attend(torch.nn.Module(), query, query, query, None, packed_sequences=packed, s_aux=query)


def test_a_pack_knows_its_lengths_without_asking_the_device():
    pack = make_pack(LENGTHS)
    assert pack.lengths == LENGTHS
    assert pack.to(torch.device("meta")).lengths == LENGTHS
    assert pack.cu_seqlens.diff().tolist() == LENGTHS
