"""How hooks are called: every one of them, in which order, and what comes together from several plugins."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtk.batch import Batch, LossOutput, Mean, Round, Term
from llmtk.contract import Data, Models, Stage
from llmtk.errors import PluginError
from llmtk.host.hooks import Hooks
from llmtk.host.hookspecs import HOOKS, STAGE_HOOKS, hookimpl
from llmtk.host.manager import build_manager

RUN: Any = object()
BATCH = Batch.collate([])


def loss(value: float) -> LossOutput:
    return LossOutput({"nll": Term(torch.tensor(value), per="tokens")})


class Toy(Stage):
    def prepare_batch(self, run, rows):
        return Round([BATCH] * len(rows))

    def compute_loss(self, run, batch):
        return loss(1.0)


def hooks_of(*plugins: tuple[str, object], stage: Stage | None = None) -> Hooks:
    return Hooks(build_manager(stage or Toy(), "toy", plugins), RUN)


def value(output: LossOutput) -> float:
    return float(sum(term.coefficient * term.sum for term in output.terms.values()))


CALLS: dict[str, tuple[Callable[[Hooks], Any], tuple[Any, ...], Any]] = {
    "build_models": (lambda h: h.build_models(), (), Models(torch.nn.Identity())),
    "build_data": (lambda h: h.build_data(), (), Data([])),
    "parameter_groups": (lambda h: h.parameter_groups(), (), [{}]),
    "build_optimizer": (lambda h: h.build_optimizer(), (), object()),
    "prepare_batch": (lambda h: h.prepare_batch([]), ([],), Round([])),
    "compute_loss": (lambda h: h.compute_loss(BATCH), (BATCH,), loss(2.0)),
    "evaluate_batch": (lambda h: h.evaluate_batch(BATCH), (BATCH,), loss(3.0)),
    "export_model": (lambda h: h.export_model(Path("a")), (Path("a"),), None),
    "around_prepare_batch": (lambda h: h.prepare_batch([]), ([],), Round([])),
    "around_compute_loss": (lambda h: h.compute_loss(BATCH), (BATCH,), loss(4.0)),
    "extra_metrics": (lambda h: h.extra_metrics(BATCH), (BATCH,), {"a": Mean(1, 2)}),
    "extra_timings": (lambda h: h.extra_timings("step"), ("step",), {"a": 1.5}),
    "extra_checkpoint_state": (lambda h: h.extra_checkpoint_state(), (), {"a": 1}),
    "restore_checkpoint_state": (lambda h: h.restore_checkpoint_state({"toy": {"a": 1}}), ({"a": 1},), None),
    "extra_run_info": (lambda h: h.extra_run_info(), (), {"a": 1}),
    "should_stop": (lambda h: h.should_stop("step"), ("step",), True),
    "run_started": (lambda h: h.run_started("plan"), ("plan",), None),
    "step_finished": (lambda h: h.step_finished("step"), ("step",), None),
    "after_update": (lambda h: h.after_update("step"), ("step",), None),
    "epoch_finished": (lambda h: h.epoch_finished(3), (3,), None),
    "evaluation_finished": (lambda h: h.evaluation_finished("evaluation"), ("evaluation",), None),
    "checkpoint_saved": (lambda h: h.checkpoint_saved(Path("a")), (Path("a"),), None),
    "run_finished": (lambda h: h.run_finished(None), (None,), None),
    "order_examples": (lambda h: h.order_examples(2), (2,), [1, 0]),
}
"""For each hook: how the loop calls it, what the stage should be given after `run`, and what the stage answers."""
KEPT_BY_NAME = {"extra_checkpoint_state", "extra_run_info"}


def recorder(hook: str, answer: Any, calls: list[tuple[Any, ...]]) -> Callable[..., Any]:
    """Return a method with the hook's exact signature."""
    from llmtk.host.checks import PARAMETERS

    names = ", ".join(PARAMETERS[hook])
    space: dict[str, Any] = {"calls": calls, "answer": answer}
    exec(f"def {hook}(self, {names}):\n    calls.append(({names},))\n    return answer", space)
    return space[hook]


def test_every_hook_is_tested() -> None:
    assert set(CALLS) == set(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_the_stage_answers_every_hook_without_a_decorator(hook: str) -> None:
    call, given, answer = CALLS[hook]
    calls: list[tuple[Any, ...]] = []
    stage = type("Recorded", (Toy,), {hook: recorder(hook, answer, calls)})()
    answered = call(hooks_of(stage=stage))
    assert len(calls) == 1
    assert calls[0][: 1 + len(given)] == (RUN, *given)
    if hook == "should_stop":
        assert answered == "toy"
    elif hook == "extra_timings":
        assert answered == {"toy/a": 1.5}
    else:
        assert answered == ({"toy": answer} if hook in KEPT_BY_NAME else answer)


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook not in STAGE_HOOKS])
def test_a_plugin_answers_every_other_hook(hook: str) -> None:
    call, _, answer = CALLS[hook]
    calls: list[tuple[Any, ...]] = []
    plugin = type("Recorded", (), {hook: hookimpl(recorder(hook, answer, calls))})()
    name = "toy" if hook == "restore_checkpoint_state" else "recorded"
    manager = build_manager(Toy(), "stage" if name == "toy" else "toy", [(name, plugin)])
    call(Hooks(manager, RUN))
    assert len(calls) == 1


@pytest.mark.parametrize("hook", STAGE_HOOKS)
def test_a_plugin_wraps_every_stage_hook(hook: str) -> None:
    call, _, answer = CALLS[hook]
    calls: list[tuple[Any, ...]] = []
    seen: list[Any] = []

    def wrap(self, run):
        seen.append((yield))
        return seen[-1]

    stage = type("Recorded", (Toy,), {hook: recorder(hook, answer, calls)})()
    plugin = type("Wrapping", (), {hook: hookimpl(wrapper=True)(wrap)})()
    assert call(hooks_of(("wrapping", plugin), stage=stage)) == answer
    assert (seen, len(calls)) == ([answer], 1)


def adding(name: str, order: list[str]) -> object:
    class Adding:
        @hookimpl
        def around_compute_loss(self, run, batch, inner):
            order.append(name)
            output = inner(batch)
            order.append(name)
            return LossOutput(output.terms | {name: Term(torch.tensor(10.0), "tokens", 0.5)})

        @hookimpl(wrapper=True)
        def evaluate_batch(self, run, batch):
            order.append(name)
            answer = yield
            order.append(name)
            return answer

        @hookimpl
        def step_finished(self, run, step):
            order.append(name)

    return Adding()


def test_the_last_named_is_outermost() -> None:
    order: list[str] = []
    hooks = hooks_of(*((name, adding(name, order)) for name in ("first", "second", "third")))
    assert list(hooks.compute_loss(BATCH).terms) == ["nll", "first", "second", "third"]
    assert order == ["third", "second", "first", "first", "second", "third"]


def test_wrappers_nest_as_named_too() -> None:
    order: list[str] = []
    stage = type("Evaluating", (Toy,), {"evaluate_batch": recorder("evaluate_batch", loss(1.0), [])})()
    hooks_of(("first", adding("first", order)), ("second", adding("second", order)), stage=stage).evaluate_batch(BATCH)
    assert order == ["second", "first", "first", "second"]


def test_events_fire_as_named() -> None:
    order: list[str] = []
    hooks = hooks_of(("b", adding("b", order)), ("a", adding("a", order)), ("c", adding("c", order)))
    hooks.step_finished(RUN)
    assert order == ["b", "a", "c"]


def test_an_around_hook_adds_a_term() -> None:
    assert value(hooks_of(("adding", adding("extra", []))).compute_loss(BATCH)) == 6.0


def test_an_around_hook_changes_what_goes_in() -> None:
    class Doubling:
        @hookimpl
        def around_prepare_batch(self, run, rows, inner):
            return inner(rows * 2)

    assert len(hooks_of(("doubling", Doubling())).prepare_batch([{}, {}, {}]).windows) == 6


def test_an_around_hook_calls_inner_twice_through_those_below() -> None:
    class Twice:
        @hookimpl
        def around_compute_loss(self, run, batch, inner):
            first, second = inner(batch), inner(batch)
            return LossOutput(first.terms | {f"{name} again": term for name, term in second.terms.items()})

    order: list[str] = []
    assert value(hooks_of(("adding", adding("extra", order)), ("twice", Twice())).compute_loss(BATCH)) == 12.0
    assert order == ["extra"] * 4


@pytest.mark.parametrize("plugins", [1, 2])
def test_inner_that_is_called_without_its_batch_is_told_as_a_plugin_s_author_knows_it(plugins: int) -> None:
    class Forgetful:
        @hookimpl
        def around_compute_loss(self, run, batch, inner):
            return inner()

    named = [("adding", adding("extra", [])), ("forgetful", Forgetful())][-plugins:]  # around the stage, or a plugin
    with pytest.raises(TypeError, match=r"inner\(\) missing 1 required positional argument: 'batch'"):
        hooks_of(*named).compute_loss(BATCH)


def test_the_default_evaluation_goes_through_the_plugins_around_the_loss() -> None:
    class View:
        hooks: Hooks

    run = View()
    run.hooks = Hooks(build_manager(Toy(), "toy", [("adding", adding("extra", []))]), run)
    assert value(run.hooks.evaluate_batch(BATCH)) == 6.0


def test_all_plugins_hear_an_event_and_all_errors_are_told() -> None:
    heard: list[str] = []

    def raising(name: str, error: Exception | None) -> tuple[str, object]:
        class Listening:
            @hookimpl
            def run_finished(self, error):
                heard.append(name)
                if raised:
                    raise raised

        raised = error
        return name, Listening()

    hooks = hooks_of(
        raising("early", ValueError("too early")), raising("fine", None), raising("late", OSError("too late"))
    )
    with pytest.raises(PluginError) as caught:
        hooks.run_finished(None)
    assert heard == ["early", "fine", "late"]
    assert "run_finished" in str(caught.value)
    assert "early: ValueError: too early" in str(caught.value)
    assert "late: OSError: too late" in str(caught.value)


def test_states_are_kept_apart_and_given_back_in_order() -> None:
    restored: list[tuple[str, Any]] = []

    def keeping(name: str) -> tuple[str, object]:
        class Keeping:
            @hookimpl
            def extra_checkpoint_state(self):
                return {"name": name}

            @hookimpl
            def restore_checkpoint_state(self, state):
                restored.append((name, state))

        return name, Keeping()

    hooks = hooks_of(keeping("b"), keeping("a"), keeping("new"))
    states = hooks.extra_checkpoint_state()
    assert states == {"b": {"name": "b"}, "a": {"name": "a"}, "new": {"name": "new"}}
    del states["new"]
    hooks.restore_checkpoint_state(states)
    assert restored == [("b", {"name": "b"}), ("a", {"name": "a"})]


def test_two_plugins_with_one_metric_are_an_error() -> None:
    class Counting:
        @hookimpl
        def extra_metrics(self):
            return {"count": Mean(1, 1)}

    with pytest.raises(PluginError, match="second: extra_metrics gives 'count'"):
        hooks_of(("first", Counting()), ("second", Counting())).extra_metrics(BATCH)


def test_everybody_is_asked_whether_to_stop_and_the_first_yes_is_named() -> None:
    asked: list[str] = []

    def stopping(name: str, answer: bool) -> tuple[str, object]:
        class Stopping:
            @hookimpl
            def should_stop(self):
                asked.append(name)
                return answer

        return name, Stopping()

    assert hooks_of(stopping("a", False), stopping("b", True), stopping("c", True)).should_stop(RUN) == "b"
    assert asked == ["a", "b", "c"]


def test_nobody_orders_the_examples() -> None:
    assert hooks_of().order_examples(0) is None
