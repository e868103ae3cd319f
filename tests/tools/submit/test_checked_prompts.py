"""What a check of prompts has found is remembered where that can be; else it is checked anew."""

from types import SimpleNamespace

import pytest

from nanoslime.config import DataConfig
from tools.submit.checked_prompts import checked_prompts


@pytest.fixture
def checked(tmp_path, monkeypatch):
    """Checks a file of prompts with a tokenizer; the answers say the how manieth check it is."""
    checks = []

    def check(path, data, tokenizer):
        checks.append(path)
        return SimpleNamespace(text=f"check {len(checks)}")

    monkeypatch.setattr("tools.submit.checked_prompts.check_prompts", check)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1="}\n')
    (tmp_path / "model").mkdir()
    (tmp_path / "model/tokenizer.json").write_text("{}")
    return lambda: checked_prompts(tmp_path / "p.jsonl", DataConfig(), tmp_path / "model")


def test_the_same_prompts_are_checked_once(checked):
    assert [checked(), checked()] == ["check 1", "check 1"]


def test_with_a_file_that_cannot_be_read_they_are_checked_each_time(checked, tmp_path):
    (tmp_path / "model/LICENSE.txt").symlink_to("nowhere")
    assert [checked(), checked()] == ["check 1", "check 2"]


def test_a_user_without_a_home_has_no_cache(checked, monkeypatch):
    def without_home(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.expanduser", without_home)
    assert [checked(), checked()] == ["check 1", "check 2"]


def test_an_answer_that_is_no_text_is_written_anew(checked, tmp_path):
    checked()
    [known] = (tmp_path / "cache/nanoslime/prompts").iterdir()
    known.write_bytes(b"\xff")
    assert [checked(), checked()] == ["check 2", "check 2"]
