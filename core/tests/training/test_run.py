"""Whole runs through the Python API: adapters, precision, trackers, samples, the exported model."""

from __future__ import annotations

import json
import os
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from pydantic import Field
from safetensors.torch import load_file

from llmtk import ConfigurationError, LlmtkError, LossOutput, Run, Section, Term, get_stage, hookimpl, load
from llmtk.contract import Demo
from llmtk.demo import addition
from llmtk.demo.measure import exact_match
from llmtk.errors import PluginError
from llmtk.folder import RunFolder
from llmtk.models.checks import resolve
from llmtk.reporting.card import card

from .kit import EVAL, LLAMA, ROWS, Lm, assert_equal, assert_near, lines, make, series, weights


class Gradients:
    """Keeps the gradients of the first step, from inside the optimizer."""

    name = "gradients"

    @hookimpl(wrapper=True)
    def build_optimizer(self, run):
        optimizer = yield
        names = {id(p): name for name, p in run.model.named_parameters()}

        def keep(optimizer, *_):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            self.kept = {names[id(p)]: p.grad.clone() for p in params}

        optimizer.register_step_pre_hook(keep)
        return optimizer


def gradients(path, stage=Lm, **settings):
    watch = Gradients()
    make(path, stage, plugins=[watch], **{"max_steps": 1, "max_grad_norm": 0} | settings).train()
    return watch.kept


class Counting(Lm):
    """Counts how often the first layer runs."""

    ran = 0

    def build_models(self, run):
        models = super().build_models(run)

        def count(*_):
            Counting.ran += 1

        models.root.model.layers[0].mlp.register_forward_pre_hook(count)
        return models


def test_gradient_checkpointing_runs_layers_again_and_gives_the_same_gradients(tmp_path, monkeypatch):
    found, ran = {}, {}
    for saving in (False, True):
        monkeypatch.setattr(Counting, "ran", 0)
        found[saving] = gradients(tmp_path / str(saving), Counting, gradient_checkpointing=saving)
        ran[saving] = Counting.ran
    assert ran[True] == ran[False] + 1  # once more, in the backward pass
    assert_near(found[True], found[False], 1e-6)


def test_bfloat16_computes_in_it_and_keeps_float32_weights(tmp_path):
    half, full = gradients(tmp_path / "half", bf16=True), gradients(tmp_path / "full")
    assert {g.dtype for g in half.values()} == {torch.float32}
    apart = [float((half[n] - full[n]).norm() / full[n].norm()) for n in full]
    assert 1e-4 < max(apart) < 0.1
    run = json.loads((tmp_path / "half" / "run.json").read_text())
    assert run["precision"] == "bfloat16 (train.bf16)"
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float32}


def test_an_adapter_is_all_that_changes_and_all_that_is_kept(tmp_path, folder):
    run = make(tmp_path / "run", model=folder, sections={"peft": {"r": 2}}, max_steps=2)
    run.train()
    base = load_file(f"{folder}/model.safetensors")
    now = {n.removeprefix("base_model.model.").replace(".base_layer", ""): t for n, t in weights(run).items()}
    assert_equal({name: now[name] for name in base}, base)

    trained = load_file(run.checkpoints / "checkpoint-000002" / "weights.safetensors")
    assert trained
    assert all("lora_" in name for name in trained)
    assert any(tensor.any() for name, tensor in trained.items() if "lora_B" in name)
    assert (run.output_dir / "adapter_model.safetensors").exists()
    assert not (run.output_dir / "model.safetensors").exists()

    model, tokenizer = load(str(run.output_dir))
    ids = torch.tensor([tokenizer("to be")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, run.model.eval()(ids).logits)


class Smoothed(Lm):
    honours = frozenset({"label_smoothing_factor"})

    def compute_loss(self, run, batch):
        factor = run.setting("label_smoothing_factor")
        scores = run.score(batch, also=["vocab_mean"])
        smoothed = (1 - factor) * scores.logps + factor * scores.vocab_mean
        return LossOutput({"loss": Term(-smoothed.sum(), "tokens")})


def by_torch(run, label_smoothing):
    """Return torch's own loss over the run's training rows, with the model as it is now."""
    logits, targets = [], []
    for index in range(len(run.train_rows)):
        ids = torch.tensor(run.train_rows[index]["input_ids"])
        logits.append(run.model(input_ids=ids[None, :-1]).logits[0])
        targets.append(ids[1:])
    return torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(targets), label_smoothing=label_smoothing)


def test_label_smoothing_is_torchs(tmp_path):
    settings = {"rows": ROWS[:4], "label_smoothing_factor": 0.2, "max_steps": 1, "logging_steps": 1}
    run = make(tmp_path / "run", Smoothed, learning_rate=0.0, **settings)
    run.train()
    assert series(run, "loss")[0] == pytest.approx(by_torch(run, 0.2).item(), rel=1e-6)
    with pytest.raises(ConfigurationError, match="label_smoothing_factor"):
        make(tmp_path / "other", Lm, **settings)


def test_what_goes_to_a_tracker_is_what_is_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Weather:
        name = "weather"

        @hookimpl
        def extra_timings(self, run, step):
            return {"celsius": 20.5 + step.step}

    keys = {"report_to": ["tensorboard"], "run_name": "trial", "logging_steps": 1}
    run = make(tmp_path / "run", eval=EVAL, plugins=[Weather()], **keys)
    run.train()
    (file,) = (path for path in run.output_dir.rglob("events.out.tfevents*"))
    events = EventAccumulator(str(file))
    events.Reload()
    for key in ("loss", "eval_loss", "learning_rate"):
        found = [(event.step, event.value) for event in events.Scalars(key)]
        assert found == [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines(run) if key in line]
    for key in ("weather/celsius", "tokens_per_second"):
        found = [(event.step, event.value) for event in events.Scalars(key)]
        assert found == [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines(run, "timings")]
    assert lines(run, "timings")[1]["weather/celsius"] == 22.5
    assert not series(run, "weather/celsius")


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"'tensorbord' is no tracker of Accelerate's: .*tensorboard"):
        make(tmp_path / "run", report_to=["tensorbord"]).train()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("plugins", [["ema"], "ema", 3])
def test_plugins_named_in_a_list_are_told_how_they_are_written(tmp_path, plugins):
    with pytest.raises(ConfigurationError, match=r"plugins: expected keys and values, got .*plugins: \{NAME: \{\}\}"):
        make(tmp_path / "run", plugins=plugins)


def test_samples_are_written_at_each_evaluation(tmp_path):
    samples = {"samples": {"count": 2, "max_new_tokens": 5}}
    run = make(tmp_path / "run", eval=EVAL, eval_strategy="steps", eval_steps=2, sections=samples)
    run.train()
    found = lines(run, "samples")
    assert [line["step"] for line in found] == [2, 2, 4, 4]
    assert [line["prompt"] for line in found] == ["he", "a", "he", "a"]  # a quarter of a text without targets
    prompts = [run.tokenizer(prompt)["input_ids"] for prompt in ("he", "a")]
    answers = run.generate(prompts, run.sampling(temperature=0.0, max_new_tokens=5))
    assert [line["completion"] for line in found[2:]] == [run.tokenizer.decode(a.tokens) for (a,) in answers]


def test_a_finished_run_is_opened_to_evaluate_and_predict(tmp_path):
    (tmp_path / "eval.jsonl").write_text("\n".join(json.dumps(row) for row in EVAL))
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    settings = {"rows": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")}
    trained = make(tmp_path / "run", "pt", logging_steps=1, **settings)
    result = trained.train()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}

    run = Run.open(tmp_path / "run")
    assert run.evaluate()["loss"] == pytest.approx(result.metrics["eval_loss"], rel=1e-6)
    assert run.evaluate(EVAL)["loss"] == pytest.approx(result.metrics["eval_loss"], rel=1e-6)
    assert run.evaluate(EVAL[:1])["loss"] != pytest.approx(result.metrics["eval_loss"], rel=1e-6)
    answer = run.predict("to be", temperature=0.0, max_new_tokens=4)
    assert isinstance(answer, str)
    assert run.predict(["to be", "x"], temperature=0.0, max_new_tokens=4)[0] == answer
    assert trained.predict("to be", temperature=0.0, max_new_tokens=4) == answer
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    with pytest.raises(ConfigurationError, match=r"sampling settings: .*temprature"):
        run.predict("x", temprature=1)


def test_a_finished_run_with_an_adapter_is_opened_on_its_base(tmp_path):
    make(tmp_path / "base", "pt").train()
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    settings = {"rows": str(tmp_path / "rows.jsonl"), "eval": str(tmp_path / "rows.jsonl")}
    model = {"name_or_path": str(tmp_path / "base")}
    result = make(tmp_path / "run", "pt", model=model, sections={"peft": {"r": 4}}, logging_steps=1, **settings).train()

    run = Run.open(tmp_path / "run")
    assert run.evaluate()["loss"] == pytest.approx(result.metrics["eval_loss"], rel=1e-6)
    assert Run.open(tmp_path / "base").evaluate(ROWS)["loss"] != pytest.approx(result.metrics["eval_loss"], rel=1e-6)


def test_a_base_that_is_saved_in_half_precision_is_opened_as_it_was_trained_on(tmp_path, folder):
    model, tokenizer = load(folder)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    rows = str(tmp_path / "rows.jsonl")
    settings = {"rows": rows, "eval": rows, "model": {"name_or_path": str(tmp_path / "base")}}
    result = make(tmp_path / "run", "pt", sections={"peft": {"r": 4}}, **settings).train()
    assert Run.open(tmp_path / "run").evaluate()["loss"] == pytest.approx(result.metrics["eval_loss"], rel=1e-6)


def test_an_unfinished_run_is_not_opened(tmp_path):
    with pytest.raises(ConfigurationError, match="holds no run"):
        Run.open(tmp_path)
    (tmp_path / "config.yaml").write_text("stage: pt\n")
    with pytest.raises(ConfigurationError, match="is not finished"):
        Run.open(tmp_path)


def test_the_short_ways_to_say_it(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run(stage="pt", model=folder, data=ROWS, train={"max_steps": 2, "bf16": False})
    result = run.train()
    assert os.path.relpath(result.output_dir).startswith("runs/pt-")
    assert (run.config.model.name_or_path, run.config.data.train) == (folder, ROWS)
    assert result.steps == 2
    run.save(tmp_path / "copy")
    assert_equal(load_file(tmp_path / "copy" / "model.safetensors"), load_file(run.output_dir / "model.safetensors"))


def test_what_a_run_leaves_behind(tmp_path, plot):
    run = make(tmp_path / "run", eval=EVAL, logging_steps=1)
    result = run.train()
    left = {path.name for path in run.output_dir.iterdir()}
    assert {
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "timings.jsonl",
        "results.json",
        "loss.png",
        "README.md",
    } <= left
    assert json.loads((run.output_dir / "results.json").read_text())["steps"] == 4
    assert result.final_loss == series(run, "loss")[-1]
    assert result.metrics == {
        "eval_loss": series(run, "eval_loss")[-1],
        "eval_perplexity": series(run, "eval_perplexity")[-1],
    }
    checkpoint = {path.name for path in (run.checkpoints / "checkpoint-000004").iterdir()}
    assert {path.rpartition(".")[2] for path in checkpoint} == {"safetensors", "json"}
    model, tokenizer = load(str(run.output_dir))
    assert_equal(dict(model.state_dict()), weights(run))
    assert model.config.hidden_size == LLAMA["hidden_size"]
    assert tokenizer.decode(tokenizer("to be")["input_ids"]) == "to be"


class Cited(Lm):
    """A stage with all that a card tells."""

    name = "cited"
    paper = "arXiv 1234.56789"
    citation = """
        @misc{doe2012texts,
            author = {Jane Doe and
                      John Roe},
        }
    """

    class Options(Section):
        beta: float = 0.5
        names: list[str] = []


def test_the_card_says_what_the_model_is_and_how_it_came_about(tmp_path, folder):
    (tmp_path / "mine.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    sections = {"peft": {"r": 2}, "cited": {"beta": 0.25}}
    run = make(
        tmp_path / "run",
        Cited,
        rows=str(tmp_path / "mine.jsonl"),
        eval=0.25,
        model=folder,
        sections=sections,
        max_steps=2,
        weight_decay=0.1,
        warmup_steps=1,
    )
    result = run.train()
    text = (tmp_path / "run/README.md").read_text()
    read = ModelCard(text)
    assert read.data.to_dict() == {  # neither a folder nor a file is anything that the hub knows
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["llmtk", "cited"],
    }
    assert str(tmp_path) not in text
    assert re.findall(r"^##? (.+)$", text, re.MULTILINE) == [
        *("run", "Model", "Data", "Training", "Options of cited", "Results", "Versions", "Citation")
    ]
    told = dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE))
    assert told["base model"] == Path(folder).name
    assert told["method"] == "cited (arXiv 1234.56789)"
    assert told["adapter"] == "lora, r 2, alpha 32"
    assert told["train"] == "9 rows of mine.jsonl"
    assert told["eval"] == "3 rows held out of the training data (a share of 0.25)"
    assert told["steps"] == "2 of 4 rows"
    assert told["tokens of a row"] == "64 at most"
    assert told["learning rate"] == "0.01, linear, 1 step of warm-up"
    assert told["optimizer"] == "adamw_torch_fused, weight decay 0.1"
    assert told["seed"] == "42"
    assert (told["beta"], told["names"]) == ("0.25", "[]")
    assert told["eval_loss"] == f"{result.metrics['eval_loss']:.4f}"
    assert told["torch"] == torch.__version__
    assert text.endswith(
        "## Citation\n\n```bibtex\n@misc{doe2012texts,\n    author = {Jane Doe and\n              John Roe},\n}\n```\n"
    )


def test_the_card_names_what_is_on_the_hub(tmp_path):
    run = make(tmp_path / "run", max_steps=1)
    result = run.train()
    assert "## Citation" not in card(run, result)
    assert "12 rows given in Python" in card(run, result)
    model = run.config.model.model_copy(update={"name_or_path": "org/a|b", "from_config": None})
    data = run.config.data.model_copy(update={"train": ["org/rows", "more.jsonl"]})
    run.config = run.config.model_copy(update={"model": model, "data": data})
    read = ModelCard(card(run, result))
    assert read.data.base_model == "org/a|b"
    assert read.data.datasets == ["org/rows"]
    assert "| base model | org/a\\|b |" in read.text
    assert "| train | 12 rows of org/rows, more.jsonl |" in read.text


def test_a_rank_whose_machine_lacks_the_folder_says_so(tmp_path):
    backend = SimpleNamespace(is_main=False, rank=3, together=lambda what, error: nullcontext())
    with pytest.raises(ConfigurationError, match="elsewhere is not on the machine of rank 3"):
        RunFolder(tmp_path / "elsewhere").begin(SimpleNamespace(backend=backend))


def test_errors_before_training_leave_nothing(tmp_path):
    with pytest.raises(ConfigurationError):
        make(tmp_path / "run", optim="sgd", lr_scheduler_type="cosin").train()
    assert not (tmp_path / "run").exists()


def test_a_demo_measures_before_and_after(tmp_path, capsys):
    """The stage's own demo, cut down to a few sums."""
    try:
        resolve("builtin")
    except LlmtkError as error:
        pytest.skip(f"no built-in model: {error}")

    class Short(get_stage("sft")):
        name = "sft"

        def demo(self):
            rows = addition.rows("held-out", 8)
            return replace(super().demo(), train=rows, eval=rows, measure=lambda run: exact_match(run, rows))

    def short(steps, resume=None):
        train = {"max_steps": steps, "per_device_train_batch_size": 4, "warmup_steps": 0}
        return Run(Short, train=train, output_dir=str(tmp_path / "run"), resume=resume)

    result = short(1).train()
    assert all(result.metrics[name] in [n / 8 for n in range(9)] for name in ("figure_before", "figure_after"))

    written = (tmp_path / "run" / "results.json").read_bytes()
    capsys.readouterr()
    short(1, "auto").train()
    assert "Nothing left to train, the run has taken all of its steps: 1 step, loss" in capsys.readouterr().out
    assert (tmp_path / "run" / "results.json").read_bytes() == written

    longer = short(2, "auto").train()
    assert longer.steps == 2
    assert longer.metrics["figure_before"] == result.metrics["figure_before"]
    assert "Done: 2 steps" in capsys.readouterr().out


def test_a_demo_that_forgets_return_is_told(tmp_path):
    class NoDemo(Lm):
        def demo(self):
            Demo(train=[], eval=[], config={}, figure="none", measure=len)

    with pytest.raises(PluginError, match=r"demo returned NoneType, not a Demo; did you forget `return`\?"):
        Run(NoDemo, output_dir=str(tmp_path))


def test_a_demo_whose_figure_is_no_number_is_told_before_it_trains(tmp_path):
    class NoFigure(Lm):
        def demo(self):
            rows = [{"text": "some text"}] * 4
            return Demo(rows, rows, {"train": {"max_steps": 1, "bf16": False}}, "none", lambda run: None)

    with pytest.raises(PluginError, match="the demo's figure is measured as None, not as a number"):
        Run(NoFigure, output_dir=str(tmp_path)).train()
    assert not (tmp_path / "checkpoints").exists()


def test_what_a_demo_had_to_give_is_named_for_the_user_s_own_run(tmp_path, capsys):
    class Rewarded(Lm):
        class Options(Section):
            judges: list[str] = []
            """What judges."""
            beta: float = 0.1
            """How much."""
            cap: float | None = Field(None, alias="limit")
            """How much at most."""

        def demo(self):
            rows = [{"text": "some text"}] * 4
            own = {"judges": ["length"], "beta": 0.2, "limit": 3.0}
            config = {"train": {"max_steps": 1, "bf16": False}, "lm": own}
            return Demo(rows, rows, config, "nothing", lambda run: 0.0)

    Run(Rewarded, output_dir=str(tmp_path)).train()
    assert "data.train=ROWS.jsonl data.eval=0.1 lm.judges=JUDGES\n" in capsys.readouterr().out
