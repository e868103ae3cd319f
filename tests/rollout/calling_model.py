"""A tiny real model, with weights set by hand, that calls the calculator and ends its answers.

Its next token depends on the last one only: embedding and output layer hold a table of
likelihoods, attention and MLP add nothing at first. Training changes all of it.
"""

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from nanoslime.rehearsal import build_tokenizer

_HIDDEN = 16
# What follows each kind of token, with its logit; all else is 12 below.
_LIKELY = {
    "=": {"<calc>": 5.0, "digit": 2.0},
    "<calc>": {"digit": 3.0},
    "digit": {"digit": 1.0, "+": 2.0, "</calc>": 4.0, "<eos>": 3.0},
    "+": {"digit": 3.0},
    ">": {"digit": 3.0},
    "</calc>": {"<eos>": 3.0},
}
_DIGITS = "0123456789"


def save_calling_model(path: Path) -> Path:
    """Prompts end with "=" and a further turn begins after "=" or ">"."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<calc>", "</calc>"])
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=320,
        hidden_size=_HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    kinds = [*_LIKELY, "other"]
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight.zero_()
        embedding[:, kinds.index("other")] = 1.0
        head = model.lm_head.weight.fill_(-12.0 / _HIDDEN**0.5)
        for number, (kind, likely) in enumerate(_LIKELY.items()):
            for token in _ids(kind, tokenizer):
                embedding[token] = torch.eye(_HIDDEN)[number]
            for follower, logit in likely.items():
                followers = _ids(follower, tokenizer)
                head[followers, number] = logit / _HIDDEN**0.5
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(path)
    return path


def _ids(kind: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    tokens = _DIGITS if kind == "digit" else [kind]
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


def tokenizer_of(path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(path)
