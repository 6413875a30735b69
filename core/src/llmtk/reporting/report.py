"""A run as one page of HTML that needs nothing beside it: no network, no script, no other file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtk.errors import ConfigurationError
from llmtk.folder import CONFIG
from llmtk.reporting.stored import read_lines

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llmtk.reporting.stored import StoredRun

SAMPLES = 10
"""Samples shown of the first step that has some, and as many of the last; and predictions shown."""
_EVALUATION = "eval_"


def write_report(run: StoredRun, file: Path) -> None:
    """Write the report. ConfigurationError where the file cannot be written."""
    text = report(run)
    try:
        file.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be written: {error.strerror}. Give another --output FILE") from error


def report(run: StoredRun) -> str:
    """Return the page. Whatever comes from the run is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    from llmtk.reporting.plot import curves_svg

    environment = Environment(
        loader=PackageLoader("llmtk.reporting", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["value"] = _text
    panels = panels_of(run)
    return environment.get_template("report.html.jinja").render(
        run=run,
        name=run.path.resolve().name,
        tables=_tables(run),
        curves=Markup(curves_svg(panels)) if panels else "",
        samples=_samples(read_lines(run.path / "samples.jsonl")),
        predictions=_predictions(run),
        config=(run.path / CONFIG).read_text(encoding="utf-8", errors="replace"),
    )


def panels_of(run: StoredRun) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return the run's curves: by metric, training and evaluation. Metrics that were never finite are left out."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name in run.metric_names:
        metric = name.removeprefix(_EVALUATION)
        if curve := run.curve(name):
            panels.setdefault(metric, {})["evaluation" if metric != name else "training"] = curve
    return panels


def _tables(run: StoredRun) -> dict[str, list[tuple[str, Any]]]:
    """Return the page's tables of two columns, by their headings."""
    results, info = run.results, run.info
    summary = {
        "stage": run.stage,
        "model": run.model,
        "status": run.status,
        "stopped by": results.get("stopped_by"),
        "steps": run.steps,
        "final loss": run.last("loss"),
        "best metric": results.get("best_metric"),
    }
    data = {name: f"{split.get('rows'):,} rows, sha256 {split.get('sha256')}" for name, split in _data(info).items()}
    environment = dict(info.get("environment") or {})
    versions = environment.pop("versions", {})
    tables = {
        "Run": summary,
        "Results": results.get("metrics") or {},
        "Data": data,
        "Plugins": {str(name): version for name, version in info.get("plugins") or []},
        "Speed": _speed(read_lines(run.path / "timings.jsonl")),
        "Environment": {"precision": info.get("precision"), **environment, **versions},
    }
    shown = {
        title: [(name, value) for name, value in rows.items() if value is not None] for title, rows in tables.items()
    }
    return {title: rows for title, rows in shown.items() if rows}


def _data(info: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: split for name, split in (info.get("data") or {}).items() if split.get("rows")}


def _speed(timings: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return means over the lines of timings, and of memory the largest."""
    names = dict.fromkeys(name for line in timings for name in line if name not in ("step", "time"))
    found = {name: [line[name] for line in timings if line.get(name) is not None] for name in names}
    return {
        name.replace("_", " "): max(values) if "memory" in name else sum(values) / len(values)
        for name, values in found.items()
        if values
    }


def _samples(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the samples of the first step that has some, and of the last."""
    steps = sorted({line["step"] for line in lines})
    shown = dict.fromkeys([*steps[:1], *steps[-1:]])
    return [line for step in shown for line in [line for line in lines if line["step"] == step][:SAMPLES]]


def _predictions(run: StoredRun) -> list[Mapping[str, Any]]:
    """Return the first predictions: what was asked, what was to be said, where that is known, and what was said."""
    wanted = (run.config.get("predict") or {}).get("reference")
    return [
        {
            "prompt": _dialogue(line.get("prompt")),
            "reference": next((line[name] for name in (wanted, "reference", "answer") if name in line), None),
            "completion": line.get("completion") or next(iter(line.get("completions") or ()), ""),
        }
        for line in read_lines(run.path / "predictions.jsonl")[:SAMPLES]
    ]


def _dialogue(prompt: Any) -> str:
    """Return a prompt as text: what a user asked alone as it stands, else who said what."""
    if not isinstance(prompt, list):
        return _text(prompt)
    if [message.get("role") for message in prompt] == ["user"]:
        return _text(prompt[0].get("content"))
    return "\n".join(f"{message.get('role')}: {_text(message.get('content'))}" for message in prompt)


def _text(value: Any) -> str:
    """Return a value for a person to read: a number to six digits, lists and mappings as JSON."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
