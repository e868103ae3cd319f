"""What a checkpoint computes: by transformers for Hugging Face's, by GPTModel for
Megatron's.
"""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from nanoslime.types import RunError
from tools.conversion import gpt_logits
from tools.conversion.checkpoint import HUGGING_FACE, Checkpoint


@torch.no_grad()
def logits(checkpoint: Checkpoint, num_tokens: int) -> Tensor:
    """[num_tokens, vocab_size] in float32; every checkpoint of one shape gets the same
    random tokens.

    Raises RunError for a model that megatron-core cannot compute.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(checkpoint.shape.vocab_size, (num_tokens,), generator=generator)
    if checkpoint.format == HUGGING_FACE:
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, dtype=torch.float32, attn_implementation="eager"
        )
        return model.eval()(tokens[None]).logits[0]
    try:
        return gpt_logits.logits(checkpoint.shape, checkpoint.path, tokens)
    except ValueError as error:
        raise RunError(f"{checkpoint.path}: {error}") from error
