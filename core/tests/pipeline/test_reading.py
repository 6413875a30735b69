"""The file of a pipeline: how settings lie over each other, what a step takes from another, and what is refused."""

from pathlib import Path

import pytest

from llmtk.errors import ConfigurationError
from llmtk.pipeline.reading import read_steps

FILE = """
model: {dtype: float32}
train: {seed: 1, max_steps: 2}
steps:
  sft: {model: base, data: rows.jsonl, train: {max_steps: 3}}
  mine: {stage: rm, model: {name_or_path: step:sft}, data: [rows.jsonl, {path: step:sft/samples.jsonl}]}
  ppo: {model: step:sft, data: rows.jsonl, ppo: {rewards: [{model: step:mine}, {model: "step: x"}]}}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a pipeline's file in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text(FILE)
    return Path("p.yaml")


def test_references_become_folders_and_say_what_is_taken(file: Path) -> None:
    folder, steps = read_steps(file)
    assert folder == Path("runs/p")
    assert [(step.name, step.stage, str(step.folder)) for step in steps] == [
        ("sft", "sft", "runs/p/sft"),
        ("mine", "rm", "runs/p/mine"),
        ("ppo", "ppo", "runs/p/ppo"),
    ]
    assert steps[1].settings["model"] == {"dtype": "float32", "name_or_path": "runs/p/sft"}
    assert steps[1].settings["data"]["train"] == ["rows.jsonl", {"path": "runs/p/sft/samples.jsonl"}]
    assert steps[2].settings["ppo"]["rewards"] == [{"model": "runs/p/mine"}, {"model": "step: x"}]
    assert [dict(step.takes) for step in steps] == [
        {},
        {"model.name_or_path": "sft", "data.train.1.path": "sft"},
        {"model.name_or_path": "sft", "ppo.rewards.0.model": "mine"},
    ]


def test_the_command_line_lies_over_the_file_and_a_step_over_what_all_share(file: Path) -> None:
    overrides = ["train.max_steps=4", "steps.mine.train.max_steps=5", "steps.mine.rm.x=6", "output_dir=o/x"]
    folder, steps = read_steps(file, overrides)
    assert folder == Path("o/x")
    assert [step.settings["train"] for step in steps] == [{"seed": 1, "max_steps": n} for n in (4, 5, 4)]
    assert [step.settings.get("rm") for step in steps] == [None, {"x": 6}, None]
    assert read_steps(file)[1][0].settings["train"] == {"seed": 1, "max_steps": 3}


def test_a_folder_without_a_name_is_that_of_the_file_and_variables_are_filled_in(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BASE", "base")
    file.write_text("steps:\n  sft: {model: '${BASE}'}\n  b:\n")
    _, steps = read_steps(file)
    assert steps[0].settings == {"model": {"name_or_path": "base"}}
    assert (steps[1].stage, steps[1].settings) == ("b", {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a pipeline needs steps"),
        ("steps: {}", "a pipeline needs steps"),
        ("steps: [sft]", "steps are names and their settings"),
        ("steps: {a: 3}", "steps.a is 3; a step is keys and values"),
        ("step: {a: {}}", "step is no key of a pipeline"),
        ("step: {a: {}}", "Did you mean 'steps'?"),
        ("dpo: {beta: 1}\nsteps: {dpo: {}}", "dpo is no key of a pipeline"),
        ("steps:\n  a: {}\n  a: {}", "line 3: the key 'a' stands twice"),
        ("steps: {1: {}}", "1 is no name"),
        ("steps: {a/b: {}}", "'a/b' is no name"),
        ("steps: {old: {}}", "old is the folder of runs that were made anew"),
        ("steps: {a: {}, A: {}}", "a and A would share a folder"),
        ("steps: {a: {output_dir: x}}", "steps.a.output_dir: a step is written to runs/p/a; leave it out"),
        ("steps: {a: {train: {resume_from_checkpoint: auto}}}", "a pipeline goes on by itself"),
        ("steps: {a: {model: step:a}}", "steps.a.model.name_or_path: step:a is the step itself"),
        ("steps: {a: {x: [{y: step:b}]}, b: {}}", "steps.a.x.0.y: step:b comes after it"),
        ("steps: {abc: {}, b: {model: step:abd}}", "step:abd: there is no such step. Did you mean 'abc'?"),
        ("steps: {a: {}, b: {model: runs/p/a}}", "runs/p/a is the folder of a step; write step:a"),
        ("model: step:a\nsteps: {a: {}, b: {}}", "steps.a.model.name_or_path: step:a is the step itself"),
        ("steps: {a: {model: '${NOT_THERE}'}}", "uses the environment variable NOT_THERE, which is not set"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        read_steps(file)
    assert said in str(caught.value)


def test_all_that_is_wrong_is_said_at_once(file: Path) -> None:
    file.write_text("steps: {a: {model: step:b, output_dir: x}, b: {model: step:c}}")
    with pytest.raises(ConfigurationError) as caught:
        read_steps(file, ["steps.c.x=1"])
    assert len(str(caught.value).splitlines()) == 5


@pytest.mark.parametrize(
    ("override", "said"),
    [("steps.sfd.x=1", "Did you mean 'sft'?"), ("trian.seed=1", "the command line: trian is no key"), ("x", "KEY=VAL")],
)
def test_what_is_wrong_with_the_command_line_is_said(file: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read_steps(file, [override])
    assert said in str(caught.value)
