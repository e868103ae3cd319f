"""What follows a response is what the chat template writes there, once."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanoslime.config import DataConfig, RunConfig
from nanoslime.models.shape import ModelShape
from nanoslime.rehearsal import build_tokenizer
from nanoslime.rollout.chat import Chat
from nanoslime.rollout.policy import ServedModel
from nanoslime.types import RunError

USER = {"role": "user", "content": "1+1?"}
AGAIN = {"role": "user", "content": "sure?"}
# As Qwen's: it writes the default system message, and drops thoughts of earlier turns.
IM = (
    "{% if messages[0].role != 'system' %}<im>system\nhelp<eos>\n{% endif %}"
    "{% for m in messages %}<im>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<eos>\n"
    "{% endfor %}{% if add_generation_prompt %}<im>assistant\n"
    "{% if think is defined %}<think>{% endif %}{% endif %}"
)
# As GLM's: the next role ends a response.
ROLES = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer_with(template: str) -> PreTrainedTokenizerBase:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<im>", "<user>", "<assistant>"], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [IM, ROLES])
@pytest.mark.parametrize("variables", [{}, {"think": True}])
def test_turns_are_those_of_the_whole_conversation(template, variables) -> None:
    tokenizer = tokenizer_with(template)
    chat = Chat(tokenizer, variables)
    response = {"role": "assistant", "content": "2"}
    end = "<eos>" if template is IM else "<user>"
    sampled = tokenizer.encode(f"2{end}")
    start = chat.start([USER])
    whole = tokenizer.apply_chat_template(
        [USER, response, AGAIN], tokenize=False, add_generation_prompt=True, **variables
    )
    begun = tokenizer.decode(start).removesuffix("<think>") + "2"
    for tokens in (sampled, sampled[:-1]):  # with its end token, and truncated
        turns = [*start, *tokens, *chat.following([*start, *tokens], [AGAIN])]
        text = tokenizer.decode(turns)
        assert text.replace("<think>2", "2") == whole and text.startswith(begun[:5])


def test_thoughts_stay_where_they_were_sampled() -> None:
    chat = Chat(tokenizer_with(IM), {})
    tokens = chat.tokenizer.encode("hm</think>2<eos>")
    following = chat.following(tokens, [AGAIN])
    assert chat.tokenizer.decode(following) == "\n<im>user\nsure?<eos>\n<im>assistant\n"


def test_a_last_character_that_the_template_also_writes_is_written_twice() -> None:
    """Only a token that ends a response is not repeated."""
    tokenizer = tokenizer_with("{% for m in messages %}{{ m.content }}.{% endfor %}")
    chat = Chat(tokenizer, {})
    assert tokenizer.decode(chat.following(tokenizer.encode("2."), [AGAIN])) == ".sure?."


def test_without_a_template_contents_stand_one_after_the_other() -> None:
    chat = Chat(build_tokenizer())
    assert chat.tokenizer.decode(chat.start([USER, AGAIN])) == "1+1?sure?"
    assert chat.tokenizer.decode(chat.following([1], [AGAIN])) == "sure?"


def test_a_template_that_writes_no_response_is_refused() -> None:
    chat = Chat(tokenizer_with("{{ messages[0].content }}"), {})
    with pytest.raises(ValueError, match="leaves out the response of the assistant"):
        chat.following([1], [AGAIN])


@pytest.mark.parametrize(
    "data, kwargs",
    [
        ({}, {}),
        ({"chat_template": "off"}, None),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
    ],
)
def test_the_configuration_decides_on_the_template(tiny_model: Path, data, kwargs) -> None:
    config = RunConfig(data=DataConfig(**data))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = ServedModel.of(config, None, tokenizer, ModelShape.read(tiny_model))
    assert model.chat == Chat(tokenizer, kwargs)
    assert model.context_length == 4096


def test_a_template_that_is_not_there_is_refused(tiny_model: Path) -> None:
    config = RunConfig(data=DataConfig(chat_template="on"))
    with pytest.raises(RunError, match="has no chat template"):
        ServedModel.of(config, None, build_tokenizer(), ModelShape.read(tiny_model))
