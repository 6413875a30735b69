"""What is wrong in configuration, data, models, plugins and folders is said: what, where, and what to do.

Each case is a command as a user would type it. It ends with exit code 2, before anything is trained, with a message on
stderr and no traceback, and leaves the folder of the run as it was.

    python tests/test_bad_input.py        prints them all, each by a process of its own
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from llmtk.cli import call
from llmtk.host import discovery

BUILTIN = Path(discovery.__file__).parents[1] / "demo" / "model"
GOOD = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]


class Case(NamedTuple):
    """Bad input: what is wrong, how it comes about in a folder, and what the message must hold."""

    title: str
    words: Callable[[Path], list[str]]
    said: tuple[str, ...]


CASES: dict[str, Case] = {}
HELD: list[socket.socket] = []
"""Ports in use, until the process ends."""


def case(title: str, *said: str) -> Callable[[Callable[[Path], list[str]]], Callable[[Path], list[str]]]:
    """Register a function that prepares a folder and returns the command's words."""

    def register(words: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
        CASES[words.__name__] = Case(title, words, said)
        return words

    return register


def sft(folder: Path, *more: str, rows: Path | None = None, model: Path | str = "builtin") -> list[str]:
    """Return the words of a run that is sound but for what stands in `more`, the rows or the model."""
    rows = rows or write(folder / "good.jsonl", *GOOD)
    given = [f"model.name_or_path={model}", f"data.train={rows}", "train.max_steps=1", f"output_dir={folder / 'run'}"]
    return ["run", "sft", *given, *more]


def write(file: Path, *rows: object) -> Path:
    """Write rows as JSONL; text and bytes as they are."""
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    file.write_bytes(b"\n".join(lines))
    return file


def config(folder: Path, text: str) -> list[str]:
    """Return the words of a run of a configuration file."""
    (folder / "run.yaml").write_text(text)
    return ["run", "sft", str(folder / "run.yaml")]


def copied_model(folder: Path) -> Path:
    """Return a copy of the builtin model."""
    return Path(shutil.copytree(BUILTIN, folder / "model"))


def install(folder: Path, distribution: str, entry_points: str, module: str, requires: str = "") -> None:
    """Write an installed distribution into the folder `site`, which stands on the path."""
    site, name = folder / "site", distribution.replace("-", "_")
    information = site / f"{name}-1.0.dist-info"
    information.mkdir(parents=True)
    required = f"Requires-Dist: {requires}\n" if requires else ""
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\nSummary: A test's\n{required}"
    )
    (information / "entry_points.txt").write_text(entry_points)
    (site / f"{name}.py").write_text(module)


# The configuration


@case("unknown key", "train.learning_rat", "learning_rate")
def unknown_key(folder: Path) -> list[str]:
    return sft(folder, "train.learning_rat=1e-4")


@case("wrong type", "train.max_steps", "many")
def wrong_type(folder: Path) -> list[str]:
    return sft(folder, "train.max_steps=many")


@case("section that is none", "model: expected keys and values, got 5", "train: expected keys and values", "output_dir")
def section_that_is_none(folder: Path) -> list[str]:
    return ["run", "sft", "model=5", "train=[1]", "output_dir=3"]


@case("plugins that are none", "plugins: expected keys and values")
def plugins_that_are_none(folder: Path) -> list[str]:
    return sft(folder, "plugins=[ema]")


@case("checkpoint that is no path", "train.resume_from_checkpoint", "expected text")
def checkpoint_that_is_no_path(folder: Path) -> list[str]:
    return sft(folder, "train.resume_from_checkpoint={a: 1}")


@case("negative learning rate", "train.learning_rate", "-0.1")
def negative_learning_rate(folder: Path) -> list[str]:
    return sft(folder, "train.learning_rate=-0.1")


@case("learning rate that is no number", "train.learning_rate", "finite")
def nan_learning_rate(folder: Path) -> list[str]:
    return sft(folder, "train.learning_rate=.nan")


@case("Python object in YAML", "run.yaml, line 1", "python/object")
def python_object(folder: Path) -> list[str]:
    return config(folder, "model: !!python/object/apply:os.system ['touch hacked']\n")


@case("duplicate key in YAML", "run.yaml, line 3", "max_steps", "twice")
def duplicate_key(folder: Path) -> list[str]:
    return config(folder, "train:\n  max_steps: 1\n  max_steps: 2\n")


@case("unknown stage", "sftt", "'sft'", "Installed stages: ", "pip install llmtk-stage-sftt")
def unknown_stage(folder: Path) -> list[str]:
    return ["run", "sftt"]


@case("stage that is not installed", "nosuch", "llmtk-stage-nosuch")
def absent_stage(folder: Path) -> list[str]:
    return ["run", "nosuch"]


@case("secret in the configuration itself", "generation.options.api_key", "environment variable", "${API_KEY}")
def literal_secret(folder: Path) -> list[str]:
    return sft(folder, "generation.engine=other", "generation.options.api_key=sk-0123456789")


# Data


@case("missing data file", "no.jsonl", "does not exist")
def missing_file(folder: Path) -> list[str]:
    return sft(folder, rows=folder / "no.jsonl")


@case("empty data file", "empty.jsonl", "is empty")
def empty_file(folder: Path) -> list[str]:
    return sft(folder, rows=write(folder / "empty.jsonl"))


@case("binary data file", "binary.jsonl", "is not text")
def binary_file(folder: Path) -> list[str]:
    return sft(folder, rows=write(folder / "binary.jsonl", b"\x7fELF\0\0\0\1"))


@case("JSONL broken at a line", "broken.jsonl:3", "broken JSON")
def broken_line(folder: Path) -> list[str]:
    return sft(folder, rows=write(folder / "broken.jsonl", *GOOD[:2], '{"prompt": "a", "completion": ', *GOOD[2:]))


@case("invalid UTF-8", "latin.jsonl:2", "invalid UTF-8")
def invalid_utf8(folder: Path) -> list[str]:
    return sft(
        folder, rows=write(folder / "latin.jsonl", GOOD[0], '{"prompt": "é", "completion": "a"}'.encode("latin-1"))
    )


@case("missing column", "question", "prompt", "completion")
def missing_column(folder: Path) -> list[str]:
    return sft(folder, rows=write(folder / "rows.jsonl", {"question": "1 + 1 =", "solution": "2"}))


@case("row with an empty completion", "rows.jsonl:2", "completion", "empty")
def empty_completion(folder: Path) -> list[str]:
    return sft(folder, rows=write(folder / "rows.jsonl", GOOD[0], {"prompt": "1 + 1 =", "completion": ""}))


@case("no target left after truncation, in any row", "no target", "max_length")
def no_target_left(folder: Path) -> list[str]:
    long = {"prompt": "1 + 1 = 2, " * 40, "completion": "2"}
    return sft(folder, "data.max_length=16", rows=write(folder / "rows.jsonl", long, long))


@case("all rows dropped", "max_length")
def all_dropped(folder: Path) -> list[str]:
    long = {"prompt": "1", "completion": "1 + 1 = 2, " * 40}
    return sft(folder, "data.max_length=16", "data.on_too_long=drop", rows=write(folder / "rows.jsonl", long, long))


# Models and tokenizers


@case("token id beyond the vocabulary", "rows.jsonl:2", "completion_ids", "from 0 to")
def token_beyond_vocabulary(folder: Path) -> list[str]:
    rows = [{"prompt": "1 + 1 =", "completion_ids": [[5, token]], "rewards": [1.0]} for token in (6, 10**6)]
    return ["run", "grpo", *sft(folder, rows=write(folder / "rows.jsonl", *rows))[2:]]


@case("no chat template", "chat template", "data.template")
def no_chat_template(folder: Path) -> list[str]:
    model = copied_model(folder)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    said = [{"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": "2"}]
    return sft(folder, model=model, rows=write(folder / "rows.jsonl", {"messages": said}))


@case("chat template that reaches for Python's insides", "template", "__class__")
def reaching_template(folder: Path) -> list[str]:
    (folder / "evil.jinja").write_text("{{ ''.__class__.__mro__ }}{% for m in messages %}{{ m.content }}{% endfor %}")
    said = [{"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": "2"}]
    rows = write(folder / "rows.jsonl", {"messages": said})
    return sft(folder, f"data.template={folder / 'evil.jinja'}", rows=rows)


@case("unknown attention", "model.attn_implementation: sdap", "Did you mean 'sdpa'?")
def unknown_attention(folder: Path) -> list[str]:
    return sft(folder, "model.attn_implementation=sdap")


@case("more layers than the model has", "model.train_only: 99 layers", "the model has 4")
def too_many_layers(folder: Path) -> list[str]:
    return sft(folder, "model.train_only=99")


@case("frozen layers beside an adapter", "model.freeze", "an adapter")
def frozen_beside_an_adapter(folder: Path) -> list[str]:
    return sft(folder, "model.freeze=[embed_tokens]", "peft.r=4")


@case("revision of a folder", "model.revision", "Leave it out")
def revision_of_a_folder(folder: Path) -> list[str]:
    return sft(folder, "model.revision=main")


@case("pickled weights", "pickle", "safetensors")
def pickled_weights(folder: Path) -> list[str]:
    model = copied_model(folder)
    (model / "model.safetensors").unlink()
    torch.save({"a": torch.ones(1)}, model / "pytorch_model.bin")
    return sft(folder, model=model)


@case("truncated safetensors", "model.safetensors")
def truncated_safetensors(folder: Path) -> list[str]:
    model = copied_model(folder)
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    return sft(folder, model=model)


@case("model with code of its own", "trust_remote_code", "auto_map")
def remote_code(folder: Path) -> list[str]:
    model = copied_model(folder)
    settings = json.loads((model / "config.json").read_text())
    settings["auto_map"] = {"AutoModelForCausalLM": "modeling.Own"}
    (model / "config.json").write_text(json.dumps(settings))
    (model / "modeling.py").write_text("raise SystemExit('its code ran')")
    return sft(folder, model=model)


# Folders


@case("output folder that holds another run", "output_dir", "holds a run", "--resume")
def occupied_folder(folder: Path) -> list[str]:
    assert call(sft(folder)) == 0
    return sft(folder)


@case("resume with another stage", "stage", "pt", "sft")
def other_stage(folder: Path) -> list[str]:
    assert call(sft(folder)) == 0
    words = sft(folder, "--resume")
    return ["run", "pt", *words[2:]]


@case("resume with other data and another model", "data", "model")
def other_data(folder: Path) -> list[str]:
    assert call(sft(folder)) == 0
    return sft(folder, "--resume", model=copied_model(folder), rows=write(folder / "other.jsonl", *GOOD[:5]))


@case("output folder below a file", "output_dir", "good.jsonl")
def below_a_file(folder: Path) -> list[str]:
    return sft(folder, f"output_dir={folder / 'good.jsonl' / 'run'}")


@case("output folder that cannot be written", "output_dir", "/proc")
def unwritable_folder(folder: Path) -> list[str]:
    return sft(folder, "output_dir=/proc/llmtk")


# Predictions and chats


def asked(folder: Path, *more: str, model: Path | str = "builtin") -> list[str]:
    """Return the words of predictions that are sound but for what stands in `more`, or the model."""
    rows = write(folder / "questions.jsonl", {"question": "1+1=", "answer": "2"})
    return ["predict", str(model), "--data", str(rows), *more]


@case("run that is not there", "there is no run and no model in", "'first'")
def no_such_run(folder: Path) -> list[str]:
    (folder / "first").mkdir()
    return asked(folder, model=folder / "frst")


@case("predictions of a run that is unfinished", "not finished", "--resume")
def unfinished_run(folder: Path) -> list[str]:
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("stage: sft\n")
    (folder / "run" / "run.json").write_text("{}")
    return asked(folder, model=folder / "run")


@case("predictions over those of a former call", "exists already, with 1 rows", "--resume")
def predictions_that_are_there(folder: Path) -> list[str]:
    out = write(folder / "out.jsonl", "{}", "")
    return asked(folder, "--output", str(out))


@case("row to predict that asks nothing", "rows.jsonl:1", "leaves no prompt")
def row_without_a_question(folder: Path) -> list[str]:
    rows = write(folder / "rows.jsonl", {"messages": [{"role": "assistant", "content": "2"}]})
    return ["predict", "builtin", "--data", str(rows)]


@case("metric that is not installed", "Unknown metric 'blue'")
def absent_metric(folder: Path) -> list[str]:
    return asked(folder, "--metric", "blue")


@case("chat with an adapter whose base is gone", "is an adapter on /gone", "not there any more")
def chat_without_a_base(folder: Path) -> list[str]:
    model = copied_model(folder)
    (model / "config.json").unlink()
    (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "/gone"}')
    return ["chat", str(model)]


# Stages and plugins

STAGE = """
from llmtk import Stage
class Toy(Stage):
    def prepare_batch(self, run, rows): ...
    def compute_loss(self, run, batch): ...
"""
PLUGIN = """
from llmtk import hookimpl
class Plugin:
    @hookimpl
    def {hook}: ...
"""


@case("two distributions with one stage's name", "llmtk-stage-one", "llmtk-stage-two", "uninstall")
def two_of_a_name(folder: Path) -> list[str]:
    for name in ("one", "two"):
        install(folder, f"llmtk-stage-{name}", f"[llmtk.stages]\ntoy = llmtk_stage_{name}:Toy\n", STAGE)
    return ["run", "toy"]


@case("stage that cannot be imported", "llmtk-stage-toy", "no_such_package")
def broken_stage(folder: Path) -> list[str]:
    install(folder, "llmtk-stage-toy", "[llmtk.stages]\ntoy = llmtk_stage_toy:Toy\n", "import no_such_package")
    return ["run", "toy"]


@case("stage for another core", "llmtk-stage-toy", "llmtk-core>=99")
def stage_for_another_core(folder: Path) -> list[str]:
    entry_points = "[llmtk.stages]\ntoy = llmtk_stage_toy:Toy\n"
    install(folder, "llmtk-stage-toy", entry_points, STAGE, "llmtk-core>=99")
    return ["run", "toy"]


@case("plugin that answers a stage's hook", "compute_loss", "around_compute_loss")
def plugin_with_a_stages_hook(folder: Path) -> list[str]:
    module = PLUGIN.format(hook="compute_loss(self, run, batch)")
    install(folder, "llmtk-plugin-toy", "[llmtk.plugins]\ntoy = llmtk_plugin_toy:Plugin\n", module)
    return sft(folder, "plugins.toy={}")


@case("misspelt hook", "step_finishd", "step_finished")
def misspelt_hook(folder: Path) -> list[str]:
    module = PLUGIN.format(hook="step_finishd(self, run, step)")
    install(folder, "llmtk-plugin-other", "[llmtk.plugins]\nother = llmtk_plugin_other:Plugin\n", module)
    return sft(folder, "plugins.other={}")


@case("report on a run that is not there", "run: there is no such run", "llmtk runs list")
def report_of_no_run(folder: Path) -> list[str]:
    return ["report", str(folder / "run")]


@case("export of a run that has not finished", "is not finished", "--resume")
def export_of_an_unfinished_run(folder: Path) -> list[str]:
    (folder / "run").mkdir()
    (folder / "run/config.yaml").write_text("stage: sft\n")
    return ["export", str(folder / "run"), "--output", str(folder / "model")]


@case(
    "evaluation of an adapter whose base is gone", "is an adapter on", "not there any more", "base_model_name_or_path"
)
def base_that_is_gone(folder: Path) -> list[str]:
    model = copied_model(folder)
    assert call(sft(folder, "peft.r=2", "train.logging_steps=1", model=model)) == 0
    shutil.rmtree(model)
    return ["evaluate", str(folder / "run"), "--data", str(folder / "good.jsonl")]


@case("predictions without rows to answer", "train.do_predict needs rows to answer", "data.test", "predict.data")
def predictions_of_nothing(folder: Path) -> list[str]:
    return sft(folder, "train.do_predict=true")


@case("predictions of a model that writes no text", "train.do_predict", "has a head of one value")
def predictions_of_a_reward_model(folder: Path) -> list[str]:
    return ["run", "rm", "train.do_predict=true", f"output_dir={folder / 'run'}"]


@case("processes at a port in use", "--main-port", "Address already in use", "Give another")
def port_in_use(folder: Path) -> list[str]:
    HELD.append(socket.create_server(("127.0.0.1", 0)))
    return ["launch", "-n", "2", "--main-port", str(HELD[-1].getsockname()[1]), *sft(folder)[1:]]


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_in_so_many_words(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.chdir(tmp_path)
    words = CASES[name].words(tmp_path)
    for module in (tmp_path / "site").glob("*.py"):  # another test may have had one of that name
        monkeypatch.delitem(sys.modules, module.stem, raising=False)
    before = contents(tmp_path / "run")
    capsys.readouterr()
    code = call(words)
    said = capsys.readouterr().err
    assert code == 2, said
    assert said.startswith("error: ")
    assert "fault in llmtk" not in said
    for part in CASES[name].said:
        assert part in said
    assert contents(tmp_path / "run") == before
    assert not (tmp_path / "hacked").exists()


def contents(folder: Path) -> dict[Path, bytes]:
    """Return the files below a folder."""
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


SECRETS = {"HF_TOKEN": "hf_abcdefghijklmnop", "WANDB_API_KEY": "0123456789abcdef0123", "DB_PASSWORD": 'a"\\\\b: #c%'}


def test_secrets_of_the_environment_reach_no_file_of_a_run_and_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    template = tmp_path / f"{SECRETS['WANDB_API_KEY']}-{SECRETS['DB_PASSWORD']}.jinja"
    shutil.copy(BUILTIN / "chat_template.jinja", template)
    named = tmp_path / "${WANDB_API_KEY}-${DB_PASSWORD}.jinja"
    words = sft(tmp_path, "train.run_name=mine-${HF_TOKEN}", f"data.template={named}")
    assert call(words) == 0
    files = contents(tmp_path / "run")
    assert b"mine-${HF_TOKEN}" in files[tmp_path / "run" / "config.yaml"]
    for file, content in files.items():
        for value in SECRETS.values():
            assert value.encode() not in content, file
            assert json.dumps(value)[1:-1].encode() not in content, file
    assert call([*words, "train.max_steps=2", "--resume"]) == 0


def main() -> None:
    """Print what each case prints, in a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("input", "what is printed", "exit", show_lines=True)
    for one in CASES.values():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with open(os.devnull, "w") as null:
                stdout, sys.stdout = sys.stdout, null
                words = one.words(folder)
                sys.stdout = stdout
            path = os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])
            done = subprocess.run(
                [sys.executable, "-m", "llmtk", *words],
                capture_output=True,
                text=True,
                cwd=folder,
                env=os.environ | {"PYTHONPATH": path},
            )
            table.add_row(one.title, done.stderr.strip().replace(name, ""), str(done.returncode))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
