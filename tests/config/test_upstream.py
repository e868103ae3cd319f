"""The committed option names are those of the installed packages."""

import json
import subprocess
import sys

import pytest

from nanoslime.config import upstream
from nanoslime.types import RunError
from tools import option_names


@pytest.mark.parametrize("which", option_names.SOURCES)
def test_list_is_that_of_the_installed_package(which):
    assert upstream.known(which) == option_names.installed(which), "run `python -m tools.option_names`"


@pytest.mark.parametrize("which", upstream.OURS)
def test_names_that_we_set_exist_upstream(which):
    assert set(upstream.OURS[which]) <= set(upstream.known(which)["names"])


def test_a_known_option_passes_and_an_unknown_one_is_refused():
    upstream.check("sglang", "rollout.sglang", {"mem_fraction_static": 0.8})
    with pytest.raises(RunError, match="mem_fraction_statik: .* did you mean mem_fraction_static"):
        upstream.check("sglang", "rollout.sglang", {"mem_fraction_statik": 0.8})


@pytest.mark.megatron
def test_names_read_from_the_sources_are_those_of_the_imported_class():
    code = (
        "import dataclasses, json\n"
        "from megatron.core.transformer import TransformerConfig as T\n"
        "print(json.dumps([f.name for f in dataclasses.fields(T) if f.name[0] != '_']))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert sorted(json.loads(shown.stdout.splitlines()[-1])) == upstream.known("megatron")["names"]
