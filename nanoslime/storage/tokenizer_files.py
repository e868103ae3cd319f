"""What the login node reads in the files of a tokenizer, without transformers."""

from pathlib import Path

from nanoslime.storage.json_file import read_object
from nanoslime.types import RunError


def check_vocabulary(directory: Path, vocab_size: int) -> None:
    """Raises RunError where a tokenizer's JSON has tokens that the model has no embedding for."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        file = directory / "vocab.json"
    try:
        num_tokens = _num_tokens(file)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{file}, or a file of added tokens beside it, is not as a tokenizer's is ({error}); "
            "fetch the checkpoint anew"
        ) from error
    if num_tokens > vocab_size:
        raise RunError(
            f"{file} has {num_tokens} tokens, and the model's vocab_size={vocab_size} rows of "
            "embeddings are fewer; use the checkpoint's own tokenizer, or extend the embeddings"
        )


def _num_tokens(file: Path) -> int:
    content = read_object(file)
    if file.name == "vocab.json":
        content = {"model": {"vocab": content}}
    vocabulary = content.get("model", {}).get("vocab", {})
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    added = [token["id"] for token in content.get("added_tokens", [])]
    added += read_object(file.with_name("added_tokens.json")).values()
    decoder = read_object(file.with_name("tokenizer_config.json")).get("added_tokens_decoder", {})
    added += [int(token_id) for token_id in decoder]
    return max([*ids, *added], default=-1) + 1
