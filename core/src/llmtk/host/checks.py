"""What is checked of stages and plugins before anything runs: what pluggy would let pass in silence.

A hook that is misspelt would leave the default in force, and a wrapper of an event would never run. So a class may have
no attribute whose name resembles a hook's without being one: names are compared without leading and trailing
underscores, capitals and an `on_` in front, and resemble each other when they are equal without underscores or when
difflib's ratio is 0.9 or more. `_compute_loss`, `compute_losses` and `prepare_bacth` are refused; `compute_logps` and
`build_dataset` are fine. What a stage inherits from `Stage` is exempt. The names of a stage's declarations
(`row_types`, `honours`, ...) are guarded in the same way, but for underscores.
"""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from types import FunctionType
from typing import TYPE_CHECKING, Any, get_args

from llmtk.config.sections import Section
from llmtk.contract import API, Head, Need, RowType, Stage
from llmtk.errors import PluginError, suggest
from llmtk.host.hookspecs import HOOKS, PROJECT, SPECS, STAGE_HOOKS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PARAMETERS: dict[str, tuple[str, ...]] = {
    name: tuple(inspect.signature(vars(spec)[name]).parameters)[1:]
    for spec in SPECS
    for name in HOOKS
    if name in vars(spec)
}
"""The parameters of each hook, without self."""

_DECLARATIONS = tuple(name for name in vars(Stage) if not name.startswith("_") and name not in HOOKS)
_RESEMBLANCE = 0.9


def check_stage(cls: object, subject: str, distribution: str = "") -> type[Stage]:
    """Return the class if it is a sound stage; PluginError otherwise. `subject` is what errors call it."""
    if not isinstance(cls, type) or not issubclass(cls, Stage):
        raise PluginError(f"The {subject} is not a subclass of llmtk.Stage but {_shown(cls)}. Subclass it.")
    _check_api(cls, subject, distribution)
    if not isinstance(cls.Options, type) or not issubclass(cls.Options, Section):
        raise PluginError(f"The {subject} has Options that are no section. Write class Options(llmtk.Section).")
    for name, field in cls.Options.model_fields.items():
        if field.is_required():
            raise PluginError(
                f"The {subject} has an option {name!r} without a default. Give one: {name}: TYPE = VALUE."
            )
    _check_values(cls, subject)
    for name, attribute in _attributes(cls):
        if name in HOOKS:
            _check_stage_hook(name, attribute, subject)
        elif name not in dir(Stage):
            _check_other(name, attribute, subject, STAGE_MEND)
            _check_declaration(name, subject)
    for name in ("prepare_batch", "compute_loss"):
        if inspect.getattr_static(cls, name) is vars(Stage)[name]:
            raise PluginError(
                f"The {subject} does not override {name}, without which nothing can be trained. "
                f"Write def {name}(self, {', '.join(PARAMETERS[name])})."
            )
    return cls


def check_plugin(cls: object, subject: str) -> type:
    """Return the class if it is a sound plugin; PluginError otherwise. `subject` is what errors call it."""
    if not isinstance(cls, type):
        raise PluginError(
            f"The {subject} is not a class but {_shown(cls)}. A plugin is a class with @hookimpl methods."
        )
    if issubclass(cls, Stage):
        raise PluginError(f"The {subject} is a stage, not a plugin. Name it as the run's stage.")
    hooks = 0
    for name, attribute in _attributes(cls):
        if name in HOOKS:
            _check_plugin_hook(name, attribute, subject)
            hooks += 1
        else:
            _check_other(name, attribute, subject, PLUGIN_MEND)
    if not hooks:
        raise PluginError(f"The {subject} answers no hook. Write methods named after hooks, decorated with @hookimpl.")
    return cls


def check_instance(instance: object, subject: str) -> None:
    """Refuse a class or module where an instance belongs, and hooks that stand on the instance: pluggy skips these."""
    if isinstance(instance, type):
        raise PluginError(
            f"The {subject} is the class {instance.__name__}. Pass an instance: {instance.__name__}(...)."
        )
    if inspect.ismodule(instance):
        raise PluginError(f"The {subject} is the module {instance.__name__}. Pass an instance of a class.")
    for name in getattr(instance, "__dict__", ()):
        if name in HOOKS:
            raise PluginError(f"The {subject} has {name} on the instance. Hooks are methods: write it in the class.")


STAGE_MEND = "name it so if the hook is meant, else otherwise"
PLUGIN_MEND = "name it so, with @hookimpl, if the hook is meant, else otherwise"


def _check_api(cls: type[Stage], subject: str, distribution: str) -> None:
    if cls.api == API:
        return
    behind = isinstance(cls.api, int) and cls.api > API
    package = "llmtk-core" if behind else distribution
    mend = f"pip install --upgrade {package}" if package else "change it to this version"
    raise PluginError(
        f"The {subject} is written for version {cls.api!r} of the contract, and this core has version {API}. "
        f"Upgrade {'the core' if behind else 'the stage'}: {mend}."
    )


def _check_values(cls: type[Stage], subject: str) -> None:
    """Refuse what is declared and is none of what there is: what is misspelt would never be met."""
    from llmtk.config.run_config import OPTIONAL_KEYS

    options = [field.alias or name for name, field in cls.Options.model_fields.items()]
    for declaration, known in (
        ("row_types", list(get_args(RowType))),
        ("needs", list(get_args(Need))),
        ("honours", sorted(OPTIONAL_KEYS)),
        ("may_change", options),
        ("once", options),
    ):
        given = getattr(cls, declaration)
        if isinstance(given, str):
            raise PluginError(
                f"The {subject} has {declaration} = {given!r}, one word and no tuple. Write ({given!r},)."
            )
        if not isinstance(given, tuple | list | set | frozenset):
            raise PluginError(f"The {subject} has {declaration} = {given!r}. Write a tuple of words.")
        for name in given:
            if name not in known:
                near = suggest(str(name), known)
                raise PluginError(
                    f"The {subject} has {name!r} in {declaration}.{near} Known: {', '.join(known) or 'none'}."
                )
    if not cls.row_types:
        raise PluginError(f"The {subject} takes no row type. Known: {', '.join(get_args(RowType))}.")
    if cls.head not in (heads := get_args(Head)):
        near = suggest(str(cls.head), heads)
        raise PluginError(f"The {subject} has head = {cls.head!r}.{near} Known: {', '.join(heads)}.")


def _check_stage_hook(name: str, attribute: object, subject: str) -> None:
    function = _function(name, attribute, subject)
    if any(_options(function).values()):
        raise PluginError(
            f"The {subject} decorates {name} with options. A stage's methods take no @hookimpl: remove it."
        )
    _check_plain(name, function, subject)
    _check_parameters(name, function, subject, exactly=name in STAGE_HOOKS)


def _check_plugin_hook(name: str, attribute: object, subject: str) -> None:
    function = _function(name, attribute, subject)
    if not _is_decorated(function):
        raise PluginError(
            f"The {subject} has a method {name} without @hookimpl, so it would never be called. Decorate it."
        )
    _check_options(name, _options(function), subject)
    if _options(function).get("wrapper"):
        _check_wrapper(name, function, subject)
    elif name in STAGE_HOOKS:
        around = f"around_{name}"
        other = f", or answer {around}" if around in HOOKS else ""
        raise PluginError(
            f"The {subject} answers {name}, which is the stage's alone. "
            f"Wrap it with @hookimpl(wrapper=True), one yield and a return{other}."
        )
    else:
        _check_plain(name, function, subject)
    _check_parameters(name, function, subject, exactly=False)


def _check_options(name: str, options: dict[str, Any], subject: str) -> None:
    if options.get("hookwrapper"):
        raise PluginError(
            f"The {subject} has {name} with hookwrapper=True. Write wrapper=True, `answer = yield` and `return answer`."
        )
    if options.get("specname"):
        raise PluginError(f"The {subject} has {name} with specname. Name the method after its hook.")
    for option in ("tryfirst", "trylast", "optionalhook"):
        if options.get(option):
            raise PluginError(
                f"The {subject} has {name} with {option}=True, which llmtk does not follow: plugins run in the order "
                f"in which they are named. Remove it."
            )


def _check_wrapper(name: str, function: FunctionType, subject: str) -> None:
    if name not in STAGE_HOOKS:
        raise PluginError(
            f"The {subject} has {name} with wrapper=True. Only the stage's hooks can be wrapped: "
            f"{', '.join(STAGE_HOOKS)}. Remove wrapper=True, and answer the hook."
        )
    if not inspect.isgeneratorfunction(function):
        raise PluginError(
            f"The {subject} has {name} with wrapper=True, but it never yields. Write `answer = yield`, "
            f"which runs what is wrapped, and `return answer`."
        )


def _check_plain(name: str, function: FunctionType, subject: str) -> None:
    inner = inspect.unwrap(function)
    if inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner):
        raise PluginError(f"The {subject} has a yield in {name}, so it answers a generator. Return the answer instead.")
    if inspect.iscoroutinefunction(inner):
        raise PluginError(f"The {subject} has {name} as `async def`; hooks are not awaited. Write `def`.")


def _check_parameters(name: str, function: FunctionType, subject: str, exactly: bool) -> None:
    expected = PARAMETERS[name]
    wanted = f"Write def {name}(self, {', '.join(expected)})."
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or parameters[0].name in expected:
        raise PluginError(f"The {subject} has {name} without self. {wanted}")
    for parameter in parameters[1:]:
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            raise PluginError(f"The {subject} has {name} with the parameter {_signed(parameter)}. {wanted}")
        if parameter.default is not inspect.Parameter.empty:
            raise PluginError(f"The {subject} has {name} with a default for {parameter.name!r}. {wanted}")
        if parameter.name not in expected:
            raise PluginError(f"The {subject} has {name} with an unknown parameter {parameter.name!r}. {wanted}")
    given = tuple(parameter.name for parameter in parameters[1:])
    if exactly and given != expected:
        raise PluginError(f"The {subject} has {name} with the parameters ({', '.join(('self', *given))}). {wanted}")


def _signed(parameter: inspect.Parameter) -> str:
    match parameter.kind:
        case inspect.Parameter.VAR_POSITIONAL:
            return f"*{parameter.name}, which receives nothing"
        case inspect.Parameter.VAR_KEYWORD:
            return f"**{parameter.name}, which receives nothing"
        case inspect.Parameter.KEYWORD_ONLY:
            return f"{parameter.name!r} as keyword-only"
        case _:
            return f"{parameter.name!r} as positional-only"


def _check_other(name: str, attribute: object, subject: str, mend: str) -> None:
    hook = _resembled(name)
    meant = f" Did you mean {hook!r}?" if hook else ""
    if _is_decorated(attribute):
        raise PluginError(
            f"The {subject} has @hookimpl on {name}, which is not a hook.{meant} Hooks: {', '.join(HOOKS)}."
        )
    if hook:
        raise PluginError(f"The {subject} has {name}, whose name resembles the hook {hook}: {mend}.")


def _resembled(name: str) -> str | None:
    plain = name.strip("_").lower().removeprefix("on_")
    joined = plain.replace("_", "")
    same = [hook for hook in HOOKS if hook.replace("_", "") == joined]
    return next(iter(same or get_close_matches(plain, HOOKS, n=1, cutoff=_RESEMBLANCE)), None)


def _check_declaration(name: str, subject: str) -> None:
    if name.startswith("_"):
        return
    for meant in get_close_matches(name, _DECLARATIONS, n=1, cutoff=_RESEMBLANCE):
        raise PluginError(f"The {subject} has {name}, whose name resembles {meant}, which a stage declares: rename it.")


def _attributes(cls: type) -> Iterator[tuple[str, object]]:
    for name in dir(cls):
        if not name.startswith("__"):
            yield name, inspect.getattr_static(cls, name)


def _function(name: str, attribute: object, subject: str) -> FunctionType:
    if not isinstance(attribute, FunctionType):
        raise PluginError(f"The {subject} has {name} as a {type(attribute).__name__}. A hook is a plain method.")
    return attribute


def _is_decorated(attribute: object) -> bool:
    return isinstance(getattr(_unbound(attribute), f"{PROJECT}_impl", None), dict)


def _options(function: FunctionType) -> dict[str, Any]:
    return dict(getattr(function, f"{PROJECT}_impl", {}))


def _unbound(attribute: object) -> object:
    return attribute.__func__ if isinstance(attribute, staticmethod | classmethod) else attribute


def _shown(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def check_names(stage_name: str, plugins: Sequence[tuple[str, object]]) -> None:
    """Refuse two plugins of one name, a plugin with the stage's name, and one instance that is given twice."""
    named: dict[str, object] = {}
    for name, plugin in plugins:
        if name == stage_name:
            raise PluginError(f"The plugin {name!r} has the stage's name. Rename the plugin.")
        if name in named:
            raise PluginError(f"Two plugins are named {name!r}. Rename or remove one.")
        for other, known in named.items():
            if known is plugin:
                raise PluginError(f"The plugin {name!r} is the same instance as {other!r}. Remove one.")
        named[name] = plugin
