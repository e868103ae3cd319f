"""Conversations as token ids: a beginning, and the messages after a response of the model.

What the model has written is never rendered again. A chat template may write an earlier
response otherwise than it was sampled (without its thoughts, say), and its text may have
other tokens than were sampled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]

# A response whose end is looked for in a rendered conversation.
_RESPONSE = "@@the response of the model@@"


@dataclass(frozen=True, slots=True)
class Chat:
    """Without a chat template the contents of messages stand one after the other."""

    tokenizer: PreTrainedTokenizerBase
    # Variables of the chat template; None where none is applied.
    template_kwargs: Mapping[str, Any] | None = None

    def start(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """The tokens of a conversation up to where the model's response begins.

        Raises whatever the chat template raises of messages that it refuses.
        """
        if self.template_kwargs is None:
            return self._encode(_contents(messages), special=True)
        return self._encode(self.render(messages, **variables))

    def following(
        self, token_ids: Sequence[int], messages: Sequence[Message], **variables: Any
    ) -> list[int]:
        """The tokens to put after `token_ids`, which end with a response of the model.

        They are what the template writes after a response: its end, where the model has not
        written it, `messages`, and the beginning of the next response. Raises ValueError for
        a template that writes no response, and whatever the template raises.
        """
        if self.template_kwargs is None:
            return self._encode(_contents(messages))
        question = {"role": "user", "content": "?"}
        response = {"role": "assistant", "content": _RESPONSE}
        text = self.render([question, response, *messages], **variables)
        _, found, after = text.rpartition(_RESPONSE)
        if not found:
            raise ValueError("the chat template leaves out the response of the assistant")
        new = self._encode(after)
        # The model may have sampled the token that ends a response itself.
        is_there = new and token_ids and new[0] == token_ids[-1]
        if is_there and new[0] in self.tokenizer.added_tokens_decoder:
            return new[1:]
        return new

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """The text of a conversation up to where the model's response begins."""
        given = {**(self.template_kwargs or {}), **variables}
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, **given
            )
        )

    def _encode(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=special))


def _contents(messages: Sequence[Message]) -> str:
    return "".join(str(message["content"] or "") for message in messages)
