"""The typed facade through which the loop calls hooks, and how answers of several plugins come together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmtk.errors import PluginError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import pluggy
    import torch

    from llmtk.batch import Batch, LossOutput, Mean, Round
    from llmtk.contract import Data, Models, Row, RunView
    from llmtk.training.events import Evaluation, Plan, StepReport

    Prepare = Callable[[list[Row]], Round]
    Loss = Callable[[Batch], LossOutput]


class Hooks:
    """One run's hooks. Every call names the run, so that plugins need keep no reference to it."""

    def __init__(self, manager: pluggy.PluginManager, run: RunView) -> None:
        self._manager = manager
        self._run = run
        self._call = manager.hook
        self._prepare = self._prepare_through(_impls(manager, "around_prepare_batch"))
        self._loss = self._loss_through(_impls(manager, "around_compute_loss"))

    # Stage hooks

    def build_models(self) -> Models:
        """Ask the stage for its models."""
        return self._call.build_models(run=self._run)  # type: ignore[no-any-return]

    def build_data(self) -> Data:
        """Ask the stage for its data."""
        return self._call.build_data(run=self._run)  # type: ignore[no-any-return]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Ask the stage for the parameter groups."""
        return self._call.parameter_groups(run=self._run)  # type: ignore[no-any-return]

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Ask the stage for the optimizer."""
        return self._call.build_optimizer(run=self._run)  # type: ignore[no-any-return]

    def prepare_batch(self, rows: list[Row]) -> Round:
        """Ask the stage, and the plugins around it, for a round."""
        return self._prepare(rows)

    def compute_loss(self, batch: Batch) -> LossOutput:
        """Ask the stage, and the plugins around it, for a micro-batch's loss."""
        return self._loss(batch)

    def evaluate_batch(self, batch: Batch) -> LossOutput:
        """Ask the stage for an evaluation batch's loss and metrics."""
        return self._call.evaluate_batch(run=self._run, batch=batch)  # type: ignore[no-any-return]

    def export_model(self, path: Path) -> None:
        """Ask the stage to write the trained model."""
        self._call.export_model(run=self._run, path=path)

    # Collected hooks

    def extra_metrics(self, window: Batch) -> dict[str, Mean]:
        """Gather everybody's metrics of a window; two plugins with one name are an error."""
        metrics: dict[str, Mean] = {}
        for plugin, answer in self._collect("extra_metrics", window=window):
            if shared := metrics.keys() & answer.keys():
                raise PluginError(
                    f"{plugin}: extra_metrics gives {sorted(shared)[0]!r}, which another plugin gives too"
                )
            metrics |= answer
        return metrics

    def extra_timings(self, step: StepReport) -> dict[str, float]:
        """Gather figures for a line of timings, named by their plugins."""
        answers = self._collect("extra_timings", step=step)
        return {f"{plugin}/{name}": value for plugin, answer in answers for name, value in answer.items()}

    def extra_checkpoint_state(self) -> dict[str, Mapping[str, Any]]:
        """Gather state to save, by plugin name."""
        return dict(self._collect("extra_checkpoint_state"))

    def keepers(self) -> list[str]:
        """Return the names of those who keep state in checkpoints."""
        return [impl.plugin_name for impl in _impls(self._manager, "extra_checkpoint_state")]

    def restore_checkpoint_state(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Give each plugin its own state back."""
        for impl in _impls(self._manager, "restore_checkpoint_state"):
            if impl.plugin_name in states:
                _invoke(impl, run=self._run, state=states[impl.plugin_name])

    def extra_run_info(self) -> dict[str, Mapping[str, Any]]:
        """Gather facts for run.json, by plugin name."""
        return dict(self._collect("extra_run_info"))

    def should_stop(self, step: StepReport) -> str | None:
        """Ask everybody, and return the name of the first plugin that wants to stop, or None."""
        answers = list(self._collect("should_stop", step=step))
        return next((plugin for plugin, answer in answers if answer), None)

    def order_examples(self, epoch: int) -> Sequence[int] | None:
        """Ask the curriculum, if there is one, for an epoch's order."""
        return self._call.order_examples(run=self._run, epoch=epoch)  # type: ignore[no-any-return]

    # Events

    def run_started(self, plan: Plan) -> None:
        """Tell everybody that the run starts."""
        self._fire("run_started", plan=plan)

    def step_finished(self, step: StepReport) -> None:
        """Tell everybody about a step."""
        self._fire("step_finished", step=step)

    def after_update(self, step: StepReport) -> None:
        """Tell everybody that the weights have changed."""
        self._fire("after_update", step=step)

    def epoch_finished(self, epoch: int) -> None:
        """Tell everybody that an epoch is over."""
        self._fire("epoch_finished", epoch=epoch)

    def evaluation_finished(self, evaluation: Evaluation) -> None:
        """Tell everybody about an evaluation."""
        self._fire("evaluation_finished", evaluation=evaluation)

    def checkpoint_saved(self, path: Path) -> None:
        """Tell everybody about a checkpoint."""
        self._fire("checkpoint_saved", path=path)

    def run_finished(self, error: BaseException | None) -> None:
        """Tell everybody that the run is over."""
        self._fire("run_finished", error=error)

    # How it is done

    def answered(self, hook: str) -> bool:
        """Say whether anybody answers a hook, so that ranks need not talk about what nobody says."""
        return bool(getattr(self._call, hook).get_hookimpls())

    def _prepare_through(self, impls: Sequence[pluggy.HookImpl]) -> Prepare:
        """Compose what prepares a batch: the last of these around the others, and the stage within them all."""
        within = self._prepare_through(impls[:-1]) if impls else None

        def inner(rows: list[Row]) -> Round:
            if within is None:
                return self._call.prepare_batch(run=self._run, rows=rows)  # type: ignore[no-any-return]
            return _invoke(impls[-1], run=self._run, rows=rows, inner=within)  # type: ignore[no-any-return]

        return inner

    def _loss_through(self, impls: Sequence[pluggy.HookImpl]) -> Loss:
        """Compose what computes the loss, in the same way."""
        within = self._loss_through(impls[:-1]) if impls else None

        def inner(batch: Batch) -> LossOutput:
            if within is None:
                return self._call.compute_loss(run=self._run, batch=batch)  # type: ignore[no-any-return]
            return _invoke(impls[-1], run=self._run, batch=batch, inner=within)  # type: ignore[no-any-return]

        return inner

    def _collect(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        for impl in _impls(self._manager, hook):
            answer = _invoke(impl, run=self._run, **arguments)
            if answer is not None:
                yield impl.plugin_name, answer

    def _fire(self, hook: str, **arguments: Any) -> None:
        errors: list[tuple[str, Exception]] = []
        for impl in _impls(self._manager, hook):
            try:
                _invoke(impl, run=self._run, **arguments)
            except Exception as error:
                errors.append((impl.plugin_name, error))
        if errors:
            told = "; ".join(f"{plugin}: {type(error).__name__}: {error}" for plugin, error in errors)
            failure = PluginError(f"{hook} failed in {told}")
            failure.exit_code = 1  # while running, not before
            raise failure from errors[0][1]


def _impls(manager: pluggy.PluginManager, hook: str) -> list[pluggy.HookImpl]:
    """Return a hook's implementations in the order in which their plugins were named."""
    by_plugin = {id(impl.plugin): impl for impl in getattr(manager.hook, hook).get_hookimpls()}
    named = [plugin for _, plugin in manager.list_name_plugin()]
    return [by_plugin[id(plugin)] for plugin in named if id(plugin) in by_plugin]


def _invoke(impl: pluggy.HookImpl, **arguments: Any) -> Any:
    return impl.function(**{name: arguments[name] for name in impl.argnames})
