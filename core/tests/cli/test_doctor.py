"""`llmtk doctor`: the installation, and how a model is scored."""

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtk.host import discovery


def test_the_installation_is_told_with_versions_device_and_precision(install: Any, llmtk: Any) -> None:
    install("llmtk-stage-toy", "toy")
    code, out, err = llmtk("doctor")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert ["torch", metadata.version("torch")] in lines
    assert ["transformers", metadata.version("transformers")] in lines
    assert ["toy", "stage", "llmtk-stage-toy", "1.0", "A", "toy"] in lines
    assert any(line[:1] == ["devices"] for line in lines)
    assert any(line[:1] == ["precision"] for line in lines)
    assert out.endswith("\nNo problem found.\n")


def test_what_is_broken_is_named_and_fails(install: Any, llmtk: Any) -> None:
    install("llmtk-stage-broken", "broken", module="import not_there\n")
    install("llmtk-plugin-x", "x", discovery.PLUGINS, "Thing = 3\n")
    code, out, _ = llmtk("doctor")
    assert code == 1
    assert "not_there" in out
    assert out.endswith("\n2 problems found, see above.\n")
    code, out, _ = llmtk("doctor", "--json")
    found = json.loads(out)
    assert code == 1
    assert "not_there" in found["stages"][0]["problem"]
    assert "llmtk-plugin-x" in found["plugins"][0]["problem"]
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


def test_a_package_outside_its_range_is_a_problem(install: Any, llmtk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install("llmtk-stage-toy", "toy")
    monkeypatch.setattr(
        metadata, "requires", lambda name: ["torch>=1.0", "pluggy<0.1", "not-there-at-all>=1", "x; extra == 'y'"]
    )
    code, out, _ = llmtk("doctor")
    assert code == 1
    problems = [line for line in out.splitlines() if "problem:" in line]
    assert problems == [
        "    problem: pluggy is not a version that was tested: <0.1",
        "    problem: not-there-at-all is not installed: >=1",
    ]


def test_the_built_in_model_is_packed_with_its_distances(llmtk: Any) -> None:
    code, out, err = llmtk("doctor", "builtin")
    assert (code, err) == (0, "")
    assert "scoring       packed, proven on this model" in out.splitlines()
    found = json.loads(llmtk("doctor", "builtin", "--json")[1])
    assert (found["scoring"], found["why_padded"], found["architecture"]) == ("packed", "", "llama")
    assert len(found["distances"]) == 4
    assert all(0 < distance < 1e-4 for distance in found["distances"].values())


def test_a_model_that_is_scored_padded_says_why(llmtk: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from llmtk.models.checks import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve("builtin"))
    config = AutoConfig.for_model("mamba", vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1)
    with torch.random.fork_rng(devices=[]):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code, out, _ = llmtk("doctor", str(tmp_path))
    assert code == 0
    assert "scoring       padded: it has no attention heads: its state would flow" in out
    found = json.loads(llmtk("doctor", str(tmp_path), "--json")[1])
    assert found["scoring"] == "padded"
    assert found["distances"] == {}


def test_a_reward_model_is_told_by_its_head(llmtk: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from llmtk.models.checks import resolve

    with torch.random.fork_rng(devices=[]):
        model = AutoModelForSequenceClassification.from_pretrained(resolve("builtin"), num_labels=1)
        model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(resolve("builtin")).save_pretrained(tmp_path)
    code, out, _ = llmtk("doctor", str(tmp_path))
    assert code == 0
    assert "head          one value a token (a reward model)" in out.splitlines()
    assert "scoring       packed, proven on this model" in out.splitlines()
    assert "distance from padded, values of the model" in out


def test_a_folder_that_is_no_model_is_an_error_before_anything_is_loaded(llmtk: Any, tmp_path: Path) -> None:
    code, _, err = llmtk("doctor", str(tmp_path))
    assert code == 2
    assert "it has no config.json" in err
    assert "Traceback" not in err
