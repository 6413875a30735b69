"""A configuration of another program, and the tables, make one of ours, and notes on what became of each key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from llmtk import ConfigurationError, PluginError
from llmtk.config.problems import shown
from llmtk.errors import LlmtkError
from llmtk_convert import axolotl, llama_factory, trl
from llmtk_convert.rules import Answer, Method, Peer, Rule, Settings, apply, leave, targets_of

if TYPE_CHECKING:
    from llmtk.contract import Stage

PEERS = {peer.name: peer for peer in (trl.PEER, llama_factory.PEER, axolotl.PEER)}
ORDER = ("stage", "model", "data", "peft", "fsdp", "deepspeed", "train")
"""Sections in the order in which they are written; the stage's own and what else there is come behind."""
ADAPTS = "peft.method"
"""The key that asks for an adapter: without a section `peft` all weights are trained."""


@dataclass
class Conversion:
    """Our configuration, and what became of the other's keys."""

    peer: Peer
    method: str
    stage: str
    config: dict[str, Any] = field(default_factory=dict)
    """Our settings, nested."""
    carried: list[str] = field(default_factory=list)
    """Keys that mean the same here."""
    changed: dict[str, str] = field(default_factory=dict)
    """Keys that are carried over by another meaning, and what is different."""
    left: dict[str, str] = field(default_factory=dict)
    """Keys that are not carried over, and why."""
    defaults: dict[str, str] = field(default_factory=dict)
    """Our keys that are written since nothing was said, and the other program takes something else then."""
    remarks: list[str] = field(default_factory=list)
    """What else is different, or missing."""


def recognise(settings: Settings) -> Peer:
    """Return the program whose tables know the most of the keys. ConfigurationError where none does, or several do."""
    known = {name: sum(key in peer.keys for key in settings) for name, peer in PEERS.items()}
    best = max(known.values())
    found = [PEERS[name] for name, count in known.items() if count == best]
    if {"train", "data"} & set(settings) and isinstance(settings.get("train", settings.get("data")), Mapping):
        raise ConfigurationError("this is a configuration of llmtk's own already: llmtk run takes it as it is")
    if not best or best * 2 < len(settings):
        titles = ", ".join(peer.title for peer in PEERS.values())
        raise ConfigurationError(
            f"none of {titles} has such keys ({', '.join(map(str, list(settings)[:5]))}). "
            f"If it is one of them, say which: --from {'|'.join(PEERS)}"
        )
    if len(found) > 1:
        raise ConfigurationError(
            f"these keys are in use by {' and by '.join(peer.title for peer in found)}. Say which it is: "
            f"--from {' or --from '.join(peer.name for peer in found)}"
        )
    return found[0]


def convert(peer: Peer, settings: Settings, method: str | None = None) -> Conversion:
    """Return our configuration for another program's settings.

    Raises ConfigurationError for a method that there is no stage for, and for values that our configuration refuses.
    """
    settings = {key: value for key, value in peer.prepare(settings).items() if value is not None}
    name = peer.choose(settings, method)
    chosen = peer.methods[name]
    stage = _installed(chosen.stage)
    made = Conversion(peer, name, chosen.stage)
    flat = _carry(made, chosen, settings, stage)
    _write_defaults(made, chosen, settings, flat, stage)
    made.config = _nested({"stage": chosen.stage, **flat})
    made.remarks += chosen.remarks(settings)
    _check(made, stage)
    return made


def _installed(stage: str) -> type[Stage] | None:
    from llmtk.host.discovery import get_stage

    try:
        return get_stage(stage)
    except PluginError:
        return None


def _carry(made: Conversion, method: Method, settings: Settings, stage: type[Stage] | None) -> dict[str, Any]:
    """Apply the rule of each key; return our keys, dotted, and their values."""
    flat: dict[str, Any] = {}
    for key in settings:
        rule = method.table.get(key)
        answer = leave(_unknown(made, key)) if rule is None else _answer(made, key, rule, settings)
        values = {target.replace("STAGE.", f"{made.stage}."): item for target, item in answer.put.items()}
        if unused := _not_honoured(values, stage):
            answer, values = leave(f"{made.stage} does not use {unused}"), {}
        flat |= values
        made.left |= {f"{key}.{part}": why for part, why in answer.lost.items()}
        if not answer.carried:
            made.left[key] = answer.note
        elif answer.note:
            made.changed[key] = answer.note
        else:
            made.carried.append(key)
    return flat


def _answer(made: Conversion, key: str, rule: Rule, settings: Settings) -> Answer:
    try:
        return apply(rule, settings[key], settings)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # Of this key, or of one that it goes together with.
        raise ConfigurationError(f"{key}: {made.peer.title} takes no such value: {shown(settings[key])}") from error


def _unknown(made: Conversion, key: str) -> str:
    peer = made.peer
    if key in peer.keys:
        return f"{peer.title} does not read it for {made.method}"
    near = get_close_matches(key, peer.keys, n=1, cutoff=0.8)
    return f"unknown to {peer.title} {peer.version}" + (f"; did you mean {near[0]}?" if near else "")


def _not_honoured(values: Mapping[str, Any], stage: type[Stage] | None) -> str | None:
    from llmtk.config.run_config import OPTIONAL_KEYS

    if stage is None:
        return None
    return next((key for key in values if key.removeprefix("train.") in OPTIONAL_KEYS - stage.honours), None)


def _write_defaults(
    made: Conversion, method: Method, settings: Settings, flat: dict[str, Any], stage: type[Stage] | None
) -> None:
    """Write what the other program takes where nothing is said, if our stage takes something else."""
    ours = default_values(made.stage, stage) | {ADAPTS: "none"}
    said = {target for key in settings if key in method.table for target in targets_of(method.table[key])}
    for target, value in method.defaults.items():
        key = target.replace("STAGE.", f"{made.stage}.")
        if target in said or not _matters(key, flat) or (key in ours and ours[key] == value):
            continue
        flat[key] = value
        made.defaults[key] = f"{_plain(value)} there, {_plain(ours[key])} here" if key in ours else _plain(value)


def _matters(key: str, flat: Mapping[str, Any]) -> bool:
    """Whether a default is of use beside the keys that were carried over."""
    if key.startswith("peft.") and key != ADAPTS:
        return any(name.startswith("peft.") for name in flat)
    if key.startswith("predict."):
        return bool(flat.get("train.do_predict"))
    if key == "train.eval_strategy":
        return "data.eval" in flat
    if key.startswith("model.bnb_4bit_"):
        return flat.get("model.quantization") == "4bit"
    return True


def _plain(value: Any) -> str:
    return {"None": "as the stage has it", "True": "true", "False": "false"}.get(str(value), str(value))


def default_values(name: str, stage: type[Stage] | None) -> dict[str, Any]:
    """Return our defaults, dotted: the stage's, or the sections' where it is not installed."""
    from llmtk.config.run_config import SHARED, run_config_model

    sections: dict[str, Any] = dict(SHARED)
    if stage is not None:
        fields = run_config_model(name, stage).model_fields
        sections = {key: fields[key].default_factory or SHARED[key] for key in SHARED} | {name: stage.Options}
    return {
        f"{section}.{key}": field.get_default(call_default_factory=True, validated_data={})
        for section, kind in sections.items()
        for key, field in kind.model_fields.items()
    }


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into sections, in their order."""
    nested: dict[str, Any] = {}
    place = {name: index for index, name in enumerate(ORDER)}
    for key, value in sorted(flat.items(), key=lambda item: place.get(item[0].split(".")[0], len(ORDER))):
        *parents, last = key.split(".")
        section = nested
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    if "output_dir" in nested:
        nested["output_dir"] = nested.pop("output_dir")
    return nested


def _check(made: Conversion, stage: type[Stage] | None) -> None:
    """Hold what came out against our own configuration, and say what a run would still ask for."""
    needed = [("data", "train"), ("model", "name_or_path")]
    needed += [(made.stage, "rewards")] if stage is not None and "reward" in stage.needs else []
    missing = [f"{section}.{key}" for section, key in needed if not made.config.get(section, {}).get(key)]
    made.remarks += [f"Still to be given: {key}" for key in missing]
    made.remarks += _rows_to_be_given(made.config)
    if stage is None:
        made.remarks.append(
            f"The stage {made.stage} is not installed, so nothing was checked: pip install llmtk-stage-{made.stage}"
        )
        return
    from llmtk.config.run_config import resolve

    try:
        resolve(made.stage, stage, made.config)
    except ConfigurationError as error:
        raise ConfigurationError(f"the values do not fit llmtk's configuration. {error}") from None
    made.remarks += [] if set(missing) & {"data.train", "model.name_or_path"} else _asked_of_a_run(made)


def _rows_to_be_given(config: Mapping[str, Any]) -> list[str]:
    """Say which rows are asked for by train's keys and are not there."""
    train, data = config.get("train", {}), config.get("data", {})
    strategy, told = train.get("eval_strategy", "no"), []
    if strategy != "no" and "eval" not in data:
        told.append(f"Still to be given: data.eval, a share (0.1) or a file, since train.eval_strategy is {strategy}")
    if train.get("do_predict") and "test" not in data:
        told.append("Still to be given: data.test, a share (0.1) or a file, since train.do_predict is true")
    return told


def _asked_of_a_run(made: Conversion) -> list[str]:
    """Return what the stage itself refuses, before it loads anything. Rewards are code, which is not loaded here."""
    from llmtk.run import Run

    options = {key: value for key, value in made.config.get(made.stage, {}).items() if key != "rewards"}
    try:
        run = Run.from_layers(made.stage, {**made.config, made.stage: options})
        run.stage.check(run)
    except LlmtkError as error:
        return [f"To be settled before a run: {error}"]
    return []
