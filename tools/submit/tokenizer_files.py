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
