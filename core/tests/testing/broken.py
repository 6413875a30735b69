"""A sound stage, and stages that are like it but for one mistake each. `caught_by` names the check that must see it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from llmtk import ConfigurationError, Demo, Group, LossOutput, Mean, Round, Section, Sequence, Stage, Term

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}" + " and so on" * (n % 3)} for n in range(32)]


class Sound(Stage):
    """Negative log-likelihood of completions."""

    name = "sound"
    summary = "Sound"
    paper = "none"
    row_types = ("prompt_completion",)
    caught_by = ""

    class Options(Section):
        """Its options."""

        weight: float = 1.0
        """How much the loss counts."""
        kind: Literal["sum", "square"] = "sum"
        """Of what the sum is."""

    def prepare_batch(self, run, rows):
        return Round.of([self.group(row) for row in rows])

    def group(self, row):
        counted = {"tokens": sum(row["targets"]), "rows": 1}
        return Group([Sequence(row["input_ids"], row["targets"])], counted, place=row["place"])

    def compute_loss(self, run, batch):
        scores = run.score(batch)
        nll = -scores.logps if self.options.kind == "sum" else scores.logps.square()
        metrics = {"nll": Mean(-scores.logps.detach().sum(), len(scores.logps))}
        return LossOutput({"loss": Term(nll.sum(), "tokens", self.options.weight)}, metrics, scores)

    def demo(self):
        return Demo(
            train=ROWS,
            eval=[{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(40, 50)],
            config={"train": {"max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 1e-3}},
            figure="loss",
            measure=lambda run: run.evaluate()["nll"],
            higher_is_better=False,
        )


class MeanOfTheMicroBatch(Sound):
    caught_by = "cut"

    def compute_loss(self, run, batch):
        logps = run.score(batch).logps
        return LossOutput({"loss": Term(-logps.mean() * self.options.weight, "rows")})


class OwnDenominator(Sound):
    caught_by = "cut"

    def compute_loss(self, run, batch):
        logps = run.score(batch).logps
        return LossOutput({"loss": Term(-logps.sum() / len(logps) * len(batch), "rows")})


class ByPlaceInTheBatch(Sound):
    caught_by = "cut"

    def compute_loss(self, run, batch):
        weight = 1 + batch.target_sequence
        return LossOutput({"loss": Term(-(run.score(batch).logps * weight).sum(), "tokens")})


class MetricOfTheMicroBatch(Sound):
    caught_by = "metrics"

    def compute_loss(self, run, batch):
        output = super().compute_loss(run, batch)
        return replace(output, metrics={"nll": Mean(-output.scores.logps.detach().mean(), 1)})


class NanOfOneGroup(Sound):
    caught_by = "cut"

    def compute_loss(self, run, batch):
        output = super().compute_loss(run, batch)
        nothing = 0.0 if len(batch) > 1 else float("nan")  # as the standard deviation of one number
        return replace(output, terms={"loss": Term(output.terms["loss"].sum + nothing, "tokens")})


class NanMetricOfOneGroup(Sound):
    caught_by = "metrics"

    def compute_loss(self, run, batch):
        output = super().compute_loss(run, batch)
        nothing = 0.0 if len(batch) > 1 else float("nan")
        return replace(output, metrics={"nll": Mean(nothing, 1)})


class MetricOfARank(Sound):
    caught_by = "ranks"

    def prepare_batch(self, run, rows):
        tokens = sum(len(row["input_ids"]) for row in rows) / max(len(rows), 1)
        return replace(super().prepare_batch(run, rows), metrics={"length": Mean(tokens, 1 + run.rank)})


class DenominatorOfARank(Sound):
    caught_by = "ranks"

    def prepare_batch(self, run, rows):
        batch = super().prepare_batch(run, rows).windows[0]
        share = torch.full((len(batch),), 1 / max(int(batch.targets.sum()), 1))
        return Round([batch.with_columns(per_group={"share": share})])

    def compute_loss(self, run, batch):
        share = batch.per_group["share"][batch.sequence_group[batch.target_sequence]]
        return LossOutput({"loss": Term(-(run.score(batch).logps * share).sum(), "rows", self.options.weight)})


class OtherWindowsOnARank(Sound):
    caught_by = "ranks"

    def prepare_batch(self, run, rows):
        window = super().prepare_batch(run, rows).windows[0]
        return Round([window] * (1 + run.rank))


class NoRowsOnARank(Sound):
    caught_by = "ranks"

    def prepare_batch(self, run, rows):
        if not rows:
            raise ConfigurationError("no rows")  # an evaluation's last window has none on the second rank
        return super().prepare_batch(run, rows)


class EvaluationOfAMicroBatch(Sound):
    caught_by = "ranks"

    def evaluate_batch(self, run, batch):
        output = super().evaluate_batch(run, batch)
        return replace(output, metrics={"nll": Mean(-output.scores.logps.mean(), 1)})


class PastTheWrappedRoot(Sound):
    caught_by = "ranks"

    def compute_loss(self, run, batch):
        logps = []
        for start, length in zip(batch.segment_starts.tolist(), batch.segment_lengths.tolist(), strict=True):
            ids = batch.tokens[start : start + length]
            logits = run.model(input_ids=ids[None]).logits[0, :-1]
            picked = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            logps.append(picked[batch.targets[start + 1 : start + length]])
        return LossOutput({"loss": Term(-torch.cat(logps).sum(), "tokens", self.options.weight)})


class StateThatIsNotSaved(Sound):
    caught_by = "resume"

    def __init__(self, options=None):
        super().__init__(options)
        self.seen = 0

    def prepare_batch(self, run, rows):
        self.seen += len(rows)
        batch = super().prepare_batch(run, rows).windows[0]
        return Round([batch.with_columns(per_group={"seen": torch.full((len(batch),), float(self.seen))})])

    def compute_loss(self, run, batch):
        output = super().compute_loss(run, batch)
        scale = 1 / (1 + batch.per_group["seen"][0])
        return replace(output, terms={"loss": Term(output.terms["loss"].sum * scale, "tokens")})


class StateThatEvaluationMoves(StateThatIsNotSaved):
    caught_by = "evaluation"

    def extra_checkpoint_state(self, run):
        return {"seen": self.seen}

    def restore_checkpoint_state(self, run, state):
        self.seen = state["seen"]


class StateThatIsNoData(Sound):
    caught_by = "files"

    def extra_checkpoint_state(self, run):
        return {"options": self.options}


class GlobalGenerator(Sound):
    caught_by = "pure"

    def compute_loss(self, run, batch):
        output = super().compute_loss(run, batch)
        return replace(output, terms={"loss": Term(output.terms["loss"].sum * torch.rand(()), "tokens")})


class GlobalGeneratorInEvaluation(Sound):
    caught_by = "pure"

    def evaluate_batch(self, run, batch):
        torch.rand(())
        return super().evaluate_batch(run, batch)


class TrainsInEvaluation(Sound):
    caught_by = "evaluation"

    def evaluate_batch(self, run, batch):
        output = super().evaluate_batch(run, batch)
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter += 1e-3
        return output


class ChangesTheBatch(Sound):
    caught_by = "pure"

    def group(self, row):
        return replace(super().group(row), per_group={"scale": 1.0})

    def compute_loss(self, run, batch):
        output = super().compute_loss(run, batch)
        batch.per_group["scale"].mul_(0.5)
        return output


class LeavesItOnItself(Sound):
    caught_by = "pure"

    def prepare_batch(self, run, rows):
        self.scale = 1 / len(rows)
        return super().prepare_batch(run, rows)

    def compute_loss(self, run, batch):
        output = super().compute_loss(run, batch)
        return replace(output, terms={"loss": Term(output.terms["loss"].sum * self.scale, "tokens")})


class LeavesEvalMode(Sound):
    caught_by = "pure"

    def compute_loss(self, run, batch):
        run.model.eval()
        return super().compute_loss(run, batch)


class NoGradient(Sound):
    caught_by = "loss"

    def compute_loss(self, run, batch):
        return LossOutput({"loss": Term(-run.score(batch).logps.detach().sum(), "tokens")})


class NotANumber(Sound):
    caught_by = "loss"

    def compute_loss(self, run, batch):
        return LossOutput({"loss": Term(run.score(batch).logps.log().sum(), "tokens")})


class WeightKnownTooLate(Sound):
    caught_by = "loss"

    def compute_loss(self, run, batch):
        return LossOutput({"loss": Term(-run.score(batch).logps.sum(), "likely_tokens")})


class NotASum(Sound):
    caught_by = "loss"

    def compute_loss(self, run, batch):
        return LossOutput({"loss": Term(-run.score(batch).logps, "tokens")})


class OtherWindowsThanDeclared(Sound):
    caught_by = "loss"

    def prepare_batch(self, run, rows):
        return Round(super().prepare_batch(run, rows).windows * 2)


class WrongSign(Sound):
    caught_by = "demo"

    def compute_loss(self, run, batch):
        output = super().compute_loss(run, batch)
        return replace(output, terms={"loss": Term(-output.terms["loss"].sum, "tokens")})


class NoDemo(Sound):
    caught_by = "demo"

    def demo(self):
        raise NotImplementedError


class StopTokenMasked(Sound):
    caught_by = "stop"

    def group(self, row):
        last = max(index for index, wanted in enumerate(row["targets"]) if wanted)
        targets = [wanted and index < last for index, wanted in enumerate(row["targets"])]
        return super().group(row | {"targets": targets})


class IgnoredOption(Sound):
    caught_by = "options"

    class Options(Sound.Options):
        """One more."""

        ignored: float = 1.0
        """Nobody reads it."""


class IgnoredOptionOfAnotherName(Sound):
    caught_by = "options"

    class Options(Sound.Options):
        """One more, whose name in the configuration is none in Python."""

        lambda_: float = Field(1.0, alias="lambda", description="Nobody reads it.")


class UndocumentedOption(Sound):
    caught_by = "declared"

    class Options(Sound.Options):
        """One more."""

        mystery: float = 1.0

    def compute_loss(self, run, batch):
        assert self.options.mystery
        return super().compute_loss(run, batch)


class NoSummary(Sound):
    caught_by = "declared"
    summary = ""


class MisspeltHook(Sound):
    caught_by = "declared"

    def compute_losses(self, run, batch):
        return super().compute_loss(run, batch)


class HookWithADefault(Sound):
    caught_by = "declared"

    def prepare_batch(self, run, rows, extra=None):
        return super().prepare_batch(run, rows)


class AroundThatReturnsNothing(Sound):
    caught_by = "around"

    def around_compute_loss(self, run, batch, inner):
        inner(batch)


class PastTheHooks(Sound):
    caught_by = "around"

    def evaluate_batch(self, run, batch):
        return self.compute_loss(run, batch)


class Pickles(Sound):
    caught_by = "files"

    def export_model(self, run, path):
        super().export_model(run, path)
        torch.save({"weight": torch.ones(1)}, path / "extra.pt")


class ExportsNoModel(Sound):
    caught_by = "files"

    def export_model(self, run, path):
        super().export_model(run, path)
        (path / "model.safetensors").write_bytes(b"")


class ByPlaceInThePaddedRow(Sound):
    caught_by = "packed"

    def compute_loss(self, run, batch):
        output = super().compute_loss(run, batch)
        scale = 2.0 if run.forward.scorers[None].packed else 1.0  # as if its own indices fitted one layout alone
        return replace(output, terms={"loss": Term(output.terms["loss"].sum * scale, "tokens")})


class ColumnFromAround(Sound):
    caught_by = "packed"

    def compute_loss(self, run, batch):
        targets = batch.target_tokens

        def nll(logits):
            return -logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]  # of one tile, it is not these targets

        return LossOutput({"loss": Term(run.map_logits(batch, nll).sum() * self.options.weight, "tokens")})


class MeanOfATile(Sound):
    caught_by = "packed"

    def compute_loss(self, run, batch):
        spread = run.map_logits(batch, lambda logits: (logits - logits.mean(0)).square().sum(-1))
        return LossOutput({"loss": Term(run.score(batch).logps.neg().sum() + spread.sum(), "tokens")})


BROKEN = [
    found
    for found in list(globals().values())
    if isinstance(found, type) and issubclass(found, Sound) and found is not Sound
]
