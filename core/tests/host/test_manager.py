"""What is refused before a run starts, and what guards its answers."""

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from llmtk.batch import Batch, LossOutput, Round
from llmtk.config.sections import Section
from llmtk.contract import Models, RowType, Stage
from llmtk.data.encoders import ENCODERS
from llmtk.data.rows import Row
from llmtk.errors import ConfigurationError, DatasetError, PluginError
from llmtk.host import discovery, manager
from llmtk.host.hooks import Hooks
from llmtk.host.hookspecs import hookimpl
from llmtk.host.manager import build_manager

RUN: Any = object()
BATCH = Batch.collate([])


class Toy(Stage):
    def prepare_batch(self, run, rows):
        return Round([])

    def compute_loss(self, run, batch):
        return LossOutput({})


def stage(**attributes: Any) -> Stage:
    return type("Other", (Toy,), attributes)()


def plugin(**attributes: Any) -> object:
    return type("Other", (), attributes)()


def fine(self, run): ...


def impl() -> Callable[..., None]:
    """Return a sound hook implementation of its own: the decorator marks the function itself."""

    @hookimpl
    def sound(self, run): ...

    return sound


def refused(call: Callable[[], object], *parts: str) -> None:
    with pytest.raises(PluginError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)


def refused_stage(stage: Any, *parts: str) -> None:
    refused(lambda: build_manager(stage, "toy", []), "stage 'toy'", *parts)


def refused_plugin(plugin: object, *parts: str) -> None:
    refused(lambda: build_manager(Toy(), "toy", [("other", plugin)]), "plugin 'other'", *parts)


def test_stage_first_then_plugins_as_named() -> None:
    plugins = [(name, plugin(run_started=impl())) for name in "cab"]
    built = build_manager(Toy(), "toy", plugins)
    assert [name for name, _ in built.list_name_plugin()] == ["toy", "c", "a", "b"]


# Instances, classes and names


def test_a_class_in_place_of_an_instance() -> None:
    refused_stage(Toy, "is the class Toy", "Pass an instance: Toy(...)")
    refused_plugin(type(plugin(run_started=impl())), "is the class Other", "Other(...)")


def test_a_module_in_place_of_an_instance() -> None:
    refused_plugin(types.ModuleType("some_module"), "is the module some_module")


def test_what_is_no_stage_is_no_stage() -> None:
    refused_stage(plugin(), "not a subclass of llmtk.Stage")


def test_a_stage_as_a_plugin() -> None:
    refused_plugin(Toy(), "is a stage, not a plugin")


@pytest.mark.parametrize("nothing", [plugin(), "early-stopping", plugin(helper=fine), lambda: None])
def test_a_plugin_that_answers_nothing(nothing: object) -> None:
    refused_plugin(nothing, "answers no hook", "@hookimpl")


def test_two_plugins_with_one_name() -> None:
    twice = [("same", plugin(run_started=impl())), ("same", plugin(run_started=impl()))]
    refused(lambda: build_manager(Toy(), "toy", twice), "Two plugins are named 'same'", "Rename")


def test_a_plugin_with_the_stage_s_name() -> None:
    named = [("toy", plugin(run_started=impl()))]
    refused(lambda: build_manager(Toy(), "toy", named), "plugin 'toy'", "the stage's name", "Rename the plugin")


def test_one_instance_twice() -> None:
    one = plugin(run_started=impl())
    refused(lambda: build_manager(Toy(), "toy", [("a", one), ("b", one)]), "'b'", "same instance as 'a'")


def test_two_plugins_that_compare_equal_are_told_apart_or_refused() -> None:
    @dataclass
    class Equal:
        @hookimpl
        def run_started(self): ...

    refused(lambda: build_manager(Toy(), "toy", [("a", Equal()), ("b", Equal())]), "cannot be registered", "'a'")


def test_a_stage_without_options() -> None:
    refused_stage(stage(__init__=lambda self: None), "no options", "super().__init__(options)")


def test_the_contract_names_every_row_type_that_can_be_read() -> None:
    assert set(get_args(RowType)) == {kind.type for kind in Row.__subclasses__()} == set(ENCODERS)


def test_a_stage_whose_row_types_or_needs_are_none_that_there_are() -> None:
    refused_stage(
        stage(row_types=("pair", "dialog")), "'dialog' in row_types", "Did you mean 'dialogue'?", "Known: text"
    )
    refused_stage(stage(row_types="pair"), "row_types = 'pair', one word and no tuple", "Write ('pair',)")
    refused_stage(stage(needs=frozenset({"referense"})), "'referense' in needs", "Did you mean 'reference'?")
    refused_stage(
        stage(honours=frozenset({"label_smoothing"})), "'label_smoothing' in honours", "mean 'label_smoothing_factor'?"
    )


def test_a_stage_with_an_option_without_a_default() -> None:
    class Options(Section):
        beta: float

    refused_stage(stage(Options=Options, __init__=lambda self: None), "an option 'beta' without a default")


def test_a_stage_of_another_contract() -> None:
    refused_stage(stage(api=2), "version 2 of the contract", "Upgrade the core")
    refused_stage(stage(api=0), "version 0 of the contract", "Upgrade the stage")


@pytest.mark.parametrize("missing", ["prepare_batch", "compute_loss"])
def test_a_stage_that_does_not_override_what_trains(missing: str) -> None:
    present = {"prepare_batch", "compute_loss"} - {missing}
    refused_stage(type("Half", (Stage,), {name: vars(Toy)[name] for name in present})(), f"not override {missing}")


# Names that nearly are hooks


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("compute_los", "compute_loss"),
        ("_compute_loss", "compute_loss"),
        ("compute_losses", "compute_loss"),
        ("computeLoss", "compute_loss"),
        ("prepare_bacth", "prepare_batch"),
        ("evaluate_batches", "evaluate_batch"),
        ("build_model", "build_models"),
        ("on_step_finished", "step_finished"),
        ("step_finish", "step_finished"),
        ("should_stop_", "should_stop"),
    ],
)
def test_a_name_that_resembles_a_hook(name: str, hook: str) -> None:
    told = name, f"resembles the hook {hook}"
    refused_stage(stage(**{name: fine}), *told)
    refused_plugin(plugin(run_started=impl(), **{name: fine}), *told, "@hookimpl")


@pytest.mark.parametrize(
    "name", ["_compute_logps", "build_dataset", "loss", "_compute_kl", "options", "step", "prepare"]
)
def test_a_name_of_its_own(name: str) -> None:
    build_manager(stage(**{name: fine}), "toy", [("other", plugin(run_started=impl(), **{name: fine}))])


@pytest.mark.parametrize(("name", "meant"), [("honors", "honours"), ("row_type", "row_types"), ("default", "defaults")])
def test_a_declaration_that_is_misspelt(name: str, meant: str) -> None:
    refused_stage(stage(**{name: ()}), name, f"resembles {meant}", "rename")
    build_manager(stage(**{f"_{meant}": ()}), "toy", [])


def test_a_hook_without_its_decorator() -> None:
    refused_plugin(plugin(step_finished=fine), "step_finished without @hookimpl", "Decorate it")


def test_an_override_of_a_plugin_s_hook_needs_the_decorator_too() -> None:
    class Base:
        @hookimpl
        def step_finished(self): ...

    class Derived(Base):
        def step_finished(self): ...

    refused_plugin(Derived(), "step_finished without @hookimpl")


def test_a_decorated_method_that_is_no_hook() -> None:
    refused_plugin(plugin(step_begun=impl()), "@hookimpl on step_begun", "not a hook", "run_started")
    refused_plugin(plugin(step_finishd=impl()), "@hookimpl on step_finishd", "Did you mean 'step_finished'?")
    refused_stage(stage(step_begun=impl()), "@hookimpl on step_begun")


# Who may answer


def test_a_plugin_that_answers_a_stage_hook() -> None:
    def compute_loss(self, run, batch): ...

    refused_plugin(
        plugin(compute_loss=hookimpl(compute_loss)), "answers compute_loss", "wrapper=True", "around_compute_loss"
    )
    refused_plugin(plugin(build_models=impl()), "answers build_models", "stage's alone")


def test_two_that_order_the_examples() -> None:
    def order_examples(self, epoch):
        return [0]

    two = [(name, plugin(order_examples=hookimpl(order_examples))) for name in ("a", "b")]
    build_manager(Toy(), "toy", two[:1])
    refused(lambda: build_manager(Toy(), "toy", two), "order_examples", "'a' and 'b'", "Remove one")


# Options of @hookimpl


def wrapping(self):
    return (yield)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"hookwrapper": True}, "Write wrapper=True"),
        ({"specname": "step_finished"}, "Name the method after its hook"),
        ({"tryfirst": True}, "tryfirst=True"),
        ({"trylast": True}, "trylast=True"),
        ({"optionalhook": True}, "optionalhook=True"),
    ],
)
def test_options_that_are_not_followed(options: dict[str, Any], told: str) -> None:
    refused_plugin(plugin(compute_loss=hookimpl(**options)(wrapping)), "compute_loss", told)


def test_a_stage_needs_no_decorator_and_takes_no_options() -> None:
    def evaluate_batch(self, run, batch): ...

    build_manager(stage(evaluate_batch=hookimpl(evaluate_batch)), "toy", [])
    refused_stage(stage(evaluate_batch=hookimpl(wrapper=True)(evaluate_batch)), "evaluate_batch with options", "remove")


@pytest.mark.parametrize("hook", ["step_finished", "around_compute_loss", "extra_metrics", "order_examples"])
def test_only_stage_hooks_are_wrapped(hook: str) -> None:
    refused_plugin(plugin(**{hook: hookimpl(wrapper=True)(wrapping)}), f"{hook} with wrapper=True", "compute_loss")


def test_a_wrapper_that_never_yields() -> None:
    refused_plugin(plugin(compute_loss=hookimpl(wrapper=True)(fine)), "compute_loss", "never yields", "answer = yield")


# Signatures


def with_default(self, run, batch=None): ...
def with_args(self, *args): ...
def with_kwargs(self, **kwargs): ...
def keyword_only(self, run, *, batch): ...
def positional_only(self, run, batch, /): ...
def unknown(self, run, bacth): ...
def extra(self, run, batch, device): ...
def selfless(run, batch): ...


SIGNATURES = [
    (with_default, "default for 'batch'"),
    (with_args, "*args"),
    (with_kwargs, "**kwargs"),
    (keyword_only, "'batch' as keyword-only"),
    (positional_only, "positional-only"),
    (unknown, "unknown parameter 'bacth'"),
    (extra, "unknown parameter 'device'"),
    (selfless, "without self"),
]


@pytest.mark.parametrize(("function", "told"), SIGNATURES)
def test_signatures_are_frozen(function: Callable[..., Any], told: str) -> None:
    refused_stage(stage(compute_loss=function), "compute_loss", told, "def compute_loss(self, run, batch)")
    around = types.FunctionType(function.__code__, {}, argdefs=function.__defaults__)
    wanted = "def around_compute_loss(self, run, batch, inner)"
    refused_plugin(plugin(around_compute_loss=hookimpl(around)), "around_compute_loss", told, wanted)


def test_a_stage_takes_all_parameters_of_a_stage_hook_in_order() -> None:
    def fewer(self, run): ...
    def swapped(self, batch, run): ...

    refused_stage(stage(compute_loss=fewer), "compute_loss", "(self, run)", "def compute_loss(self, run, batch)")
    refused_stage(stage(compute_loss=swapped), "(self, batch, run)")


def test_the_other_hooks_may_take_fewer() -> None:
    def step_finished(self): ...

    hooks = Hooks(build_manager(Toy(), "toy", [("other", plugin(step_finished=hookimpl(step_finished)))]), RUN)
    hooks.step_finished(RUN)


def test_a_decorated_method_keeps_its_signature() -> None:
    def prepare_batch(self, run, rows):
        assert not torch.is_grad_enabled()
        return Round([])

    hooks = Hooks(build_manager(stage(prepare_batch=torch.no_grad()(prepare_batch)), "toy", []), RUN)
    assert hooks.prepare_batch([]).windows == []


def generating(self, run, batch):
    yield LossOutput({})


async def awaited(self, run, batch): ...


async def generating_async(self, run, batch):
    yield LossOutput({})


@pytest.mark.parametrize(
    ("function", "told"), [(generating, "a yield"), (generating_async, "a yield"), (awaited, "async def")]
)
def test_generators_and_coroutines(function: Callable[..., Any], told: str) -> None:
    refused_stage(stage(compute_loss=function), "compute_loss", told)
    refused_plugin(plugin(around_compute_loss=hookimpl(function)), "around_compute_loss", told)


@pytest.mark.parametrize("attribute", [staticmethod(fine), classmethod(fine), property(fine), None, 3])
def test_a_hook_is_a_plain_method(attribute: object) -> None:
    refused_stage(stage(run_started=attribute), "run_started as a", "plain method")
    refused_plugin(plugin(run_started=attribute), "run_started as a", "plain method")


def test_a_hook_on_the_instance() -> None:
    other: Any = plugin(run_started=impl())
    other.step_finished = hookimpl(lambda: None)
    refused_plugin(other, "step_finished on the instance", "in the class")


# Guards


def told_while_running(call: Callable[[Hooks], object], *parts: str, stage: Stage | None = None, **other: Any) -> None:
    plugins = [("other", plugin(**other))] if other else []
    hooks = Hooks(build_manager(stage or Toy(), "toy", plugins), RUN)
    refused(lambda: call(hooks), *parts)


def test_a_stage_that_forgets_return() -> None:
    def compute_loss(self, run, batch): ...

    told_while_running(
        lambda hooks: hooks.compute_loss(BATCH),
        "The stage 'toy': compute_loss returned None; did you forget `return`?",
        stage=stage(compute_loss=compute_loss),
    )


def test_a_stage_that_ends_the_program() -> None:
    def compute_loss(self, run, batch):
        raise SystemExit

    told_while_running(
        lambda hooks: hooks.compute_loss(BATCH),
        "The stage 'toy': compute_loss calls sys.exit(None). Raise an error",
        stage=stage(compute_loss=compute_loss),
    )


def test_a_plugin_that_ends_the_program() -> None:
    def step_finished(self, run, step):
        raise SystemExit(0)

    def compute_loss(self):
        yield
        raise SystemExit(0)

    told_while_running(
        lambda hooks: hooks.step_finished(None),
        "The plugin 'other': step_finished calls sys.exit(0). Raise an error",
        step_finished=hookimpl(step_finished),
    )
    told_while_running(
        lambda hooks: hooks.compute_loss(BATCH),
        "The plugin 'other': compute_loss calls sys.exit(0). Raise an error",
        compute_loss=hookimpl(wrapper=True)(compute_loss),
    )


def test_a_wrapper_that_forgets_return() -> None:
    def compute_loss(self):
        yield

    told_while_running(
        lambda hooks: hooks.compute_loss(BATCH),
        "The plugin 'other': compute_loss returned None",
        compute_loss=hookimpl(wrapper=True)(compute_loss),
    )


def test_an_around_hook_that_forgets_return() -> None:
    def around_prepare_batch(self, rows, inner):
        inner(rows)

    told_while_running(
        lambda hooks: hooks.prepare_batch([]),
        "The plugin 'other': around_prepare_batch returned None",
        around_prepare_batch=hookimpl(around_prepare_batch),
    )


def test_an_order_that_is_forgotten() -> None:
    def order_examples(self): ...

    told_while_running(
        lambda hooks: hooks.order_examples(0),
        "The plugin 'other': order_examples returned None",
        order_examples=hookimpl(order_examples),
    )


@pytest.mark.parametrize(
    ("hook", "call", "wanted"),
    [
        ("compute_loss", lambda h: h.compute_loss(BATCH), "LossOutput"),
        ("around_compute_loss", lambda h: h.compute_loss(BATCH), "LossOutput"),
        ("evaluate_batch", lambda h: h.evaluate_batch(BATCH), "LossOutput"),
        ("prepare_batch", lambda h: h.prepare_batch([]), "Round"),
        ("around_prepare_batch", lambda h: h.prepare_batch([]), "Round"),
        ("build_models", lambda h: h.build_models(), "Models"),
        ("build_data", lambda h: h.build_data(), "Data"),
        ("parameter_groups", lambda h: h.parameter_groups(), "list"),
        ("extra_metrics", lambda h: h.extra_metrics(BATCH), "Mapping"),
        ("extra_timings", lambda h: h.extra_timings("step"), "Mapping"),
        ("extra_checkpoint_state", lambda h: h.extra_checkpoint_state(), "Mapping"),
        ("extra_run_info", lambda h: h.extra_run_info(), "Mapping"),
    ],
)
def test_an_answer_of_the_wrong_type(hook: str, call: Callable[[Hooks], object], wanted: str) -> None:
    from llmtk.host.checks import PARAMETERS

    space: dict[str, Any] = {}
    exec(f"def {hook}(self, {', '.join(PARAMETERS[hook])}): return 3.5", space)
    told_while_running(
        call, f"The stage 'toy': {hook} returned a float, not a {wanted}", stage=stage(**{hook: space[hook]})
    )


def test_metrics_that_are_no_means() -> None:
    def extra_metrics(self):
        return {"entropy": 0.5}

    told_while_running(
        lambda hooks: hooks.extra_metrics(BATCH),
        "The plugin 'other': extra_metrics returned a float as 'entropy'",
        "Mean(sum, count)",
        extra_metrics=hookimpl(extra_metrics),
    )


def test_timings_that_are_no_numbers() -> None:
    def extra_timings(self):
        return {"speed": "fast"}

    told_while_running(
        lambda hooks: hooks.extra_timings("step"),
        "The plugin 'other': extra_timings returned a str as 'speed'",
        "Return numbers",
        extra_timings=hookimpl(extra_timings),
    )


def test_what_may_be_none() -> None:
    def nothing(self): ...

    def export_model(self, run, path): ...

    other = plugin(extra_metrics=hookimpl(nothing), extra_run_info=hookimpl(nothing))
    hooks = Hooks(build_manager(stage(export_model=export_model), "toy", [("other", other)]), RUN)
    hooks.export_model(Path("a"))
    assert (hooks.extra_metrics(BATCH), hooks.extra_run_info()) == ({}, {})


def test_a_wrapper_that_yields_never_or_twice() -> None:
    def never(self):
        if self is None:
            yield
        return 1

    def twice(self):
        yield
        yield

    def call(hooks: Hooks) -> object:
        return hooks.compute_loss(BATCH)

    told_while_running(call, "'other': compute_loss did not yield", compute_loss=hookimpl(wrapper=True)(never))
    told_while_running(call, "'other': compute_loss yields more", compute_loss=hookimpl(wrapper=True)(twice))


def test_a_wrapper_sees_the_stage_s_error_and_may_answer() -> None:
    def build_models(self, run):
        raise OSError("no such model")

    def answering(self):
        try:
            return (yield)
        except OSError:
            return Models(torch.nn.Identity())

    def passing(self):
        return (yield)

    failing = stage(build_models=build_models)
    saved = plugin(build_models=hookimpl(wrapper=True)(answering))
    assert isinstance(Hooks(build_manager(failing, "toy", [("a", saved)]), RUN).build_models(), Models)
    unsaved = plugin(build_models=hookimpl(wrapper=True)(passing))
    with pytest.raises(OSError, match="no such model"):
        Hooks(build_manager(failing, "toy", [("a", unsaved)]), RUN).build_models()


# Plugins of a configuration


class Patient:
    class Options(Section):
        patience: int = 3

    def __init__(self, options: Options) -> None:
        self.options = options

    @hookimpl
    def should_stop(self) -> bool:
        return self.options.patience == 0


class Plain:
    @hookimpl
    def run_started(self): ...


class Failing(Plain):
    def __init__(self) -> None:
        raise KeyError("no luck")


class Refusing(Plain):
    def __init__(self) -> None:
        raise DatasetError("no such file")


class OddOptions(Plain):
    Options = dict


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("toy_plugins")
    classes = {"early-stopping": Patient, "plain": Plain, "failing": Failing, "refusing": Refusing, "odd": OddOptions}
    found = []
    for name, cls in classes.items():
        setattr(module, cls.__name__, cls)
        found.append(discovery.Offer(discovery.PLUGINS, name, f"d-{name}", "1.0", "", f"toy_plugins:{cls.__name__}"))
    monkeypatch.setitem(sys.modules, "toy_plugins", module)
    monkeypatch.setattr(discovery, "offers", lambda group: found if group == discovery.PLUGINS else [])


def test_plugins_are_made_in_the_order_of_the_configuration() -> None:
    made = manager.load_plugins({"plain": {}, "early-stopping": {"patience": 5}})
    assert [(name, type(plugin)) for name, plugin in made] == [("plain", Plain), ("early-stopping", Patient)]
    assert made[1][1].options.patience == 5


def test_options_have_defaults() -> None:
    assert manager.load_plugins({"early-stopping": None})[0][1].options.patience == 3


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"patience": "long"}, ["plugins.early-stopping.patience", "a whole number", '"long"']),
        ({"patiense": 3}, ["plugins.early-stopping.patiense", "unknown key", "plugins.early-stopping.patience"]),
    ],
)
def test_options_that_do_not_fit_name_their_place(given: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        manager.load_plugins({"early-stopping": given})
    for part in parts:
        assert part in str(caught.value)


def test_options_for_a_plugin_that_has_none() -> None:
    with pytest.raises(ConfigurationError, match=r"plugins\.plain: this plugin has no options\. Remove a, b\."):
        manager.load_plugins({"plain": {"a": 1, "b": 2}})


def test_a_plugin_that_is_not_installed() -> None:
    refused(
        lambda: manager.load_plugins({"erly-stopping": {}}),
        "Did you mean 'early-stopping'?",
        "llmtk-plugin-erly-stopping",
    )


def test_a_plugin_that_cannot_be_made() -> None:
    refused(lambda: manager.load_plugins({"failing": {}}), "plugin 'failing' cannot be made", "KeyError: 'no luck'")
    refused(lambda: manager.load_plugins({"odd": {}}), "plugin 'odd'", "no llmtk.Section")
    with pytest.raises(DatasetError, match="no such file"):
        manager.load_plugins({"refusing": {}})


# Where plugins come from


def test_versions_name_the_distribution_or_the_module() -> None:
    local = plugin(run_started=impl())
    built = build_manager(Toy(), "toy", [*manager.load_plugins({"plain": {}}), ("mine", local)])
    here = type(local).__module__
    assert manager.plugin_versions(built) == [
        ("toy", f"local {__name__}"),
        ("plain", "d-plain 1.0"),
        ("mine", f"local {here}"),
    ]


def test_a_digest_depends_on_names_versions_and_order() -> None:
    one = manager.digest([("a", "1"), ("b", "2")])
    assert one == manager.digest([("a", "1"), ("b", "2")])
    assert len({one, *map(manager.digest, ([("b", "2"), ("a", "1")], [("a", "1"), ("b", "3")], [("a", "1")], []))}) == 5
