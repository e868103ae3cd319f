"""The help as a newcomer reads it."""

import re
import subprocess
import sys

import pytest

from jobs.checkout import ROOT
from nanoslime.config.flags import ALIASES, field_types, spellings
from nanoslime.config.load import load
from nanoslime.types import RunError
from tools import field_help
from tools.fields import values
from tools.submit import grpo as submit_grpo

DEFAULTS = load(None, None, ["--nodes", "2"])


def heads(text: str) -> list[str]:
    """The lines of a help that begin a field."""
    return re.findall(r"^  (\S.*)$", text, re.MULTILINE)


def test_the_overview_has_25_lines_with_four_flags_two_examples_and_all_own_options():
    text = field_help.overview()
    assert text.count("\n") <= 25
    assert max(map(len, text.splitlines())) <= 100
    for flag in ("--nodes N", "--recipe FILE", "--hf-checkpoint MODEL", "--prompts FILE"):
        assert re.search(rf"^  {flag}", text, re.MULTILINE)
    assert len(re.findall(r"^  \S*python jobs/submit_grpo.py ", text, re.MULTILINE)) == 2
    for action in submit_grpo.make_parser()._actions:
        assert action.option_strings[0] in text
    for shown in set(re.findall(r"--([a-z-]+)", text)) - {"help"}:
        own = {
            option for one in submit_grpo.make_parser()._actions for option in one.option_strings
        }
        assert f"--{shown}" in own or shown in spellings()


def test_all_shows_each_field_once_with_its_sentence_and_its_short_names():
    text = field_help.text_about("all", DEFAULTS)
    shown = " ".join(text.split())
    fields = list(values(DEFAULTS))
    assert len(heads(text)) == len(fields)
    for one in fields:
        assert one.sentences in shown
    kinds = field_types()
    flags = {one.name for one in fields if not field_help.in_file_only(kinds[one.name])}
    for alias, name in ALIASES.items():
        assert (f"--{alias}" in shown) == (name in flags)
    assert max(map(len, text.splitlines())) <= 120


def test_what_belongs_into_a_file_is_not_shown_as_a_flag():
    text = field_help.text_about("all", DEFAULTS)
    for field in (
        "data.sources",
        "eval.sets",
        "rollout.sglang",
        "cluster.env",
        "training.megatron",
    ):
        assert re.search(rf"^  {field}: \(empty\)", text, re.MULTILINE)
        flag = field.replace("_", "-")
        assert f"--{flag} " not in text
    assert "--rollout-stop, --rollout.stop TEXT ... = (empty)" in text


@pytest.mark.parametrize(
    ("topic", "shown"),
    [
        ("tp", ["--engine-tp-size", "--tp-size", "--etp-size"]),
        ("tp-size", ["--engine-tp-size", "--tp-size", "--etp-size"]),
        ("vpp", ["--vpp-size"]),
        ("advantage-estimator", ["--algorithm"]),
        # No name has these words.
        ("arXiv 2503.20783", ["--denominator", "--algorithm.normalize-by-std"]),
    ],
)
def test_a_word_shows_the_fields_that_are_about_it(topic, shown):
    found = [
        head.split(",")[0].split()[0] for head in heads(field_help.text_about(topic, DEFAULTS))
    ]
    assert found == shown


def test_a_word_that_no_field_is_about_is_refused_with_a_near_one():
    with pytest.raises(RunError, match=r"no field is about 'temprature'; did you mean temperature"):
        field_help.text_about("temprature", DEFAULTS)


def test_the_value_after_files_and_flags_is_shown_beside_the_default():
    config = load(None, None, ["--tp-size", "16", "--algorithm", "reinforce_plus_plus"])
    text = field_help.text_about("all", config)
    assert "--tp-size, --training.tp-size INT = 16 (default: 1)" in text
    assert "--gamma, --algorithm.gamma FLOAT = 1\n" in text
    assert "normalize-by-std FLOAT" not in text and "--algorithm.normalize-by-std" not in text
    assert "--use-rollout-logprobs sets rollout." in text


@pytest.mark.parametrize(
    ("argv", "topic", "others"),
    [
        (["--help"], "", []),
        (["--nodes", "4", "-h"], "", ["--nodes", "4"]),
        (["--help", "tp", "--nodes", "4"], "tp", ["--nodes", "4"]),
        (["--help=tp", "--nodes", "4"], "tp", ["--nodes", "4"]),
        (["--help", "--nodes", "4"], "", ["--nodes", "4"]),
    ],
)
def test_the_word_behind_help_is_its_topic(argv, topic, others):
    assert field_help.asked(argv) == (topic, others)


def test_the_command_shows_the_values_of_the_recipe_and_refuses_in_one_line(tmp_path):
    def shown(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, f"{ROOT}/jobs/submit_grpo.py", *argv]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    tp_size = shown("--recipe", "colocate", "--nodes", "4", "--help", "tp")
    assert (tp_size.returncode, tp_size.stderr) == (0, "")
    assert "--tp-size, --training.tp-size INT = 2 (default: 1)" in tp_size.stdout
    wrong = shown("--help", "tp", "--nods", "4")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("submit_grpo: unknown flag --nods; did you mean --nodes")
