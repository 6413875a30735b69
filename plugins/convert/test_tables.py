"""The tables against our own configuration, so that they cannot rot, and against the other programs' lists of keys.

Those lists are read from the programs' sources, which are not imported: where a package is installed, in .venv-trl,
which the benchmarks make, or below a folder that LLMTK_PEERS names.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
from llmtk_convert.conversion import PEERS, convert, default_values
from llmtk_convert.rules import Leave, Method, Peer, targets_of
from llmtk_convert.trl import DPO_LOSSES

from llmtk.config.problems import known_keys
from llmtk.config.run_config import run_config_model
from llmtk.host.discovery import get_plugin, get_stage

ROOT = Path(__file__).parents[2]
METHODS = [(peer, name) for peer in PEERS.values() for name in peer.methods]
IDS = [f"{peer.name}: {name}" for peer, name in METHODS]


@cache
def ours(stage: str) -> frozenset[str]:
    return frozenset(known_keys(run_config_model(stage, get_stage(stage))))


def is_ours(key: str, stage: str) -> bool:
    section, *rest = key.split(".")
    if section == "plugins":
        return rest[1] in get_plugin(rest[0]).Options.model_fields  # type: ignore[attr-defined]
    return key.replace("STAGE.", f"{stage}.") in ours(stage)


@pytest.mark.parametrize(("peer", "name"), METHODS, ids=IDS)
def test_every_key_that_a_table_puts_is_one_of_ours(peer: Peer, name: str) -> None:
    method = peer.methods[name]
    put = {target for rule in method.table.values() for target in targets_of(rule)} | set(method.defaults)
    assert sorted(key for key in put if not is_ours(key, method.stage)) == []


@pytest.mark.parametrize(("peer", "name"), METHODS, ids=IDS)
def test_every_rule_says_why_and_the_defaults_are_accepted(peer: Peer, name: str) -> None:
    method = peer.methods[name]
    assert all(rule.why for rule in method.table.values() if isinstance(rule, Leave))
    model = {"trl": "model_name_or_path", "llama-factory": "model_name_or_path", "axolotl": "base_model"}[peer.name]
    made = convert(peer, {model: "builtin", **ASKED[peer.name](name)}, name.partition(",")[0])
    assert made.stage == method.stage
    assert not made.left


ASKED: dict[str, Any] = {
    "trl": lambda name: dict([f"{name.partition(', ')[2]}: text".split(": ")[:2]]) if "," in name else {},
    "llama-factory": lambda name: {"pref_loss": name.rpartition(" ")[2]} if "pref_loss" in name else {},
    "axolotl": lambda name: {},
}


def test_the_losses_of_dpo_are_those_of_our_stage() -> None:
    from llmtk_stage_dpo import Loss

    assert set(get_args(Loss)) == set(DPO_LOSSES)


# Their own lists


def folder_of(package: str) -> Path:
    """Return where a package's sources lie; the test is skipped where they are nowhere."""
    spec = find_spec(package)
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += ROOT.glob(f".venv-trl/lib/python*/site-packages/{package}")
    places += Path(os.environ.get("LLMTK_PEERS", "/nowhere")).glob(f"**/{package}")
    found = next((place for place in places if (place / "__init__.py").exists()), None)
    if found is None:
        pytest.skip(f"{package} is not installed")
    return found


def classes(file: Path) -> dict[str, dict[str, ast.expr | None]]:
    """Return the fields of each class of a file, with their default."""
    return {
        node.name: {
            item.target.id: _default(item.value)
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        }
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
    }


def _default(value: ast.expr | None) -> ast.expr | None:
    if isinstance(value, ast.Call):
        return next((word.value for word in value.keywords if word.arg in ("default", "default_factory")), None)
    return value


@cache
def arguments() -> dict[str, ast.expr | None]:
    """Return the fields of transformers' TrainingArguments."""
    return classes(folder_of("transformers") / "training_args.py")["TrainingArguments"]


def of_trl(method: str) -> dict[str, ast.expr | None]:
    trl = folder_of("trl")
    place = f"experimental/{method}/{method}_config.py" if method in ("cpo", "orpo") else f"trainer/{method}_config.py"
    own = next(fields for name, fields in classes(trl / place).items() if name.lower() == f"{method}config")
    base = classes(trl / "trainer" / "base_config.py")["_BaseConfig"]
    shared = classes(trl / "scripts" / "utils.py")
    script = shared["ScriptArguments"] | shared["DatasetMixtureConfig"]
    if method in ("grpo", "rloo"):
        script |= classes(trl / "scripts" / f"{method}.py")[f"{method.upper()}ScriptArguments"]
    return arguments() | base | own | classes(trl / "trainer" / "model_config.py")["ModelConfig"] | script


@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "reward", "grpo", "rloo", "cpo", "orpo"])
def test_trl_has_no_key_that_the_table_does_not_know(method: str) -> None:
    assert sorted(set(of_trl(method)) - set(PEERS["trl"].methods[method].table)) == []


TELLS_NOTHING = {
    "logging_steps", "report_to", "torch_compile_backend", "torch_compile_mode", "ddp_find_unused_parameters",
    "dataloader_pin_memory", "log_level", "run_name", "output_dir", "save_steps", "metric_for_best_model",
    "lr_scheduler_kwargs", "optim_args", "trust_remote_code", "optim", "dtype", "load_in_4bit", "load_in_8bit",
    "model_revision", "truncation_mode", "use_peft", "dataset_text_field", "train_sampling_strategy",
    "assistant_only_loss", "lora_dropout", "use_bias_correction_kl",
}  # fmt: skip
"""Keys whose defaults differ in form alone or in what is reported, or which count beside another key alone."""


@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "reward", "grpo", "rloo", "cpo", "orpo"])
def test_what_trl_takes_where_nothing_is_said_is_ours_or_is_written(method: str) -> None:
    chosen = PEERS["trl"].methods[method]
    assert sorted(differing(of_trl(method), chosen)) == []


def differing(theirs: dict[str, ast.expr | None], method: Method) -> Iterator[str]:
    """Give each key that has one of ours, and another default there than is taken here."""
    stage = get_stage(method.stage)
    usual = default_values(method.stage, stage) | {"train.disable_dropout": not stage.dropout}
    for key, value in theirs.items():
        targets = targets_of(method.table[key])
        if len(targets) != 1 or key in TELLS_NOTHING or value is None:
            continue
        try:
            there = ast.literal_eval(value)
        except ValueError:
            continue
        here = method.defaults.get(targets[0], usual.get(targets[0].replace("STAGE.", f"{method.stage}.")))
        if there is not None and there != here:
            yield f"{key}: {there} there, {here} here"


def test_llama_factory_has_no_key_that_the_tables_do_not_know() -> None:
    folder = folder_of("llamafactory") / "hparams"
    fields = {key for file in folder.glob("*.py") for name, keys in classes(file).items()
              if name != "EvaluationArguments" for key in keys}  # fmt: skip
    assert sorted((fields | set(arguments())) - PEERS["llama-factory"].keys) == []


def test_axolotl_has_no_key_that_the_tables_do_not_know() -> None:
    folder = folder_of("axolotl")
    parts = ("model", "peft", "training", "integrations", "deprecated", "multimodal")
    found: dict[str, Any] = {}
    for part in parts:
        found |= classes(folder / "utils" / "schemas" / f"{part}.py")
    inner = {"SpecialTokensConfig", "LoftQConfig", "PeftConfig", "LrGroup", "RoleBoundarySpec",
             "SelectiveCheckpointingConfig"}  # fmt: skip
    keys = {key for name, fields in found.items() if name not in inner for key in fields}
    keys |= set(classes(folder / "utils" / "schemas" / "config.py")["AxolotlInputConfig"])
    keys |= {f"trl.{key}" for key in classes(folder / "utils" / "schemas" / "trl.py")["TRLConfig"]}
    for file in folder.glob("integrations/*/args.py"):
        keys |= {key for name, fields in classes(file).items() if name.endswith("Args") for key in fields}
    keys -= {"recipe", "save_compressed"}  # below llmcompressor
    assert sorted(keys - PEERS["axolotl"].keys) == []
