"""What the login node says of prompts is what the job would say: template, length, vocabulary."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanoslime.config import DataConfig
from nanoslime.rollout.prompts import load_prompts
from nanoslime.storage.prompt_files import read_prompts
from nanoslime.storage.prompt_text import prompt_text
from nanoslime.storage.tokenizer_files import check_vocabulary
from nanoslime.types import RunError
from tests.serving import save_byte_tokenizer
from tools.submit.chat_template import compile_template
from tools.submit.prompts import check_prompts
from tools.submit.tokenizer_files import TokenizerFiles

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{{ m.content }}{% endfor %}"
)
THINKING = (
    "{{ bos_token }}{%- for m in messages -%}<{{ m['role'] }}>{{ m['content'] | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>"
    "{% endif %}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{% generation %}{{ m | tojson }}{% endgeneration %}{{ strftime_now('%Y') }}\n{% endfor %}"
)
USER = {"role": "user", "content": " hé "}
SYSTEM = {"role": "system", "content": "s"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A tokenizer of bytes, without a chat template."""
    save_byte_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    return tmp_path


def with_template(directory: Path, template: str) -> PreTrainedTokenizerBase:
    (directory / "chat_template.jinja").write_text(template)
    return AutoTokenizer.from_pretrained(directory)


def write(directory: Path, *rows: Any) -> Path:
    path = directory / "p.jsonl"
    path.write_text("".join(json.dumps({"label": 1, **row}) + "\n" for row in rows))
    return path


def refusals(path: Path, directory: Path, **data: Any) -> set[str]:
    """What login node and job say; one line where they agree."""
    config = DataConfig(**data)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    said = set()
    with pytest.raises(RunError) as on_login_node:
        check_prompts(path, config, directory)
    said.add(str(on_login_node.value))
    with pytest.raises(RunError) as in_job:
        load_prompts(tokenizer, replace(config, prompts=str(path)))
    said.add(str(in_job.value))
    return said


@pytest.mark.parametrize("template", [THINKING, MARKED])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
@pytest.mark.parametrize("messages", [[USER], [SYSTEM, USER], [USER, SYSTEM, USER]])
def test_templates_render_as_transformers_renders_them(directory, template, variables, messages):
    tokenizer = with_template(directory, template)
    tokenizer.bos_token = "<s>"
    tokenizer.save_pretrained(directory)
    special = TokenizerFiles.read(directory).special_tokens
    assert special["bos_token"] == "<s>"
    rendered = compile_template(template, special | variables)(messages)
    expected = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **variables
    )
    assert rendered == expected


def test_variables_reach_the_template(directory):
    tokenizer = with_template(directory, THINKING)
    path = write(directory, {"prompt": "a"})
    for variables, end in ({}, ""), ({"enable_thinking": False}, "<think></think>"):
        data = DataConfig(chat_template_kwargs=variables)
        (prompt,) = load_prompts(tokenizer, replace(data, prompts=str(path)))
        assert prompt.text == f"<user>a\n<assistant>{end}"
        check_prompts(path, data, directory)


def test_a_template_that_fails_is_refused_with_the_line_of_the_first_such_prompt(directory):
    with_template(directory, NO_SYSTEM)
    path = write(directory, {"prompt": "a"}, {"prompt": [USER]}, {"prompt": [SYSTEM, USER]})
    (said,) = refusals(path, directory)
    assert said.startswith(
        f"{path}:3: the chat template fails on messages of system, user: System role not supported"
    )
    (said,) = refusals(write(directory, {"prompt": "a"}), directory, system_prompt="x")
    assert ":1: the chat template fails on messages of system, user" in said


@pytest.mark.parametrize(
    ("rows", "data", "says"),
    [
        ([{"prompt": [USER]}], {}, "p.jsonl:1: a prompt of chat messages needs a chat template"),
        ([{"prompt": "a"}], {"chat_template": "on"}, "the tokenizer has no chat template; use"),
        ([{"prompt": "a"}], {"system_prompt": "x"}, "data.system_prompt needs a chat template"),
        (
            [{"prompt": "a"}],
            {"chat_template_kwargs": {"enable_thinking": False}},
            "data.chat_template_kwargs needs a chat template",
        ),
        (
            [{"prompt": "a"}, {"prompt": "b" * 40}],
            {"max_prompt_tokens": 39},
            "p.jsonl:2: a prompt of 40 tokens is over data.max_prompt_tokens=39; raise it, or set",
        ),
        (
            [{"prompt": "a" * 40}, {"prompt": "b" * 50}],
            {"max_prompt_tokens": 39, "over_long": "skip"},
            "p.jsonl: every prompt is over data.max_prompt_tokens=39; raise it",
        ),
    ],
)
def test_login_node_and_job_refuse_with_the_same_line(directory, rows, data, says):
    (said,) = refusals(write(directory, *rows), directory, **data)
    assert says in said
    assert "\n" not in said


def test_one_prompt_that_is_short_enough_does_where_others_are_skipped(directory):
    path = write(directory, {"prompt": "a" * 40}, {"prompt": "b" * 39})
    check_prompts(path, DataConfig(max_prompt_tokens=39, over_long="skip"), directory)


def test_without_the_files_of_a_tokenizer_rows_are_checked_all_the_same(tmp_path):
    path = write(tmp_path, {"prompt": "a" * 9000}, {"prompt": [USER]})
    check_prompts(path, DataConfig(), None)
    with pytest.raises(RunError, match="p.jsonl:2: a prompt is a string or a list"):
        check_prompts(write(tmp_path, {"prompt": "a"}, {"prompt": 5}), DataConfig(), None)


def test_templates_are_found_where_transformers_finds_them(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text())
    assert TokenizerFiles.read(directory).chat_template(has_tools=False) is None
    file.write_text(json.dumps(config | {"chat_template": "one"}))
    assert TokenizerFiles.read(directory).chat_template(has_tools=True) == "one"
    named = [{"name": name, "template": name[0]} for name in ("default", "tool_use")]
    file.write_text(json.dumps(config | {"chat_template": named}))
    files = TokenizerFiles.read(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for tools in ([], [{"type": "function"}]):
        expected = tokenizer.get_chat_template(tools=tools or None)
        assert files.chat_template(has_tools=bool(tools)) == expected
    tokenizer = with_template(directory, "three")
    assert TokenizerFiles.read(directory).chat_template(has_tools=False) == "three"
    assert tokenizer.get_chat_template() == "three"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer_config.json", b"{", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", b"[]", "should hold one JSON object, not list"),
        ("chat_template.jinja", b"\xe9", "chat_template.jinja cannot be read"),
        ("chat_template.jinja", b"{% if %}", "the chat template is not jinja2: "),
    ],
)
def test_a_tokenizer_file_that_cannot_be_read_is_named(directory, name, content, says):
    (directory / name).write_bytes(content)
    with pytest.raises(RunError, match=says):
        check_prompts(write(directory, {"prompt": "a"}), DataConfig(), directory)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(directory):
    check_vocabulary(directory, 256)
    with pytest.raises(RunError, match="tokenizer.json has 256 tokens, and the model's vocab_size"):
        check_vocabulary(directory, 255)
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"] = [{"id": 299, "content": "<x>"}]
    file.write_text(json.dumps(content))
    with pytest.raises(RunError, match="has 300 tokens, and the model's vocab_size=299 rows"):
        check_vocabulary(directory, 299)
    content["model"]["vocab"] = [["a", 0.0]] * 305
    file.write_text(json.dumps(content))
    with pytest.raises(RunError, match="has 305 tokens"):
        check_vocabulary(directory, 304)


def test_a_prompt_without_a_template_is_its_own_text(directory):
    (record,) = read_prompts(write(directory, {"prompt": "a"}), DataConfig())
    assert prompt_text(record, DataConfig(), None) == "a"


def test_login_node_and_job_count_the_same(directory, caplog):
    """With rows of every kind that is left out, and a tokenizer that has a byte as a token."""
    tokenizer = with_template(directory, NO_SYSTEM)
    path = write(directory, *[{"prompt": text} for text in ("a", "a", "b" * 40, "c", "b" * 40)])
    with path.open("a") as file:
        file.write('{broken\n{"prompt": "", "label": 1}\n')
        file.write(json.dumps({"prompt": [SYSTEM, USER], "label": 1}) + "\n")
        file.write(json.dumps({"prompt": [SYSTEM, USER], "label": 2}) + "\n")
    settings = {"max_prompt_tokens": 39, "over_long": "skip", "broken": "skip"}
    for deduplicate, num_used, what in (False, 3, "kept (data.dedup"), (True, 2, "left out"):
        data = DataConfig(**settings, deduplicate=deduplicate)
        caplog.clear()
        assert len(load_prompts(tokenizer, replace(data, prompts=str(path)))) == num_used
        text = check_prompts(path, data, directory).text
        assert caplog.messages == [f"{path}: {text}"]
        assert text.startswith(f"{num_used} prompts; 2 of over 39 tokens are left out; 1 that rep")
        assert what in text
        assert f"; 4 broken rows are left out, first: {path}:6: not a line of JSON" in text


def test_where_every_row_is_left_out_login_node_and_job_refuse_with_the_same_line(directory):
    with_template(directory, NO_SYSTEM)
    path = write(directory, {"prompt": [SYSTEM, USER]}, {"prompt": "b" * 40})
    settings = {"max_prompt_tokens": 39, "over_long": "skip", "broken": "skip"}
    (said,) = refusals(path, directory, **settings)
    assert said.startswith(f"{path}: no prompt is left; 0 prompts; 1 of over 39 tokens")
    (said,) = refusals(write(directory, {"prompt": 5}), directory, **settings)
    assert said.startswith(f"{path}: each of 1 rows is broken: {path}:1: a prompt is a string")
