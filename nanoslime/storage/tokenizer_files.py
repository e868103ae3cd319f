"""What the login node reads in the files of a tokenizer, without transformers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoslime.storage.json_file import read_object, read_text
from nanoslime.types import RunError

# Templates use them as texts, also where a tokenizer lacks one.
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    # By name; "default" and perhaps "tool_use".
    chat_templates: dict[str, str]
    special_tokens: dict[str, str]

    @classmethod
    def read(cls, directory: Path) -> "TokenizerFiles":
        """As transformers finds them: files of templates go before tokenizer_config.json.

        Raises RunError for a file that cannot be read.
        """
        config = read_object(directory / "tokenizer_config.json")
        values = read_object(directory / "special_tokens_map.json") | config
        special_tokens = dict.fromkeys(_SPECIAL_TOKENS, "")
        for name, value in values.items():
            token = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(token, str):
                special_tokens[name] = token
        files = {file.stem: file for file in directory.glob("additional_chat_templates/*.jinja")}
        default = directory / "chat_template.jinja"
        if default.is_file():
            files["default"] = default
        templates = {name: read_text(file) for name, file in files.items()}
        return cls(templates or _templates_of(config), special_tokens)

    def chat_template(self, *, has_tools: bool) -> str | None:
        if has_tools and "tool_use" in self.chat_templates:
            return self.chat_templates["tool_use"]
        return self.chat_templates.get("default")


def has_tokenizer_files(directory: Path) -> bool:
    """Whether there is what says if a tokenizer has a chat template."""
    names = ("tokenizer_config.json", "chat_template.jinja")
    return any((directory / name).is_file() for name in names)


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


def _templates_of(config: dict[str, Any]) -> dict[str, str]:
    """The templates in tokenizer_config.json: a text, or a list of named ones."""
    found = config.get("chat_template") or {}
    if isinstance(found, str):
        return {"default": found}
    try:
        if isinstance(found, list):
            return {template["name"]: template["template"] for template in found}
        return dict(found)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"tokenizer_config.json: chat_template={found!r} is no template, and no list of named "
            "ones; fetch the checkpoint anew"
        ) from error
