"""A run's plugin manager: the stage and its plugins, checked, in order, and with their answers guarded."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, cast

import pluggy
from pydantic import BaseModel, Field, ValidationError, create_model

from llmtk.config.problems import explain
from llmtk.config.sections import Section
from llmtk.errors import ConfigurationError, LlmtkError, PluginError
from llmtk.host import checks, discovery
from llmtk.host.hookspecs import HOOKS, MUST_ANSWER, PROJECT, SPECS

if TYPE_CHECKING:
    from llmtk.contract import Stage

Answer = type | tuple[type, ...]


class Manager(pluggy.PluginManager):
    """Takes the stage's methods as hooks without a decorator."""

    def __init__(self, stage: object) -> None:
        super().__init__(PROJECT)
        self._stage = stage
        for spec in SPECS:
            self.add_hookspecs(spec)

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        """Return a hook's options, or None for what is no hook."""
        if plugin is self._stage:
            return cast("pluggy.HookimplOpts", {}) if name in HOOKS else None
        return super().parse_hookimpl_opts(plugin, name)


def build_manager(stage: Stage, stage_name: str, plugins: Sequence[tuple[str, object]] = ()) -> pluggy.PluginManager:
    """Register the stage and then the plugins, the last of which is outermost.

    Raises PluginError, with the plugin's name, for whatever breaks the contract: see `llmtk.host.checks`.
    """
    _check_stage(stage, stage_name)
    checks.check_names(stage_name, plugins)
    for name, plugin in plugins:
        checks.check_instance(plugin, f"plugin {name!r}")
        checks.check_plugin(type(plugin), f"plugin {name!r}")
    manager = Manager(stage)
    try:
        for name, plugin in ((stage_name, stage), *plugins):
            manager.register(plugin, name)
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        raise PluginError(f"A plugin cannot be registered: {error}") from error
    _check_single(manager)
    _guard(manager, stage_name)
    return manager


def load_plugins(config: Mapping[str, Mapping[str, Any] | None]) -> list[tuple[str, object]]:
    """Make the plugins that a configuration's `plugins:` section names, in its order.

    A plugin is a class. One with a section `Options` is made as `Plugin(options)`, one without as `Plugin()`.
    Raises PluginError for one that cannot be found, loaded or made, and ConfigurationError, naming
    `plugins.NAME.key`, for options that do not fit.
    """
    return [(name, _make(name, given or {})) for name, given in config.items()]


def plugin_versions(manager: pluggy.PluginManager) -> list[tuple[str, str]]:
    """Return each plugin's name and where it comes from, in order, the stage first.

    That is its distribution and version, or for what was passed as an object, `local` and its module.
    """
    return [(name, _origin(plugin)) for name, plugin in manager.list_name_plugin()]


def digest(entries: Sequence[tuple[str, str]]) -> str:
    """Return a hash over names and versions, in order. Ranks compare it at start."""
    return hashlib.sha256(json.dumps([list(entry) for entry in entries]).encode()).hexdigest()


# Checks across plugins


def _check_stage(stage: object, stage_name: str) -> None:
    subject = f"stage {stage_name!r}"
    checks.check_instance(stage, subject)
    checks.check_stage(type(stage), subject)
    if not hasattr(stage, "options"):
        raise PluginError(f"The {subject} has no options: its __init__ must call super().__init__(options).")


def _check_single(manager: pluggy.PluginManager) -> None:
    names = [impl.plugin_name for impl in manager.hook.order_examples.get_hookimpls()]
    if len(names) > 1:
        raise PluginError(f"order_examples is answered by {' and '.join(map(repr, names))}; only one may. Remove one.")


# Guards


def _guard(manager: pluggy.PluginManager, stage_name: str) -> None:
    """Put a guard around each implementation: pluggy drops None in silence, and lets SystemExit end the program."""
    answers = _answers()
    for hook in HOOKS:
        for impl in getattr(manager.hook, hook).get_hookimpls():
            kind = "stage" if impl.plugin_name == stage_name else "plugin"
            guard = _Guard(f"The {kind} {impl.plugin_name!r}", hook, answers.get(hook, object))
            impl.function = (guard.wrapper if impl.wrapper else guard.plain)(impl.function)


def _answers() -> dict[str, Answer]:
    # Imported late: the classes need torch, and the checks above should not wait for it.
    from llmtk.batch import LossOutput, Round
    from llmtk.contract import Data, Models

    return {
        "build_models": Models,
        "build_data": Data,
        "parameter_groups": list,
        "prepare_batch": Round,
        "compute_loss": LossOutput,
        "evaluate_batch": LossOutput,
        "around_prepare_batch": Round,
        "around_compute_loss": LossOutput,
        "extra_metrics": Mapping,
        "extra_timings": Mapping,
        "extra_checkpoint_state": Mapping,
        "extra_run_info": Mapping,
    }


class _Guard:
    """Checks the answers of one implementation of one hook, and keeps it from ending the program."""

    def __init__(self, subject: str, hook: str, answer: Answer) -> None:
        self.subject, self.hook, self.answer = subject, hook, answer

    def plain(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Guard an implementation."""

        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                answer = function(*args, **kwargs)
            except SystemExit as error:
                raise self.exit(error) from error
            return self.check(answer)

        return guarded

    def wrapper(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Guard a wrapper: a generator that yields once, and returns the answer."""

        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Generator[None, Any, Any]:
            generator = function(*args, **kwargs)
            try:
                next(generator)
            except StopIteration:
                raise PluginError(f"{self.subject}: {self.hook} did not yield, so nothing was run.") from None
            except SystemExit as error:
                raise self.exit(error) from error
            try:
                try:
                    inner = yield
                except BaseException as error:
                    generator.throw(error)
                else:
                    generator.send(inner)
            except StopIteration as stop:
                return self.check(stop.value)
            except SystemExit as error:
                raise self.exit(error) from error
            raise PluginError(f"{self.subject}: {self.hook} yields more than once.")

        return guarded

    def exit(self, error: SystemExit) -> PluginError:
        """Return what to raise in place of an exit, with which the program would end as if all were well."""
        return PluginError(f"{self.subject}: {self.hook} calls sys.exit({error.code!r}). Raise an error that says why.")

    def check(self, answer: Any) -> Any:
        """Return the answer, or raise PluginError for None (where the hook must answer) and for a wrong type."""
        if answer is None:
            if self.hook in MUST_ANSWER:
                raise PluginError(f"{self.subject}: {self.hook} returned None; did you forget `return`?")
        elif not isinstance(answer, self.answer):
            raise PluginError(
                f"{self.subject}: {self.hook} returned a {type(answer).__name__}, not a {_named(self.answer)}."
            )
        elif self.hook == "extra_metrics":
            self._check_metrics(answer)
        elif self.hook == "extra_timings":
            self._check_numbers(answer)
        return answer

    def _check_metrics(self, metrics: Any) -> None:
        from llmtk.batch import Mean

        for name, metric in metrics.items():
            if not isinstance(metric, Mean):
                raise PluginError(
                    f"{self.subject}: extra_metrics returned a {type(metric).__name__} as {name!r}. "
                    f"Return Mean(sum, count), so that means over ranks and steps are exact."
                )

    def _check_numbers(self, figures: Any) -> None:
        for name, figure in figures.items():
            if not isinstance(figure, int | float):
                raise PluginError(
                    f"{self.subject}: extra_timings returned a {type(figure).__name__} as {name!r}. Return numbers."
                )


def _named(answer: Answer) -> str:
    return " or ".join(kind.__name__ for kind in answer) if isinstance(answer, tuple) else answer.__name__


# Making plugins


def _make(name: str, given: Mapping[str, Any]) -> object:
    cls = discovery.get_plugin(name)
    section = getattr(cls, "Options", None)
    if section is None:
        if given:
            raise ConfigurationError(f"plugins.{name}: this plugin has no options. Remove {', '.join(given)}.")
        return _called(name, cls)
    if not isinstance(section, type) or not issubclass(section, Section):
        raise PluginError(f"The plugin {name!r} has Options that are no llmtk.Section. Subclass it.")
    return _called(name, cls, _options(name, section, given))


def _options(name: str, section: type[Section], given: Mapping[str, Any]) -> Section:
    """Validate options where they stand in the configuration, so that errors name their place."""
    named = create_model("NamedPlugin", __base__=Section, options=(section, Field(alias=name)))
    whole = create_model("Plugins", __base__=Section, plugins=(named, ...))
    settings = {"plugins": {name: dict(given)}}
    try:
        valid: BaseModel = whole.model_validate(settings)
    except ValidationError as error:
        raise explain(error, settings, whole, "`llmtk list-plugins` says where each plugin comes from.") from None
    return cast("Section", valid.plugins.options)  # type: ignore[attr-defined]


def _called(name: str, cls: type, *arguments: object) -> object:
    try:
        return cls(*arguments)
    except LlmtkError:
        raise
    except Exception as error:
        raise PluginError(f"The plugin {name!r} cannot be made: {type(error).__name__}: {error}.") from error


def _origin(plugin: object) -> str:
    for group in (discovery.STAGES, discovery.PLUGINS):
        for offer in discovery.offers(group):
            if _is_offered(offer, plugin):
                return f"{offer.distribution} {offer.version}"
    return f"local {type(plugin).__module__}"


def _is_offered(offer: discovery.Offer, plugin: object) -> bool:
    module, _, attribute = offer.value.partition(":")
    return getattr(sys.modules.get(module), attribute, None) is type(plugin)
