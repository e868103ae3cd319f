"""A run as one page: what is in it, and that it needs nothing else."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanoslime.rollout import recorder
from nanoslime.rollout.tasks import Sampling
from nanoslime.types import Sample, SampleGroup, Status
from tests.jobs.made_run import make_run

HOSTILE = '</script><script>document.title="taken"</script><img src=x onerror=alert(1)><!--'


class Page(HTMLParser):
    """The elements of a page, their attributes, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data


def page_of(told, run: Path, folder: Path) -> Page:
    out = Path(told("report", run, "--out", folder / "page.html").strip())
    return Page(out.read_text())


def test_the_page_holds_the_run_and_loads_nothing(lived, told, tmp_path):
    page = page_of(told, lived.path, tmp_path)
    data = json.loads(page.scripts[0])
    assert data["name"] == "lived" and data["unit"] == "node hours"
    assert [attempt["outcome"] for attempt in data["attempts"]] == ["failed", "stopped", "done"]
    assert [step for step, _ in data["curves"]["rollout/reward_mean"]] == list(range(6))
    assert [step for step, _ in data["curves"]["evaluation"]] == [-1, 5]
    names = {name for attempt in data["attempts"] for name, *_ in attempt["phases"]}
    assert {"start", "model", "generate", "train", "weight_sync", "checkpoint"} <= names
    assert {sample["step"] for sample in data["samples"]} == {0, 5}
    assert all("── response" in sample["text"] for sample in data["samples"])
    assert dict(data["subjects"])["state"] == "done"
    assert [tag for tag, _ in page.tags].count("script") == 2
    for tag, attributes in page.tags:
        assert not {"src", "href", "srcset", "action"} & attributes.keys(), tag
    text = (tmp_path / "page.html").read_text()
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in text and "url(" not in text and "fetch(" not in text


@pytest.fixture
def hostile_run(tmp_path):
    """A run of two nodes whose sample, error and names would be markup."""
    run = make_run(tmp_path / HOSTILE.replace("/", "|")[:60], 2).run
    one = Sample(
        group_id=0,
        rollout_id=0,
        token_ids=np.arange(3, dtype=np.int32),
        loss_mask=np.array([False, True, True]),
        rollout_logprobs=np.zeros(3, np.float32),
        policy_versions=[(1, 0)],
        status=Status.COMPLETED,
        text=HOSTILE,
        label=HOSTILE,
        metadata={"prompt_id": 0},
        reward=None,
    )
    recording = recorder.Recording(run.rollouts, Sampling(1, 8, 1.0), mode="text")
    recorder.record(recording, 0, [SampleGroup(0, [one])])
    run.new_attempt()
    run.write_status("generate", 0)
    run.write_status("failed", 0, error=HOSTILE)
    return run


def test_no_text_of_a_run_is_markup(hostile_run, told, tmp_path):
    page = page_of(told, hostile_run.path, tmp_path)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert "img" not in [tag for tag, _ in page.tags]
    data = json.loads(page.scripts[0])
    [sample] = data["samples"]
    assert (sample["text"], sample["label"], sample["reward"]) == (HOSTILE, HOSTILE, None)
    assert data["attempts"][0]["cause"] == HOSTILE


def test_what_is_no_number_is_null_on_the_page(hostile_run, told, tmp_path):
    """JSON of a browser has no NaN."""
    hostile_run.metrics.write_text('{"step": 0, "train/loss": NaN}\n{"step": 1, "train/loss": 2}\n')

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    page = page_of(told, hostile_run.path, tmp_path)
    data = json.loads(page.scripts[0], parse_constant=refuse)
    assert data["curves"]["train/loss"] == [[0, None], [1, 2]]


def test_a_page_goes_where_it_is_told_to(lived, told, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told("report", lived.path) == f"{tmp_path}/lived.html\n"
    assert "No such file or directory" in refused("report", lived.path, "--out", "no/page.html")


LOOK = """<script>
const seen = {
  errors: window.errors,
  title: document.title,
  headings: [...document.querySelectorAll("h2")].map((each) => each.textContent),
  curves: document.querySelectorAll("polyline").length,
  bars: document.querySelectorAll(".lane rect").length,
  images: document.querySelectorAll("img").length,
  cut: [...document.querySelectorAll(".card")].filter((each) =>
    each.scrollWidth > each.clientWidth + 1).length,
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
};
document.body.replaceChildren(JSON.stringify(seen));
</script>"""
CATCH = "<script>window.errors = []; onerror = (told) => window.errors.push(told);</script>"


def chromium(page: Path, width: int, dark: bool, *options: str) -> str:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    assert program, "the page is looked at in Chromium: apt-get install chromium"
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--window-size={width},2400", f"--blink-settings=preferredColorScheme={1 - dark}"]
    command += [f"--user-data-dir={page.parent}/profile", "--virtual-time-budget=2000"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.matrix
@pytest.mark.parametrize("width", [1280, 500])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["lived", "hostile", "never"])
def test_the_page_in_a_browser(request, told, tmp_path, width, dark, name):
    """Every part is drawn, nothing is wider than the screen, and colours follow the scheme."""
    if name == "never":
        run = make_run(tmp_path, 4).run
    else:
        run = request.getfixturevalue("lived" if name == "lived" else "hostile_run")
    page = Path(told("report", run.path, "--out", tmp_path / "page.html").strip())
    looked_at = tmp_path / "looked_at.html"
    text = page.read_text()
    looked_at.write_text(
        text.replace("<meta", f"{CATCH}<meta", 1).replace("</body>", f"{LOOK}</body>")
    )
    dom = chromium(looked_at, width, dark, "--dump-dom")
    [text] = re.findall(r"<body>\s*(\{.*\})\s*</body>", dom, re.S)
    seen = json.loads(html.unescape(text))
    assert seen["errors"] == [] and seen["images"] == 0
    assert seen["title"] == f"{run.name}: a run of nanoslime"
    assert (seen["wide"], seen["cut"]) == (0, 0)
    if name == "lived":
        assert seen["headings"] == [
            "State",
            "Curves",
            "node hours",
            "Phases",
            "Incidents",
            "Samples",
        ]
        assert seen["curves"] >= 8 and seen["bars"] > 20
    elif name == "hostile":
        assert seen["headings"] == [
            "State",
            "node hours",
            "Phases",
            "Incidents",
            "Layout",
            "Samples",
        ]
    else:
        assert seen["headings"] == ["State", "Layout"]
    shot = tmp_path / "page.png"
    chromium(page, width, dark, f"--screenshot={shot}")
    with Image.open(shot) as image:
        background = image.convert("RGB").getpixel((2, 2))
    assert background == ((0x12, 0x16, 0x1C) if dark else (0xF6, 0xF7, 0xF9))
