"""Prompt files, good and bad, and the order in which prompts come."""

import json
import logging
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanoslime.config import DataConfig, RunConfig
from nanoslime.models.tiny import BOS
from nanoslime.rehearsal import build_tokenizer
from nanoslime.rollout.prompts import (
    LoadedSource,
    PromptSource,
    PromptStream,
    RunPrompts,
    load_prompts,
)
from nanoslime.types import GroupReport, Prompt, RunError, SampleReport, Status

GOOD = '{"prompt": "a", "label": 1}'
LONG = '{"prompt": "abcde", "label": 1}'
GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def write(path: Path, *records: object) -> Path:
    """Writes a line per record; a text is a line as it stands."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def load(path: Path, tokenizer: PreTrainedTokenizerBase, **changes: object) -> list[Prompt]:
    config = DataConfig(**{"prompts": str(path), "chat_template": "off", **changes})
    return load_prompts(tokenizer, config)


def test_plain_prompts(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(
        tmp_path / "a's; file.jsonl",
        {"prompt": "ab", "label": "1", "metadata": {"k": 2}},
        "",
        {"prompt": "é", "label": 7},
    )
    first, second = load(path, tokenizer)
    assert first.prompt_id == 0
    assert first.text == "ab"
    assert first.label == "1"
    assert first.metadata == {"k": 2}
    assert first.token_ids.dtype == "int32"
    assert tokenizer.decode(first.token_ids) == "ab"
    assert second.prompt_id == 1
    assert second.label == 7
    # é is two bytes.
    assert len(second.token_ids) == 2


def test_a_prompt_has_one_bos_with_a_chat_template_and_without(tmp_path: Path) -> None:
    """A template writes it itself; without one the tokenizer adds it."""
    tokenizer = build_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    path = write(tmp_path / "p.jsonl", {"prompt": "ab", "label": 0})
    expected = [BOS, *tokenizer("ab", add_special_tokens=False)["input_ids"]]
    assert len(expected) == 3
    for chat_template in ("on", "off"):
        [prompt] = load(path, tokenizer, chat_template=chat_template)
        assert prompt.token_ids.tolist() == expected, chat_template


def test_a_prompt_may_have_as_many_tokens_as_are_allowed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    [prompt] = load(write(tmp_path / "p.jsonl", LONG), tokenizer, max_prompt_tokens=5)
    assert len(prompt.token_ids) == 5


def test_parquet_is_read_as_jsonl_is(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    pq.write_table(pa.table({"q": ["ab", "cd"], "a": [1, 2]}), tmp_path / "p.parquet")
    prompts = load(tmp_path / "p.parquet", tokenizer, prompt_key="q", label_key="a")
    found = [(prompt.text, prompt.label, prompt.prompt_id) for prompt in prompts]
    assert found == [("ab", 1, 0), ("cd", 2, 1)]


def test_a_broken_parquet_file_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match="broken.parquet is not a readable parquet file"):
        load(tmp_path / "broken.parquet", tokenizer)


def test_chat_template(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "?"},
    ]
    records = [{"prompt": "hi", "label": 0}, {"prompt": messages, "label": 0}]
    path = write(tmp_path / "p.jsonl", *records)
    plain, chat = load(path, tokenizer, chat_template="auto", system_prompt="Be brief.")
    assert plain.text == "[system] Be brief.\n[user] hi\n[assistant] "
    assert chat.text == "[system] Be brief.\n[user] hi\n[assistant] yes\n[user] ?\n[assistant] "
    assert tokenizer.decode(plain.token_ids) == plain.text
    without_template = r"p.jsonl:2: a prompt of chat messages needs a chat template"
    with pytest.raises(RunError, match=without_template):
        load(path, tokenizer)


@pytest.mark.parametrize(
    ("lines", "changes", "message"),
    [
        ([GOOD, '{"prompt": "b", "lab'], {}, r"p.jsonl:2: not a line of JSON"),
        (["\xff"], {}, r"p.jsonl:1: not a line of JSON"),
        (["[1]"], {}, r"p.jsonl:1: a JSON object is needed, found list"),
        (
            ['{"question": "a", "answer": 1}'],
            {},
            r"p.jsonl:1: no key 'prompt'; set data.prompt_key to one of answer, question",
        ),
        (
            ['{"prompt": "a"}'],
            {},
            r"p.jsonl:1: no key 'label'; set data.label_key to one of prompt",
        ),
        (['{"prompt": 5, "label": 1}'], {}, r"p.jsonl:1: a prompt is a string or a list"),
        (
            ['{"prompt": [{"text": "a"}], "label": 1}'],
            {},
            r"p.jsonl:1: a prompt is a string or a list",
        ),
        (['{"prompt": "", "label": 1}'], {}, r"p.jsonl:1: the prompt is empty"),
        ([], {}, r"p.jsonl holds no prompts"),
        (["", " "], {}, r"p.jsonl holds no prompts"),
        (
            [GOOD, LONG],
            {"max_prompt_tokens": 4},
            r"p.jsonl:2: a prompt of 5 tokens is over data.max_prompt_tokens=4; "
            "raise it, or set data.over_long",
        ),
        ([LONG], {"max_prompt_tokens": 4, "over_long": "skip"}, "every prompt is over"),
        ([GOOD], {"system_prompt": "x"}, "data.system_prompt needs a chat template"),
    ],
)
def test_bad_files_end_in_one_line(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    lines: list[str],
    changes: dict,
    message: str,
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes("".join(line + "\n" for line in lines).encode("latin-1"))
    with pytest.raises(RunError, match=message) as error:
        load(path, tokenizer, **changes)
    assert "\n" not in str(error.value)


def test_absent_file(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RunError, match="nothing.jsonl does not exist"):
        load(tmp_path / "nothing.jsonl", tokenizer)


def test_over_long_prompts_are_skipped_with_a_count(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    records = [{"prompt": "a" * length, "label": length} for length in (3, 9, 2, 8)]
    path = write(tmp_path / "p.jsonl", *records)
    prompts = load(path, tokenizer, max_prompt_tokens=4, over_long="skip")
    assert ids(prompts) == [0, 2]
    [line] = caplog.messages
    assert line == f"{path}: 2 prompts; 2 of over 4 tokens are left out"


def test_a_label_is_not_needed_when_no_key_names_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "a"})
    (prompt,) = load(path, tokenizer, label_key="")
    assert prompt.label is None


def test_repeated_prompts_are_counted_and_dropped_where_asked(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    labels = ["1", "2", "1", "1", "3"]
    rows = [{"prompt": "a", "label": label, "metadata": {"i": 1}} for label in labels]
    path = write(tmp_path / "p.jsonl", *rows, {"prompt": "b", "label": "1"})
    kept = load(path, tokenizer)
    assert ids(kept) == [0, 1, 2, 3, 4, 5]
    repeated = "2 that repeat an earlier one with its label are"
    assert caplog.messages == [f"{path}: 6 prompts; {repeated} kept (data.deduplicate)"]
    dropped = load(path, tokenizer, deduplicate=True)
    assert ids(dropped) == [0, 1, 4, 5]
    assert caplog.messages[1:] == [f"{path}: 4 prompts; {repeated} left out"]
    assert [(prompt.text, prompt.label) for prompt in dropped[1:]] == [
        ("a", "2"),
        ("a", "3"),
        ("b", "1"),
    ]
    assert dropped[2].metadata == {"i": 1}


def test_repeated_prompts_take_little_memory(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Rows of 500 characters that come twenty times each."""
    rows = [{"prompt": f"{i % 1000:0500d}", "label": str(i % 1000)} for i in range(20_000)]
    path = write(tmp_path / "p.jsonl", *rows)
    tracemalloc.start()
    prompts = load(path, tokenizer)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(prompts) == 20_000
    assert held / len(prompts) < 400
    assert peak < 60e6
    assert prompts[19_999].text == f"{999:0500d}"


def source(count: int = 10, seed: int = 3, shuffle: bool = True) -> PromptSource:
    prompts = [Prompt(i, None, "", None) for i in range(count)]
    return PromptSource(LoadedSource(prompts, "no file"), seed=seed, shuffle=shuffle)


def ids(prompts: list[Prompt]) -> list[int]:
    return [prompt.prompt_id for prompt in prompts]


def test_every_epoch_holds_every_prompt_once_in_an_order_of_its_own() -> None:
    drawn = ids(source().next(20))
    in_file = list(range(10))
    first_epoch = drawn[:10]
    second_epoch = drawn[10:]
    assert sorted(first_epoch) == in_file
    assert sorted(second_epoch) == in_file
    assert first_epoch != second_epoch
    assert first_epoch != in_file
    assert ids(source(seed=4).next(20)) != drawn


def test_without_shuffling_the_order_is_that_of_the_file() -> None:
    assert ids(source(shuffle=False).next(12)) == [*range(10), 0, 1]


def test_batches_cross_epochs_and_may_be_larger_than_one() -> None:
    in_batches = source()
    drawn = []
    for size in (7, 7, 14, 7):
        drawn.extend(ids(in_batches.next(size)))
    assert drawn == ids(source().next(35))


@pytest.mark.parametrize("drawn", [0, 4, 10, 27])
def test_resume_is_exact(drawn: int) -> None:
    running = source()
    running.next(drawn)
    saved = json.dumps(running.state_dict())
    resumed = source()
    resumed.load_state_dict(json.loads(saved))
    assert ids(resumed.next(25)) == ids(running.next(25))


def made(*texts: str, label: Any = 1, **metadata: Any) -> PromptSource:
    prompts = [Prompt(i, None, text, label, metadata) for i, text in enumerate(texts)]
    return PromptSource(LoadedSource(prompts, "now.jsonl"), seed=3, shuffle=True)


@pytest.mark.parametrize(
    "others",
    [
        made("a"),
        made("a", "c"),
        made("b", "a"),
        made("ab", ""),
        made("a", "b", label=2),
        made("a", "b", x=1),
    ],
    ids=["number", "text", "order", "border", "label", "metadata"],
)
def test_resume_with_other_prompts_is_refused(others: PromptSource) -> None:
    state = json.loads(json.dumps(made("a", "b").state_dict()))
    state["file"] = "before.jsonl"
    message = "with the prompts of before.jsonl .hash .*others of now.jsonl .hash .*new run"
    with pytest.raises(RunError, match=message) as refused:
        others.load_state_dict(state)
    assert "\n" not in str(refused.value)
    made("a", "b").load_state_dict(state)  # the same prompts in another file


SIZES = {"a": 10, "b": 3, "c": 1}


def mix(weights: dict[str, float], seed: int = 3) -> PromptStream:
    sources = {}
    for index, name in enumerate(weights):
        prompts = [Prompt(i, None, "", None, source=name) for i in range(SIZES[name])]
        sources[name] = PromptSource(LoadedSource(prompts, f"{name}.jsonl"), seed, True, index)
    return PromptStream(sources, weights)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (3, 1), (5, 3, 2), (1, 1, 1), (100, 1, 0.3)])
def test_each_source_gives_its_share_of_any_number_of_prompts(weights: tuple[float, ...]) -> None:
    shares = {name: w / sum(weights) for name, w in zip(SIZES, weights, strict=False)}
    stream = mix(dict(zip(SIZES, weights, strict=False)))
    taken = dict.fromkeys(shares, 0)
    for number in range(1, 2001):
        [prompt] = stream.next(1)
        taken[prompt.source] += 1
        assert all(abs(taken[name] - shares[name] * number) < 1 for name in shares)


def test_each_source_goes_through_epochs_of_its_own() -> None:
    drawn = mix({"a": 5, "b": 1}).next(60)
    of_a = ids([prompt for prompt in drawn if prompt.source == "a"])
    of_b = ids([prompt for prompt in drawn if prompt.source == "b"])
    assert [sorted(of_a[i : i + 10]) for i in range(0, 50, 10)] == [list(range(10))] * 5
    assert [sorted(of_b[i : i + 3]) for i in range(0, 9, 3)] == [[0, 1, 2]] * 3
    assert of_a[:10] != of_a[10:20]
    assert drawn != mix({"a": 5, "b": 1}, seed=4).next(60)


@pytest.mark.parametrize("drawn", [0, 1, 17, 44])
def test_a_mix_resumes_at_the_exact_prompt_of_each_source(drawn: int) -> None:
    running = mix({"a": 5, "b": 3, "c": 2})
    running.next(drawn)
    resumed = mix({"a": 5, "b": 3, "c": 2})
    resumed.load_state_dict(json.loads(json.dumps(running.state_dict())))
    together = running.next(25)
    one_by_one = [prompt for _ in range(25) for prompt in resumed.next(1)]
    assert [(p.source, p.prompt_id) for p in one_by_one] == [
        (p.source, p.prompt_id) for p in together
    ]


def test_one_source_alone_gives_its_prompts_in_its_own_order() -> None:
    alone = PromptStream({"": source()}, {"": 0.3})
    assert ids(alone.next(25)) == ids(source().next(25))


def test_an_epoch_is_put_in_order_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    order = PromptSource._order_of

    def counted(source: PromptSource, epoch: int) -> np.ndarray:
        made.append(epoch)
        return order(source, epoch)

    monkeypatch.setattr(PromptSource, "_order_of", counted)
    one_by_one = source()
    for _ in range(25):
        one_by_one.next(1)
    assert made == [0, 1, 2]


def test_sources_have_keys_rewards_and_prompt_ids_of_their_own(
    tmp_path: Path, tiny_model: Path
) -> None:
    write(tmp_path / "math.jsonl", {"q": "ab", "label": "1"}, {"q": "cd", "label": "2"})
    write(tmp_path / "digits.jsonl", {"prompt": "ef", "label": "3"})
    sources = [
        {"prompts": str(tmp_path / "math.jsonl"), "prompt_key": "q", "reward": "math_answer"},
        {"prompts": str(tmp_path / "digits.jsonl"), "weight": 3, "name": "easy"},
    ]
    config = RunConfig(
        model={"hf_checkpoint": str(tiny_model)}, data={"sources": sources, "chat_template": "off"}
    )
    stream = RunPrompts.load(config, tiny_model).stream(seed=0, shuffle=False)
    drawn = stream.next(8)
    found = {(p.source, p.prompt_id, p.text, p.reward) for p in drawn}
    assert found == {
        ("math", 0, "ab", "math_answer"),
        ("math", 1, "cd", "math_answer"),
        ("easy", 2, "ef", "exact_match"),
    }
    assert [p.source for p in drawn].count("easy") == 6


def report(prompt_id: int, *rewards: float | None) -> GroupReport:
    samples = [
        SampleReport(
            group_id=0,
            rollout_id=i,
            prompt_id=prompt_id,
            status=Status.COMPLETED,
            num_tokens=2,
            num_response_tokens=1,
            policy_versions=[],
            loss_tokens_by_version={},
            expert_shape=None,
            arrays=None,
            reward=reward,
        )
        for i, reward in enumerate(rewards)
    ]
    return GroupReport(0, samples)


def test_each_source_has_metrics_of_its_own() -> None:
    prompts = [Prompt(i, None, "", None) for i in range(6)]
    sources = {
        "a": LoadedSource(prompts[1:3], "a.jsonl"),  # its first prompt was too long
        "b": LoadedSource(prompts[4:5], "b.jsonl"),
        "c": LoadedSource(prompts[5:], "c.jsonl"),
    }
    groups = [report(2, 1.0, 0.0), report(4, 0.5, None), report(1, 1.0, 1.0)]
    assert RunPrompts(None, sources, {}).source_metrics(groups) == {
        "rollout/a/num_samples": 4.0,
        "rollout/a/reward_mean": 0.75,
        "rollout/b/num_samples": 2.0,
        "rollout/b/reward_mean": 0.5,
        "rollout/c/num_samples": 0.0,
    }
    assert RunPrompts(None, {"": sources["a"]}, {}).source_metrics(groups) == {}


@pytest.mark.skipif(not GSM8K.is_dir(), reason="no GSM8K beside the repository")
def test_gsm8k(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = load(
        GSM8K / "test.jsonl",
        tokenizer,
        prompt_key="question",
        label_key="answer",
        max_prompt_tokens=2000,
    )
    assert len(prompts) == 1319
    assert prompts[0].text.startswith("Janet")
    assert prompts[0].label.endswith("#### 18")
