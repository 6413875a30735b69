"""The loop, through whole runs of tiny stages: rounds, refused steps, evaluation, the best model, events, the log."""

from __future__ import annotations

import logging
import math
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from llmtk import ConfigurationError, LossOutput, Mean, Models, Round, Stage, Term, TrainingError, hookimpl
from llmtk.errors import PluginError
from llmtk.training import checkpoints
from llmtk.training.events import falls
from llmtk.training.order import shuffled

from .kit import EVAL, GPT2, ROWS, Lm, assert_equal, group_of, lines, make, series, weights


class Rounds(Lm):
    """Three passes over each global batch, a window each."""

    windows_per_round = 3

    def prepare_batch(self, run, rows):
        groups = [group_of(row) for row in rows]
        again = [Round.of(groups[i:] + groups[:i]).windows[0] for i in range(3)]
        return Round(again, {"rows": Mean(len(rows), 1)})


class Watch:
    """Keeps what it is told, and the weights after each step."""

    name = "watch"

    def __init__(self):
        self.calls = []
        self.weights = {}
        self.reports = {}

    @hookimpl
    def run_started(self, run, plan):
        self.weights[0] = weights(run)
        self.calls.append("run_started")

    @hookimpl
    def step_finished(self, run, step):
        assert run.model.training
        self.weights[step.step] = weights(run)
        self.reports[step.step] = step
        self.calls.append(f"step {step.step}")

    @hookimpl
    def after_update(self, run, step):
        self.calls.append(f"update {step.step}")

    @hookimpl
    def epoch_finished(self, run, epoch):
        self.calls.append(f"epoch {epoch}")

    @hookimpl
    def evaluation_finished(self, run, evaluation):
        assert run.model.training
        self.calls.append(f"evaluation {evaluation.step}")

    @hookimpl
    def checkpoint_saved(self, run, path):
        assert checkpoints.verify(path) is None
        self.calls.append(path.name)

    @hookimpl
    def run_finished(self, run, error):
        self.calls.append(f"finished {error and type(error).__name__}")


def test_events_come_once_each_and_in_order(tmp_path):
    watch = Watch()
    make(tmp_path / "run", rows=ROWS[:6], eval=EVAL, plugins=[watch], max_steps=3, save_steps=2).train()
    # Two steps make an epoch, of 4 and 2 rows. The best evaluations are saved, and the last step.
    assert watch.calls == [
        "run_started",
        *("update 1", "step 1"),
        *("update 2", "evaluation 2", "step 2", "epoch 1", "checkpoint-000002"),
        *("update 3", "evaluation 3", "step 3", "checkpoint-000003"),
        "finished None",
    ]
    assert [report.epoch for report in watch.reports.values()] == [pytest.approx(4 / 6), 1.0, pytest.approx(10 / 6)]


@pytest.mark.parametrize(
    ("epochs", "steps"), [(0.1, 1), (1 / 3, 1), (0.34, 2), (1, 3), (1.5, 5), (2, 6)], ids=lambda value: f"{value:.2g}"
)
def test_epochs_may_be_fractions(tmp_path, epochs, steps):
    run = make(tmp_path / "run", num_train_epochs=epochs, max_steps=-1, logging_steps=1)
    assert run.train().steps == steps
    assert series(run, "epoch")[-1] == pytest.approx(steps / 3, abs=1e-6)


def test_every_row_is_trained_on_once_an_epoch(tmp_path):
    seen = Counter()

    class Counting(Lm):
        def compute_loss(self, run, batch):
            seen.update(batch.places)
            return super().compute_loss(run, batch)

    make(tmp_path / "run", Counting, rows=ROWS[:10], num_train_epochs=2, max_steps=-1).train()
    assert seen == {f"row {n}": 2 for n in range(1, 11)}


def test_rounds_have_a_step_for_each_window(tmp_path):
    watch = Watch()
    run = make(tmp_path / "run", Rounds, plugins=[watch], max_steps=-1, num_train_epochs=1, logging_steps=3)
    assert run.train().steps == 9
    assert [call for call in watch.calls if call.startswith("epoch")] == ["epoch 1"]
    assert watch.calls.index("epoch 1") == watch.calls.index("step 9") + 1
    assert series(run, "rows") == [4, 4, 4]
    assert series(run, "epoch") == pytest.approx([1 / 3, 2 / 3, 1], abs=1e-6)


def test_a_round_with_another_number_of_windows_is_refused(tmp_path):
    class Short(Rounds):
        def prepare_batch(self, run, rows):
            return Round(super().prepare_batch(run, rows).windows[:2])

    with pytest.raises(TrainingError, match=r"declares 3 windows in a round; prepare_batch gave \[2\]"):
        make(tmp_path / "run", Short).train()


# Refused steps


class Breaks(Lm):
    """Has a loss, or a gradient alone, that is not finite, at these steps (counted from 0)."""

    at = frozenset()
    what = "loss"

    def compute_loss(self, run, batch):
        output = super().compute_loss(run, batch)
        total = output.terms["loss"].sum
        if run.model.training and run.step in self.at:
            # The root of zero is finite, and its gradient is not.
            total = total * math.nan if self.what == "loss" else total + (total * 0).abs().sqrt()
        return LossOutput({"loss": Term(total, "tokens")}, output.metrics)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_no_weight(tmp_path, capsys, what):
    class Here(Breaks):
        at = {1, 2, 4}

    Here.what = what
    watch = Watch()
    run = make(tmp_path / "run", Here, plugins=[watch], max_steps=6, logging_steps=1, max_nonfinite_steps=3)
    assert run.train().steps == 6

    changed = [
        any(
            not torch.equal(a, b) for a, b in zip(watch.weights[s].values(), watch.weights[s + 1].values(), strict=True)
        )
        for s in range(6)
    ]
    assert changed == [True, False, False, True, False, True]
    assert [bool(report.skipped) for report in watch.reports.values()] == [not c for c in changed]
    assert watch.reports[2].skipped == f"the {what} is not finite"
    assert [call for call in watch.calls if "update" in call] == ["update 1", "update 4", "update 6"]
    assert series(run, "learning_rate") == pytest.approx([1e-2 * (6 - s) / 6 for s in range(6)])
    assert series(run, "skipped_steps") == [1, 2, 2, 3, 3]
    assert "NaN" not in (run.output_dir / "metrics.jsonl").read_text()

    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Step 2 was left out"))
    assert f"no weight changed: the {what} is not finite" in said
    rows = {run.train_rows[i]["place"] for i in shuffled(12, 42, epoch=0)[4:8]}
    assert set(said.split("Rows: ")[1].split(", ")) == rows


@pytest.mark.filterwarnings("error:Detected call of `lr_scheduler")
def test_a_first_step_that_is_refused_moves_the_schedule_on_without_a_warning_of_torch(tmp_path):
    class Here(Breaks):
        at = {0}

    run = make(tmp_path / "run", Here, max_steps=3, logging_steps=1)
    assert run.train().steps == 3
    assert series(run, "learning_rate") == pytest.approx([1e-2 * (3 - s) / 3 for s in range(3)])


def test_the_rows_of_the_micro_batch_with_the_bad_loss_alone_are_named(tmp_path, capsys):
    class OneBad(Lm):
        def compute_loss(self, run, batch):
            total = super().compute_loss(run, batch).terms["loss"].sum
            return LossOutput({"loss": Term(total * (math.inf if "row 3" in batch.places else 1), "tokens")})

    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    make(tmp_path / "run", OneBad, rows=ROWS[:4], max_steps=1, **cut).train()
    assert "the loss is not finite. Rows: row 3\n" in capsys.readouterr().out


def test_too_many_refused_steps_stop_the_run_and_the_last_checkpoint_stands(tmp_path):
    class Here(Breaks):
        at = {1, 3, 4}

    watch = Watch()
    run = make(tmp_path / "run", Here, plugins=[watch], max_steps=9, save_steps=1, max_nonfinite_steps=2)
    with pytest.raises(TrainingError, match=r"2 steps in a row were refused, the last one step 5.*Rows: row"):
        run.train()
    assert watch.calls[-1] == "finished TrainingError"
    assert_equal(weights(run), watch.weights[3])
    newest = checkpoints.newest_sound(run.checkpoints, print)
    assert newest.name == "checkpoint-000004"
    assert_equal(load_file(newest / "weights.safetensors"), {n: p.data for n, p in run.model.named_parameters()})


def test_a_window_without_a_target_is_left_out(tmp_path, capsys):
    class Sparse(Lm):
        def prepare_batch(self, run, rows):
            groups = [group_of(row) for row in rows]
            if run.step == 1:
                groups = [
                    type(g)([type(s)(s.tokens, [False] * len(s.tokens)) for s in g.sequences], {"tokens": 0})
                    for g in groups
                ]
            return Round.of(groups)

    watch = Watch()
    assert make(tmp_path / "run", Sparse, plugins=[watch], max_steps=3, max_nonfinite_steps=1).train().steps == 3
    assert watch.reports[2].skipped == "no row has a target"
    assert_equal(watch.weights[1], watch.weights[2])


# Evaluation and the best model


class Dropping(Lm):
    dropout = True


def test_evaluation_changes_nothing(tmp_path):
    """With dropout: at each step, with samples, or not at all."""
    runs = {}
    for name, strategy in (("each", {"eval_strategy": "steps", "eval_steps": 1}), ("none", {"eval_strategy": "no"})):
        model = {"from_config": GPT2, "tokenizer": {"kind": "byte"}}
        samples = {"samples": {"count": 2, "max_new_tokens": 3, "temperature": 1.0}} if name == "each" else {}
        run = make(tmp_path / name, Dropping, eval=EVAL, model=model, logging_steps=1, sections=samples, **strategy)
        run.train()
        runs[name] = run
    assert len(series(runs["each"], "eval_loss")) == 4
    assert series(runs["each"], "loss") == series(runs["none"], "loss")
    assert_equal(weights(runs["each"]), weights(runs["none"]))


def test_dropout_is_on_only_where_it_is_asked_for(tmp_path):
    """The stage's word, unless the user has one: seeds matter to the loss only with dropout."""
    model = {"from_config": GPT2 | {"resid_pdrop": 0.5}, "tokenizer": {"kind": "byte"}}
    kept = {}
    for stage, asked, drops in ((Lm, None, False), (Dropping, None, True), (Dropping, True, False), (Lm, False, True)):
        run = make(
            tmp_path / f"{stage.__name__}{asked}",
            stage,
            model=model,
            max_steps=1,
            logging_steps=1,
            disable_dropout=asked,
        )
        run.train()
        kept[drops] = {*kept.get(drops, set()), series(run, "loss")[0]}
    assert len(kept[False]) == 1
    assert kept[True].isdisjoint(kept[False])


def test_an_evaluation_is_the_exact_mean_over_all_rows(tmp_path):
    run = make(tmp_path / "run", eval=EVAL, max_steps=1, per_device_train_batch_size=2, per_device_eval_batch_size=1)
    run.train()
    total, count, model = 0.0, 0, run.model.double().eval()
    for row in run.eval_rows:
        ids = torch.tensor([row["input_ids"]])
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        total, count = total - logps.sum().item(), count + logps.numel()
    line = lines(run)[-1]
    assert line["eval_loss"] == pytest.approx(total / count, rel=1e-6)
    assert line["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-6)


class Graded(Lm):
    """Its evaluation metrics are given by the step."""

    quality = {1: 1.0, 2: 5.0, 3: 2.0, 4: 3.0, 5: math.nan}

    def evaluate_batch(self, run, batch):
        output = super().evaluate_batch(run, batch)
        value = self.quality[run.step]
        return LossOutput(output.terms, {"quality": Mean(value, 1), "some_loss": Mean(value, 1)})


@pytest.mark.parametrize(
    ("metric", "best"),
    [
        ({"metric_for_best_model": "quality"}, 2),
        ({"metric_for_best_model": "eval_quality"}, 2),
        ({"metric_for_best_model": "some_loss"}, 1),
        ({"metric_for_best_model": "quality", "greater_is_better": False}, 1),
        ({"metric_for_best_model": "some_loss", "greater_is_better": True}, 2),
    ],
)
def test_the_best_model_is_exported_and_kept(tmp_path, metric, best):
    watch = Watch()
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 100, "load_best_model_at_end": True}
    run = make(
        tmp_path / "run", Graded, eval=EVAL, plugins=[watch], max_steps=5, save_total_limit=1, **settings, **metric
    )
    result = run.train()
    assert [path.name for path in sorted(run.checkpoints.iterdir())] == [f"checkpoint-00000{best}", "checkpoint-000005"]
    assert result.best_metric == Graded.quality[best]
    assert result.best_model_path.endswith(f"checkpoint-00000{best}")
    exported = load_file(run.output_dir / "model.safetensors")
    kept = watch.weights[best]
    assert_equal(exported, {name: kept[name] for name in exported})


@pytest.mark.parametrize("metric", ["loss", "eval_loss", "loss/margin", "nll", "loss/nll", "eval_perplexity", "kl"])
def test_these_metrics_are_to_fall(metric):
    assert falls(metric)


@pytest.mark.parametrize("metric", ["token_accuracy", "rewards/margins", "eval_accuracy", "reward", "lossless"])
def test_these_metrics_are_to_rise(metric):
    assert not falls(metric)


def test_without_load_best_model_at_end_the_last_is_exported(tmp_path):
    watch = Watch()
    settings = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "quality", "save_total_limit": 1}
    run = make(tmp_path / "run", Graded, eval=EVAL, plugins=[watch], **settings)
    assert run.train().best_metric == 5.0
    exported = load_file(run.output_dir / "model.safetensors")
    assert_equal(exported, {name: watch.weights[4][name] for name in exported})


def test_a_metric_that_is_not_there_is_named(tmp_path):
    with pytest.raises(TrainingError, match=r"'qualty' is not among .*eval_loss, eval_quality"):
        make(tmp_path / "run", Graded, eval=EVAL, max_steps=1, metric_for_best_model="qualty").train()


@pytest.mark.parametrize(
    "asks",
    [
        {"load_best_model_at_end": True},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"lr_scheduler_type": "greedy"},
        {"eval_strategy": "steps"},
        {"sections": {"samples": {"count": 1}}},
    ],
)
def test_what_needs_evaluations_is_refused_without_them(tmp_path, asks):
    with pytest.raises(ConfigurationError, match=r"needs evaluation data"):
        make(tmp_path / "a", **asks).train()
    if "eval_strategy" not in asks:
        with pytest.raises(ConfigurationError, match="eval_strategy: no makes none"):
            make(tmp_path / "b", eval=EVAL, eval_strategy="no", **asks).train()


# Plugins


def test_a_plugin_stops_the_run(tmp_path, capsys):
    class Enough:
        name = "enough"

        @hookimpl
        def should_stop(self, run, step):
            return step.step == 2

    run = make(tmp_path / "run", plugins=[Enough()], max_steps=9, save_strategy="no")
    assert run.train().steps == 2
    assert "enough stopped the run" in capsys.readouterr().out
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-000002"]


def test_a_plugins_metrics_are_means_over_the_interval(tmp_path):
    class Lengths:
        name = "lengths"

        @hookimpl
        def extra_metrics(self, run, window):
            if run.step == 4:
                return None
            return {"length": Mean(len(window.tokens), len(window))}

    run = make(tmp_path / "run", plugins=[Lengths()], logging_steps=3, max_steps=6)
    run.train()

    def tokens(epoch, first):
        return sum(len(run.train_rows[i]["input_ids"]) for i in shuffled(12, 42, epoch)[first:])

    assert series(run, "length") == pytest.approx([tokens(0, 0) / 12, tokens(1, 4) / 8])
    assert series(run, "tokens") == [tokens(0, 0), tokens(0, 0) + tokens(1, 0)]


def test_the_log_is_of_exact_means_over_its_interval(tmp_path):
    """Steps of unequal numbers of tokens: the mean over all tokens of three steps, not of the three means."""
    runs = [
        make(tmp_path / str(every), logging_steps=every, max_steps=6, per_device_train_batch_size=3) for every in (1, 3)
    ]
    for run in runs:
        run.train()
    each = lines(runs[0])
    totals = [
        after - before - 3
        for before, after in zip([0, *series(runs[0], "tokens")], series(runs[0], "tokens"), strict=False)
    ]
    assert len(set(totals)) > 1
    for index, line in enumerate(lines(runs[1])):
        part = slice(3 * index, 3 * index + 3)
        mean = sum(t * e["loss"] for t, e in zip(totals[part], each[part], strict=True)) / sum(totals[part])
        assert line["loss"] == pytest.approx(mean, rel=1e-12)
        assert line["perplexity"] == pytest.approx(math.exp(mean), rel=1e-6)
        assert (line["step"], line["tokens"]) == (3 * index + 3, each[3 * index + 2]["tokens"])


def test_errors_of_plugins_are_named_and_the_folder_is_free_again(tmp_path):
    class Broken:
        name = "broken"

        @hookimpl
        def run_finished(self, run, error):
            raise KeyError("a")

    first = make(tmp_path / "run", plugins=[Broken()], max_steps=1)
    with pytest.raises(PluginError, match="run_finished failed in broken"):
        first.train()
    assert not logging.getLogger("llmtk").handlers
    make(tmp_path / "run", max_steps=1, resume="auto").train()


def test_a_stage_may_have_no_tokens_at_all(tmp_path):
    """A root that is no language model: the loop asks nothing of it but parameters."""

    class Quadratic(Stage):
        name, row_types = "quadratic", ("text",)

        def build_models(self, run):
            return Models(torch.nn.Linear(1, 1))

        def prepare_batch(self, run, rows):
            return Round.of([group_of(row) for row in rows])

        def compute_loss(self, run, batch):
            return LossOutput({"loss": Term(run.model.weight.sum() ** 2 * len(batch.target_tokens), "tokens")})

        def export_model(self, run, path):
            """Write nothing: it would not load with from_pretrained."""

    run = make(
        tmp_path / "run",
        Quadratic,
        optim="sgd",
        learning_rate=0.25,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        max_steps=3,
    )
    run._set_up()
    before = run.model.weight.item()
    run.train()
    assert run.model.weight.item() == pytest.approx(before / 8)
