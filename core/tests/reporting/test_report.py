"""The page about a run: whole, closed, and safe whatever a run has written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from llmtk.cli import call
from llmtk.reporting.plot import curves_svg
from llmtk.reporting.report import panels_of, report
from llmtk.reporting.stored import StoredRun

WILD = "<script>alert('1')</script> & $\\frac$"


def lines(*values):
    return "".join(json.dumps(value) + "\n" for value in values)


@pytest.fixture
def run(tmp_path):
    """The folder of a run that writes markup wherever it can."""
    folder = tmp_path / "<b>run"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        f"stage: toy\nmodel: {{name_or_path: base}}\ntoy: {{text: {json.dumps(WILD)}}}\n"
    )
    plugins = [["toy", "llmtk-stage-toy 1.0"], ["ema", WILD]]
    data = {"train": {"rows": 1234, "sha256": "ab"}, "eval": {"rows": 0, "sha256": "cd"}}
    environment = {"versions": {"torch": "2.13.0"}, "threads": 2}
    info = {"plugins": plugins, "data": data, "environment": environment, "precision": "float32"}
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "results.json").write_text(json.dumps({"steps": 20, "metrics": {"eval_loss": 1.25}}))
    first, second = (
        {"step": 10, "epoch": 0.5, "loss": 2.0, WILD: 1.0},
        {"step": 20, "epoch": 1.0, "loss": None, WILD: 2.0},
    )
    (folder / "metrics.jsonl").write_text(lines(first, second, {"step": 20, "epoch": 1.0, "eval_loss": 1.25}))
    timings = [
        {"step": step, "time": 1.0, "tokens_per_second": 100.0 * step, "memory_gib": 3.0 - step} for step in (1, 2)
    ]
    (folder / "timings.jsonl").write_text(lines(*timings))
    samples = [{"step": step, "prompt": f"at {step}", "completion": WILD} for step in (10, 20, 30)]
    (folder / "samples.jsonl").write_text(lines(*samples, {**samples[2], "prompt": "judged", "reward": 0.5}))
    return folder


class Page(HTMLParser):
    """Gathers tags with their attributes, and the text outside of the head's style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.text += " "

    def handle_data(self, data):
        self.text += data


def test_all_that_is_known_stands_on_the_page(run):
    page = Page(report(StoredRun.read(run)))
    words = " ".join(page.text.split())
    for told in [
        "toy on base: finished after 20 steps",
        "eval_loss 1.25",
        "train 1,234 rows, sha256 ab",
        "toy llmtk-stage-toy 1.0",
        "torch 2.13.0",
        "tokens per second 150",
        "memory gib 2",
        "at 10",
        "judged",
        "0.5",
        "stage: toy",
        "evaluation",
    ]:
        assert told in words
    assert "at 20" not in words  # samples of the first step and of the last
    assert "0 rows" not in words


def test_what_a_run_writes_is_text_and_nothing_is_loaded_or_run(run):
    page = Page(report(StoredRun.read(run)))
    assert page.text.count("<script>alert('1')</script>") == 6  # a plugin, a curve, four samples; and as YAML writes it
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "link", "object", "b"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert not [
            v for name, v in attributes.items() if name in ("src", "href", "xlink:href") and not v.startswith("#")
        ]
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_predictions_stand_beside_what_was_to_be_said(run):
    asked = [{"role": "user", "content": "37+48="}]
    first = {"prompt": asked, "answer": 85, "completion": WILD, "stopped": "stop"}
    talk = [{"role": "system", "content": "Add."}, *asked]
    second = {"prompt": talk, "completions": ["84", "83"], "stopped": ["stop", "stop"]}
    (run / "predictions.jsonl").write_text(lines(first, second, *[{"prompt": "late", "completion": ""}] * 9))
    page = Page(report(StoredRun.read(run)))
    words = " ".join(page.text.split())
    assert f"37+48= 85 {WILD}" in words
    assert "system: Add. user: 37+48= 84" in words
    assert words.count("late") == 8


def test_curves_of_training_and_evaluation_share_a_plot_and_gaps_are_left_out(run):
    assert panels_of(StoredRun.read(run)) == {
        "loss": {"training": [(10, 2.0)], "evaluation": [(20, 1.25)]},
        WILD: {"training": [(10, 1.0), (20, 2.0)]},
    }


def test_a_curve_runs_where_its_points_are():
    curve = [(0, 1.0), (10, 3.0), (20, 2.0), (60, 5.0)]
    svg = curves_svg({"loss": {"training": curve}})
    (drawn,) = [path for path in re.findall(r'<path d="([^"]*)" clip-path', svg) if len(re.findall("[ML]", path)) == 4]
    x, y = zip(
        *([float(number) for number in pair.split()] for pair in re.findall(r"[ML] ([\d.]+ [\d.]+)", drawn)),
        strict=True,
    )
    assert [(at - x[0]) / (x[3] - x[0]) for at in x] == pytest.approx([0, 1 / 6, 1 / 3, 1], abs=1e-3)
    assert [(at - y[0]) / (y[3] - y[0]) for at in y] == pytest.approx([0, 0.5, 0.25, 1], abs=1e-3)
    assert svg == curves_svg({"loss": {"training": curve}})


def test_the_command_writes_it_for_an_unfinished_run_too(run, tmp_path, capsys):
    (run / "results.json").unlink()
    (run / "samples.jsonl").unlink()
    (run / "metrics.jsonl").unlink()
    assert call(["report", str(run)]) == 0
    assert "toy on base: unfinished after 0 steps" in (run / "report.html").read_text()
    assert call(["report", str(run), "--output", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").read_bytes() == (run / "report.html").read_bytes()
    capsys.readouterr()
    assert call(["report", str(run), "--output", str(tmp_path / "no/such.html")]) == 2
    assert (
        "such.html cannot be written: No such file or directory. Give another --output FILE" in capsys.readouterr().err
    )
    assert call(["report", str(tmp_path / "nothing")]) == 2
    assert "there is no such run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_browser_shows_it_and_runs_nothing(run, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser is installed")
    script = "</td><script>document.title = 'taken over'</script><img src=x onerror=document.body.remove()>"
    (run / "samples.jsonl").write_text(lines({"step": 1, "prompt": "asked", "completion": script}))
    page = tmp_path / "report.html"
    page.write_text(report(StoredRun.read(run)))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<title>&lt;b&gt;run (toy)</title>" in shown
    assert "asked</td>" in shown
    assert shown.count("<svg ") == 1
    assert "&lt;img src=x onerror" in shown
