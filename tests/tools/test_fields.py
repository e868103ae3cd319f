"""Fields one by one: each is there once, with its default and a sentence."""

import re
from dataclasses import replace

import pytest

from nanoslime.config import RunConfig
from nanoslime.config.algorithm import ALGORITHM_CONFIGS, CUSTOM, CustomConfig
from nanoslime.config.evaluation import EvalSetConfig
from nanoslime.config.flags import field_types
from nanoslime.config.load import load
from nanoslime.config.model import SourceConfig
from tools.fields import values


def all_sections():
    """Objects that together have every field of every class of the configuration."""
    yield RunConfig()
    for name, algorithm in ALGORITHM_CONFIGS.items():
        yield CustomConfig(name="package.module:Name") if name == CUSTOM else algorithm()
    yield EvalSetConfig(prompts="x")
    yield SourceConfig(prompts="x")


def test_every_field_has_a_sentence():
    missing = []
    for section in all_sections():
        for one in values(section):
            is_sentence = re.fullmatch(r"[A-Za-z0-9\"-].*\w.*[.)]", one.sentences)
            if not is_sentence or len(one.sentences.split()) < 3:
                missing.append(f"{one.section.__name__}.{one.name}: {one.sentences!r}")
    assert not missing


def test_the_fields_are_those_that_flags_set():
    names = {one.name for one in values(RunConfig())}
    algorithms = [algorithm for name, algorithm in ALGORITHM_CONFIGS.items() if name != CUSTOM]
    for algorithm in algorithms:
        names |= {one.name for one in values(replace(RunConfig(), algorithm=algorithm()))}
    assert names == set(field_types()) - {"algorithm.options"}


@pytest.mark.parametrize("name", sorted(ALGORITHM_CONFIGS.keys() - {"grpo", CUSTOM}))
def test_only_what_is_set_differs_from_the_defaults(name):
    assert [one.name for one in values(RunConfig()) if one.value != one.default] == []
    config = load(None, None, ["--nodes", "2", "--algorithm", name, "--eps-clip", "1e-5"])
    differing = {one.name: one.default for one in values(config) if one.value != one.default}
    eps_clip = ALGORITHM_CONFIGS[name].eps_clip
    assert differing == {
        "cluster.nodes": 1,
        "algorithm.name": "grpo",
        "algorithm.eps_clip": eps_clip,
    }


def test_a_field_that_a_class_declares_anew_keeps_the_sentence_of_the_class_above():
    gspo = {one.name: one for one in values(ALGORITHM_CONFIGS["gspo"]())}
    assert gspo["eps_clip"].default == 3e-4
    assert gspo["eps_clip"].sentences.startswith("The ratio of current to old policy is clipped")
    cispo = {one.name: one for one in values(ALGORITHM_CONFIGS["cispo"]())}
    assert cispo["eps_clip"].sentences.startswith("1: the ratio has no lower limit")
