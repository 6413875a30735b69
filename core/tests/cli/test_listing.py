"""list-stages, list-plugins, show, schema and evaluate."""

import json
import sys
from typing import Any

from llmtk.host import discovery


def test_stages_are_listed_in_columns_without_being_imported(install: Any, llmtk: Any) -> None:
    install("llmtk-stage-toy", "toy")
    install("llmtk-stage-other", "other", module=None)
    code, out, _ = llmtk("list-stages")
    assert code == 0
    assert out.splitlines() == [
        "NAME   DISTRIBUTION       VERSION  SUMMARY",
        "other  llmtk-stage-other  1.0      A other",
        "toy    llmtk-stage-toy    1.0      A toy",
    ]
    assert "llmtk_stage_toy" not in sys.modules


def test_no_stage_says_how_to_install_one(install: Any, llmtk: Any) -> None:
    assert llmtk("list-stages") == (
        0,
        "No stage is installed. Install one, for example: pip install llmtk-stage-sft\n",
        "",
    )
    assert json.loads(llmtk("list-stages", "--json")[1]) == []
    assert "No plugin is installed" in llmtk("list-plugins")[1]


def test_check_imports_each_stage_and_says_what_broke(install: Any, llmtk: Any) -> None:
    install("llmtk-stage-toy", "toy")
    assert llmtk("list-stages", "--check")[0] == 0
    install("llmtk-stage-broken", "broken", module="import not_there\n")
    assert llmtk("list-stages")[0] == 0
    code, out, _ = llmtk("list-stages", "--check")
    assert code == 1
    assert "not_there" in out.splitlines()[2]
    listed = json.loads(llmtk("list-stages", "--check", "--json")[1])
    assert [bool(stage["problem"]) for stage in listed] == [True, False]


def test_a_name_claimed_twice_is_a_problem_in_the_list(install: Any, llmtk: Any) -> None:
    install("llmtk-stage-toy", "toy")
    install("llmtk-stage-toy2", "toy")
    code, out, _ = llmtk("list-stages")
    assert code == 0
    assert out.count("    problem: ") == 2
    code, _, err = llmtk("show", "toy")
    assert code == 2
    assert "llmtk-stage-toy2" in err


def test_plugins_are_listed_with_their_kind(install: Any, llmtk: Any) -> None:
    install("llmtk-plugin-x", "x", discovery.PLUGINS, None)
    install("my-rewards", "strict", discovery.REWARDS, None)
    assert llmtk("list-plugins")[1].splitlines() == [
        "NAME    KIND    DISTRIBUTION    VERSION  SUMMARY",
        "x       plugin  llmtk-plugin-x  1.0      A x",
        "strict  reward  my-rewards      1.0      A strict",
    ]
    listed = json.loads(llmtk("list-plugins", "--json")[1])
    assert [(offer["name"], offer["kind"], offer["distribution"]) for offer in listed] == [
        ("x", "plugin", "llmtk-plugin-x"),
        ("strict", "reward", "my-rewards"),
    ]


def test_show_says_what_a_stage_is_and_takes(install: Any, llmtk: Any) -> None:
    install("llmtk-stage-toy", "toy")
    code, out, _ = llmtk("show", "toy")
    assert code == 0
    for line in [
        "stage: toy",
        "distribution: llmtk-stage-toy 1.0",
        "summary: A toy",
        "paper: arXiv 1234.56789",
        "row types: pair, dialogue",
        "needs: reference",
        'toy.loss (a | b) = "a"',
        "    Which loss.",
        "train.learning_rate (number) = 0.0003",
        "model.tokenizer.kind (char | bpe | byte), required",
    ]:
        assert line in out.splitlines()
    shown = json.loads(llmtk("show", "toy", "--json")[1])
    assert shown["row_types"] == ["pair", "dialogue"]
    assert {"key": "toy.loss", "type": "a | b", "default": '"a"', "help": "Which loss.", "is_section": False} in shown[
        "options"
    ]


def test_schema_is_json(install: Any, llmtk: Any) -> None:
    install("llmtk-stage-toy", "toy")
    schema = json.loads(llmtk("schema", "toy")[1])
    assert schema["properties"]["stage"]["const"] == "toy"


def test_an_unknown_stage_lists_those_there_are(install: Any, llmtk: Any) -> None:
    install("llmtk-stage-toy", "toy")
    for command in ("show", "schema"):
        code, _, err = llmtk(command, "kto")
        assert code == 2
        assert "Installed stages: toy." in err
        assert "pip install llmtk-stage-kto" in err


def test_evaluate_prints_what_comes_back(runs: list[Any], llmtk: Any) -> None:
    assert llmtk("evaluate", "runs/a") == (0, "eval_loss  1.25\nrows       3\n", "")
    assert json.loads(llmtk("evaluate", "runs/a", "--data", "b.jsonl", "--json")[1]) == {"eval_loss": 1.25, "rows": 3.0}
    assert runs == [("runs/a", None), ("runs/a", "b.jsonl")]
