"""The whole configuration of a run: the shared sections, the stage's own, and which keys the user gave.

A stage's `defaults` become the defaults of its run's sections, so a validator that asks `model_fields_set` what was
given sees the user's keys alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, PrivateAttr, ValidationError, create_model
from pydantic_core import PydanticSerializationError

from llmtk.config.problems import explain, failure, shown
from llmtk.config.reading import dotted, merge, to_yaml
from llmtk.config.secrets import literal_secrets
from llmtk.config.sections import (
    DataConfig,
    DeepspeedConfig,
    FsdpConfig,
    GenerationConfig,
    ModelConfig,
    PeftConfig,
    PredictConfig,
    SamplesConfig,
    Section,
    TrainConfig,
)
from llmtk.errors import ConfigurationError, PluginError

if TYPE_CHECKING:
    from llmtk.contract import Stage

OPTIONAL_KEYS = frozenset({"label_smoothing_factor", "neftune_noise_alpha", "precompute_reference"})
"""Keys under `train` that a stage honours only if it says so (`Stage.honours`)."""
SHARED: dict[str, type[Section]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "peft": PeftConfig,
    "train": TrainConfig,
    "samples": SamplesConfig,
    "predict": PredictConfig,
    "generation": GenerationConfig,
}
"""The sections that every stage shares, and may give defaults for."""
SWITCHES = frozenset({"peft", "fsdp", "deepspeed"})
"""Sections that a run may be without: null takes away one that a layer below gives."""


class RunConfig(Section):
    """The resolved configuration of a run. Each stage has a model of its own: `run_config_model`."""

    stage: str
    """The training method. `llmtk list-stages` lists those installed."""
    model: ModelConfig
    """Which model is trained."""
    data: DataConfig
    """Where rows come from."""
    peft: PeftConfig | None = None
    """A parameter-efficient method in place of full training."""
    train: TrainConfig
    """The training loop."""
    fsdp: FsdpConfig | None = None
    """Shard the trained model over the ranks. `{}` for the usual settings."""
    deepspeed: DeepspeedConfig | None = None
    """Spread the trained model over the ranks by DeepSpeed. `{}` for the usual settings."""
    options: Section
    """The stage's own options. In a file they stand under the stage's name."""
    samples: SamplesConfig
    """Samples written at each evaluation."""
    predict: PredictConfig
    """Predictions of the finished model."""
    generation: GenerationConfig
    """How completions are written."""
    plugins: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Plugins to use, each with its options, the last-named outermost. `llmtk list-plugins` lists those installed."""
    output_dir: str | None = None
    """Where the run is written. By default runs/STAGE-DATE-TIME."""
    _given: frozenset[str] = PrivateAttr(default=frozenset())

    @property
    def given(self) -> frozenset[str]:
        """The keys that the user gave, dotted (`train.learning_rate`), and their sections (`train`)."""
        return self._given


def run_config_model(stage_name: str, stage_class: type[Stage]) -> type[RunConfig]:
    """Return the configuration's model for one stage: its options under its name, its defaults in force.

    Raises PluginError where the stage's name is taken by a section, or its defaults do not fit the sections.
    """
    if stage_name in RunConfig.model_fields:
        raise PluginError(f"The stage name {stage_name!r} is a section of the configuration. The stage needs another.")
    return _run_config_model(stage_name, stage_class)  # type: ignore[arg-type]  # mypy: a class is not Hashable


@lru_cache(maxsize=128)
def _run_config_model(stage_name: str, stage_class: type[Stage]) -> type[RunConfig]:
    defaults = dict(stage_class.defaults)
    if unknown := sorted(set(defaults) - set(SHARED)):
        raise PluginError(f"The stage {stage_name!r} has defaults for {', '.join(unknown)}: not a shared section.")
    kinds = {name: _with_defaults(name, defaults.get(name, {}), stage_name) for name in SHARED}
    fields: dict[str, Any] = {
        name: (kind, _described(RunConfig, name, default_factory=kind)) for name, kind in kinds.items()
    }
    fields["stage"] = Literal[stage_name], _described(RunConfig, "stage", default=stage_name)
    by_default = {"default_factory": kinds["peft"]} if "peft" in defaults else {"default": None}
    fields["peft"] = kinds["peft"] | None, _described(RunConfig, "peft", **by_default)
    fields["options"] = (
        stage_class.Options,
        Field(default_factory=stage_class.Options, alias=stage_name, description=f"Options of the stage {stage_name}."),
    )
    return create_model("RunConfig", __base__=RunConfig, __doc__=f"The configuration of a {stage_name} run.", **fields)


def _with_defaults(section_name: str, defaults: Mapping[str, Any], stage_name: str) -> type[Section]:
    section = SHARED[section_name]
    if not defaults:
        return section
    try:
        values = section.model_validate(defaults)
    except ValidationError as error:
        problem = explain(error, defaults, section, "The mend is its author's.")
        raise PluginError(f"The stage {stage_name!r} has wrong defaults for {section_name}: {problem}") from None
    fields: dict[str, Any] = {}
    for name in defaults:
        field = section.model_fields[name]
        kind = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        fields[name] = kind, _described(section, name, default=getattr(values, name))
    return create_model(section.__name__, __base__=section, __doc__=section.__doc__, **fields)


def _described(model: type[BaseModel], name: str, **arguments: Any) -> Any:
    return Field(description=model.model_fields[name].description, **arguments)


def resolve(stage_name: str, stage_class: type[Stage], *layers: Mapping[str, Any]) -> RunConfig:
    """Return the configuration that the layers give, later over earlier, all over the stage's defaults.

    Raises one ConfigurationError that lists every problem as `train.learning_rate: expected ..., got ...`: unknown
    keys, wrong types and values, combinations that exclude each other, an optional key that the stage does not honour,
    and a `stage:` that names another stage.
    """
    settings = _settings(layers)
    _same_stage(stage_name, settings)
    model = run_config_model(stage_name, stage_class)
    mend = f"`llmtk show {stage_name}` lists every key with its default."
    given = frozenset(dotted(settings))
    settings = _complete(stage_name, settings)
    try:
        config = model.model_validate(settings)
    except ValidationError as error:
        raise explain(error, settings, model, mend) from None
    except RecursionError:
        raise ConfigurationError("The configuration is nested too deeply.") from None
    problems = [
        *_truth_as_number(settings, config),
        *_not_honoured(stage_name, stage_class, config),
        *literal_secrets(settings),
    ]
    if problems:
        raise failure(problems, mend)
    config._given = given
    return config


def dump(config: RunConfig) -> str:
    """Return the configuration as YAML, with every default spelt out, that reads back as an equal configuration.

    A default that the section's own rules refuse when it is given (`save_steps` beside `save_strategy: epoch`) is left
    out. Raises ConfigurationError for a value that YAML has no words for.
    """
    try:
        settings = spelt_out(config)
    except PydanticSerializationError as error:
        raise ConfigurationError(f"A value of the configuration cannot be written to a file: {error}.") from None
    return to_yaml(settings)


def json_schema(stage_name: str, stage_class: type[Stage]) -> dict[str, Any]:
    """Return the JSON Schema of a stage's configuration, with every key's description and default."""
    schema = run_config_model(stage_name, stage_class).model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _settings(layers: tuple[Mapping[str, Any], ...]) -> dict[str, Any]:
    for layer in layers:
        if not isinstance(layer, Mapping):
            raise ConfigurationError(f"A configuration is keys and values, got {shown(layer)}.")
    try:
        return merge(*layers)
    except RecursionError:
        raise ConfigurationError("The configuration is nested too deeply, or holds itself.") from None


def _same_stage(stage_name: str, settings: Mapping[str, Any]) -> None:
    named = settings.get("stage", stage_name)
    if named != stage_name:
        raise ConfigurationError(
            f"stage: the configuration is for {shown(named)}, and the run is asked for {shown(stage_name)}. "
            "Change one, or leave `stage:` out of the configuration."
        )


def _complete(stage_name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Put the sections in that are absent or, as in `train:` with every line commented out, empty."""
    sections: dict[str, Any] = {key: {} for key in (*SHARED, stage_name, "plugins") if key != "peft"}
    present = {key: value for key, value in settings.items() if value is not None or key not in sections}
    plugins = present.get("plugins")
    if isinstance(plugins, Mapping):
        present["plugins"] = {name: {} if options is None else options for name, options in plugins.items()}
    return {"stage": stage_name, **sections, **present}


def _truth_as_number(settings: Any, value: Any, path: str = "") -> list[str]:
    """Find each `true` that pydantic took for the number 1."""
    if isinstance(settings, bool) and isinstance(value, int | float) and not isinstance(value, bool):
        return [f"{path}: expected a number, got {shown(settings)}"]
    if not isinstance(settings, Mapping) or not isinstance(value, Section):
        return []
    names = {field.alias or name: name for name, field in type(value).model_fields.items()}
    return [
        problem
        for key, item in settings.items()
        for problem in _truth_as_number(item, getattr(value, names[key]), f"{path}.{key}".lstrip("."))
    ]


def _not_honoured(stage_name: str, stage_class: type[Stage], config: RunConfig) -> list[str]:
    defaults = TrainConfig.model_fields
    return [
        f"train.{key}: the stage {stage_name} does not use it. Remove it"
        for key in sorted(OPTIONAL_KEYS - stage_class.honours)
        if getattr(config.train, key) != defaults[key].default
    ]


def spelt_out(section: Section) -> dict[str, Any]:
    """Return a section's keys and values; defaults too, where giving them is accepted."""
    names = {name: field.alias or name for name, field in type(section).model_fields.items()}
    plain = section.model_dump(mode="json", by_alias=True)
    for name, key in names.items():
        if isinstance(value := getattr(section, name), Section):
            plain[key] = spelt_out(value)
    given = {names[name]: plain[names[name]] for name in section.model_fields_set}
    return {
        key: value for key, value in plain.items() if key in given or _accepted(type(section), {**given, key: value})
    }


def _accepted(model: type[Section], settings: Mapping[str, Any]) -> bool:
    try:
        model.model_validate(settings)
    except ValidationError:
        return False
    return True
