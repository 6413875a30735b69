"""Figures of a source against an evaluation of it alone; the second data set against float64, cut, resumed, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llmtk_plugin_multitask import BESIDE, carried, check_task, dealt, due, means, name_of
from safetensors.torch import load_file

import llmtk
from llmtk import Batch, ConfigurationError, DatasetError, Group, LossOutput, Mean, Run, Term
from llmtk.data import source_of
from llmtk.training.order import shuffled

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
WORDS = ("yes", "no, never", "it is so", "x", "perhaps not", "a longer answer", "so", "well then")
PAIRS = [{"prompt": f"{'why ' * (i % 3)}{i}?", "chosen": WORDS[i], "rejected": WORDS[i - 3]} for i in range(8)]
ANSWERS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}" + " and more" * (n % 3)} for n in range(7)]


def make(folder: Path, stage: str, train: Any, eval: Any = None, resume: str | None = None, **more: Any) -> Run:
    """Make a run of a tiny model in float32; keywords are options of the plugin, or stand under `train`."""
    options = {name: more.pop(name) for name in ("per_source", "beside") if name in more}
    keys = {"bf16": False, "per_device_train_batch_size": 8, "max_steps": 2, "warmup_steps": 0, "logging_steps": 1}
    return Run(
        stage,
        model={"from_config": TINY, "tokenizer": {"kind": "byte"}},
        data={"train": train, "eval": eval, "max_length": 128},
        train=keys | {"learning_rate": 0.05, "save_strategy": "no"} | more,
        plugins={"multitask": options},
        output_dir=str(folder),
        resume=resume,
    )


def write(file: Path, rows: list[dict[str, str]]) -> str:
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# Sources


@pytest.mark.parametrize(
    ("stage", "named"),
    [("sft", "perplexity"), ("dpo", "rewards/margins"), ("rm", "accuracy"), ("orpo", "loss/nll")],
)
def test_figures_of_a_source_are_those_of_an_evaluation_of_it_alone(tmp_path: Path, stage: str, named: str) -> None:
    rows = ANSWERS if stage == "sft" else PAIRS
    held = [write(tmp_path / "held" / f"{name}.jsonl", part) for name, part in (("a", rows[:2]), ("b", rows[2:7]))]
    files = [write(tmp_path / "a.jsonl", rows[:3]), write(tmp_path / "b.jsonl", rows[3:])]
    run = make(tmp_path / "run", stage, [{"path": files[0], "weight": 2}, files[1]], held, per_device_eval_batch_size=3)
    metrics = run.train().metrics
    for task, file in zip("ab", held, strict=True):
        alone = run.evaluate(file)
        # Of several terms, which have weights of their own, the whole is no mean.
        wanted = {n: v for n, v in alone.items() if not n.startswith("a/") and (n != "loss" or stage != "orpo")}
        assert {named, "loss/nll" if stage == "orpo" else "loss"} <= wanted.keys()
        found = {name: metrics[f"eval_{task}/{name}"] for name in wanted if not name.startswith("b/")}
        assert found == pytest.approx({name: wanted[name] for name in found}, rel=1e-5, abs=1e-7)
    assert f"a/{named}" in lines(tmp_path / "run")[0]


def test_a_source_costs_no_forward_pass_and_changes_no_gradient(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", ANSWERS) for name in ("a", "b")]
    run = make(tmp_path / "run", "sft", files)
    run.prepare()
    batch = run.hooks.prepare_batch([run.train_rows[index] for index in (0, 9, 3, 12)]).windows[0]
    passes: list[int] = []
    run.model.register_forward_hook(lambda *_: passes.append(1))
    gradients = []
    for output in (run.hooks.compute_loss(batch), run.stage.compute_loss(run, batch)):
        run.model.zero_grad()
        output.terms["loss"].sum.backward()
        gradients.append([parameter.grad for parameter in run.model.parameters()])
    assert len(passes) == 2
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))  # type: ignore[arg-type]


def test_several_terms_are_told_each() -> None:
    batch = Batch.collate([Group([], {"pairs": 1, "tokens": 4}), Group([], {"pairs": 1, "tokens": 6})])
    terms = {"odds": Term(torch.tensor(3.0), "pairs", 0.5), "nll": Term(torch.tensor(20.0), "tokens")}
    found = means(LossOutput(terms, {"kl": Mean(1.0, 2)}), batch)
    assert {name: float(mean.sum) / float(mean.count) for name, mean in found.items()} == {
        "loss/odds": 1.5, "loss/nll": 2.0, "kl": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("place", "task"),
    [
        ("data/math.jsonl:12", "math"),
        ("math.json: row 3", "math"),
        ("org/maths: row 3", "maths"),
        ("c:d.csv:1", "c:d"),
        ("row 12", "other"),
        ("a.jsonl:1 from token 5", "other"),
    ],
)
def test_a_task_is_called_after_its_file(place: str, task: str) -> None:
    assert name_of(source_of(place)) == task


# Beside


def test_the_term_is_the_nll_of_the_rows_that_are_due(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "dpo", PAIRS, beside={"data": ANSWERS, "rows": 11, "coefficient": 0.3})
    run.prepare()
    batch = run.hooks.prepare_batch([run.train_rows[index] for index in range(8)]).windows[0]
    term = run.hooks.compute_loss(batch).terms[BESIDE]
    assert term.coefficient == 0.3
    term.sum.backward()

    line = [*shuffled(7, run.data_seed, 0), *shuffled(7, run.data_seed, 1)]
    rows = run.encode([ANSWERS[index] for index in line[:11]], ("dialogue", "prompt_completion"))
    assert batch.weights[BESIDE].sum() == sum(sum(row["targets"]) for row in rows)
    assert len(carried(batch).sequence_group) == 11
    run.save(tmp_path / "saved")
    exact: Any = llmtk.load(str(tmp_path / "saved"))[0].double().eval()
    wanted = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids, targets = torch.tensor(row["input_ids"]), torch.tensor(row["targets"])[1:]
        logps = exact(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        wanted = wanted - logps[targets].sum()
    wanted.backward()
    assert float(term.sum.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    gradients = dict(exact.named_parameters())
    for name, parameter in run.model.named_parameters():
        apart = (parameter.grad.double() - gradients[name].grad).norm()  # type: ignore[union-attr, operator]
        assert apart < 1e-5 * gradients[name].grad.norm(), name


def test_each_row_comes_once_before_any_comes_again() -> None:
    line = [index for step in range(7) for index in due(7, 3, 5, step)]
    assert [sorted(line[start : start + 7]) for start in (0, 7, 14)] == [list(range(7))] * 3
    assert line[:7] != line[7:14]


@pytest.mark.parametrize(
    ("rows", "groups", "wanted"), [(3, 2, [[0], [1, 2]]), (2, 4, [[], [0], [], [1]]), (0, 1, [[]]), (1, 0, [])]
)
def test_rows_are_dealt_in_order(rows: int, groups: int, wanted: list[list[int]]) -> None:
    assert dealt(list(range(rows)), groups) == wanted


def test_a_step_is_the_same_however_it_is_cut(tmp_path: Path) -> None:
    found = {}
    for name, cut in {
        "8x1": {"per_device_train_batch_size": 8},
        "1x8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        "3 in tokens": {"per_device_train_batch_size": 8, "micro_batch_tokens": 60},
    }.items():
        make(tmp_path / name, "dpo", PAIRS, beside={"data": ANSWERS, "rows": 5}, **cut).train()
        keys = ("loss", f"loss/{BESIDE}", "grad_norm")
        found[name] = [line[key] for line in lines(tmp_path / name) for key in keys]
    whole = found.pop("8x1")
    assert len(whole) == 6
    for other in found.values():
        assert other == pytest.approx(whole, rel=5e-5)


def test_a_resumed_run_is_bit_identical_and_changed_rows_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "answers.jsonl", ANSWERS)
    settings: Any = {"beside": {"data": file, "rows": 3}, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    settings |= {"per_device_train_batch_size": 3}
    make(tmp_path / "run", "dpo", PAIRS, **settings).train()
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    weights = load_file(tmp_path / "run" / "model.safetensors")
    checkpoint = str(tmp_path / "run" / "checkpoints" / "checkpoint-000002")
    make(tmp_path / "run", "dpo", PAIRS, resume=checkpoint, **settings).train()
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
    again = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)

    write(tmp_path / "answers.jsonl", ANSWERS[::-1])
    with pytest.raises(ConfigurationError, match="the rows have changed"):
        make(tmp_path / "run", "dpo", PAIRS, resume=checkpoint, **settings).train()


def test_evaluations_are_the_stages_own(tmp_path: Path) -> None:
    metrics = make(tmp_path, "dpo", PAIRS, PAIRS, beside={"data": ANSWERS}, max_steps=1).train().metrics
    assert not any("multitask" in name for name in metrics)


# What is refused


@pytest.mark.parametrize(
    ("stage", "rows", "options", "said"),
    [
        (
            "sft",
            ANSWERS,
            {},
            r"would do nothing\. .* which has one; .* Other kinds of tasks together are not supported",
        ),
        ("sft", ANSWERS, {"per_source": False}, "and per_source is false"),
        ("sft", ANSWERS, {"per_source": True}, "do not say which source they are from: they are given in Python"),
        ("pt", [{"text": "a document " * 30}], {"per_source": True}, "or made of several documents"),
        ("rm", PAIRS, {"beside": {"data": ANSWERS}}, "this stage has a head of one value"),
    ],
)
def test_what_is_refused(tmp_path: Path, stage: str, rows: Any, options: Any, said: str) -> None:
    run = make(tmp_path, stage, rows, **options)
    with pytest.raises(ConfigurationError, match=said):
        run.prepare()
    assert not hasattr(run, "model"), "it is refused before a model is loaded"


def test_a_source_whose_figures_have_the_names_of_others_is_refused(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", ANSWERS) for name in ("loss", "b")]
    with pytest.raises(
        ConfigurationError, match=r"'loss' would be called .*\(loss/\.\.\.\)\. Give its file another name"
    ):
        make(tmp_path / "run", "sft", files).prepare()
    with pytest.raises(ConfigurationError, match=r"the source 'rewards' .* \(rewards/margins\)"):
        check_task("rewards", {"rewards/margins"})


def test_bad_rows_of_the_second_data_set_are_told_with_its_option(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"^plugins\.multitask\.beside\.data: "):
        make(tmp_path, "dpo", PAIRS, beside={"data": str(tmp_path / "none.jsonl")}).prepare()
