"""The loss against closed forms, rewards against transformers' own, what is refused, and `llmtk score`."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from llmtk_pref import demo_rows
from llmtk_rm_score import RewardModel, command
from llmtk_stage_rm import RewardModeling
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import llmtk
from llmtk import ConfigurationError, DatasetError, ModelLoadError, Run
from llmtk.host import discovery

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
KINDS = {
    "llama": TINY,
    "qwen2": TINY | {"model_type": "qwen2", "num_key_value_heads": 1},
    "gemma2": TINY | {"model_type": "gemma2", "num_key_value_heads": 1, "head_dim": 8},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128},
}
ROWS = demo_rows("train", 24)
MARGINS = [row | {"margin": 0.1 * index} for index, row in enumerate(ROWS)]


def make(folder: Path, rows: Any = ROWS, options: dict[str, Any] | None = None, **more: Any) -> Run:
    """Make a run of a tiny model from scratch, unless told of another."""
    train = {"bf16": False, "per_device_train_batch_size": 8, "logging_steps": 1, **more.pop("train", {})}
    model = more.pop("model", {"from_config": more.pop("fields", TINY), "tokenizer": {"kind": "byte"}})
    data = {"train": rows, "eval": rows, **more.pop("data", {})}
    return Run(RewardModeling, model=model, data=data, rm=options or {}, train=train, output_dir=str(folder), **more)


def set_up(run: Run) -> Any:
    """Set the run up, and return its first rows as a micro-batch."""
    run.evaluate()
    return run.hooks.prepare_batch([run.train_rows[index] for index in range(8)]).windows[0]


def exported(run: Run, name: str = "exact") -> Any:
    """Return the run's model in float64 by transformers alone, and its tokenizer."""
    folder = run.output_dir.with_name(name)
    run.save(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder).double().eval(), folder


def padded_rows(run: Run, count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token ids of chosen, rejected, chosen, ..., padded with the padding token, and their mask."""
    rows = [run.train_rows[index] for index in range(count)]
    ids = [torch.tensor(row["prompt_ids"] + row[f"{side}_ids"]) for row in rows for side in ("chosen", "rejected")]
    padding = run.tokenizer.pad_token_id
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=padding)
    return padded, (padded != padding).long()


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])  # type: ignore[union-attr]


# The loss


@pytest.mark.parametrize("centre", [None, 0.3])
@pytest.mark.parametrize("rows", [ROWS, MARGINS], ids=["plain", "margins"])
def test_loss_and_gradient_have_their_closed_form(tmp_path: Path, rows: Any, centre: float | None) -> None:
    """Also the mean that TRL 1.16.0 takes: -logsigmoid(c - j - margin) + coefficient (c + j)^2, over a batch."""
    run = make(tmp_path / "run", rows, {"center_rewards_coefficient": centre} if centre else {})
    batch = set_up(run)
    terms = run.hooks.compute_loss(batch).terms
    model, _ = exported(run)
    run.model.zero_grad()
    sum(term.coefficient * term.sum for term in terms.values()).backward()

    ids, mask = padded_rows(run)
    rewards = model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    chosen, rejected = rewards.detach().view(-1, 2).unbind(1)
    margins = torch.tensor([row.get("margin", 0.0) for row in rows[:8]], dtype=torch.float64)
    losses = torch.log1p(torch.exp(-(chosen - rejected - margins)))
    pull = -1 / (1 + torch.exp(chosen - rejected - margins))  # by the chosen reward, the opposite by the rejected one
    held = 2 * (centre or 0.0) * (chosen + rejected)
    rewards.backward(torch.stack([pull + held, held - pull], 1).flatten())

    total = sum(float(term.coefficient * term.sum.detach()) for term in terms.values())
    wanted = losses.sum() + (centre or 0.0) * (chosen + rejected).square().sum()
    assert total == pytest.approx(float(wanted), rel=1e-6)
    theirs = -F.logsigmoid(chosen - rejected - margins).mean() + (centre or 0) * torch.mean((chosen + rejected) ** 2)
    assert total / 8 == pytest.approx(float(theirs), rel=1e-6)
    assert [term.per for term in terms.values()] == ["pairs"] * len(terms)
    assert (gradient(run.model) - gradient(model)).norm() / gradient(model).norm() < 1e-5


def test_equal_scores_lose_ln_2_and_count_as_wrong(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    set_up(run)
    torch.nn.init.zeros_(run.model.score.weight)
    values = run.evaluate()
    assert values["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert (values["accuracy"], values["margin"]) == (0.0, 0.0)


def test_metrics_are_exact_means_over_pairs(tmp_path: Path) -> None:
    run = make(tmp_path / "run", train={"per_device_eval_batch_size": 5})
    values = run.evaluate()
    ids, mask = padded_rows(run, 24)
    rewards = exported(run)[0](input_ids=ids, attention_mask=mask).logits.view(-1, 2)
    chosen, rejected = rewards.detach().unbind(1)
    assert values["accuracy"] == pytest.approx(float((chosen > rejected).double().mean()))
    assert values["margin"] == pytest.approx(float((chosen - rejected).mean()), rel=1e-5, abs=1e-6)
    assert values["rewards/chosen"] == pytest.approx(float(chosen.mean()), rel=1e-5, abs=1e-6)
    assert values["rewards/rejected"] == pytest.approx(float(rejected.mean()), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_and_gradients_are_those_of_the_models_own_padded_forward(tmp_path: Path, kind: str) -> None:
    run = make(tmp_path / "run", fields=KINDS[kind])
    batch = set_up(run)
    model, _ = exported(run)
    assert run.forward.scorers[None].packed, run.forward.scorers[None].why_padded
    rewards = run.values(batch)
    ids, mask = padded_rows(run)
    expected = model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    assert (rewards.detach() - expected.detach()).norm() / expected.norm() < 1e-5
    weights = torch.linspace(-1, 1, 16)
    run.model.zero_grad()
    (rewards * weights).sum().backward()
    (expected * weights).sum().backward()
    assert (gradient(run.model) - gradient(model)).norm() / gradient(model).norm() < 1e-5
    assert torch.equal(run.values_window(batch), rewards.detach())


def test_a_new_head_is_drawn_by_the_seed_with_variance_one_over_width_plus_one(tmp_path: Path) -> None:
    heads = []
    for seed in (1, 1, 2):
        run = make(tmp_path / f"run{len(heads)}", fields=TINY | {"hidden_size": 512}, train={"seed": seed})
        set_up(run)
        heads.append(run.model.score.weight.detach())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert float(heads[0].std()) == pytest.approx(513**-0.5, rel=0.15)


# Training


def test_the_update_is_the_same_however_the_batch_is_cut_or_shuffled(tmp_path: Path) -> None:
    weights = []
    sgd = {"optim": "sgd", "learning_rate": 0.1, "num_train_epochs": 4, "max_grad_norm": 0, "eval_strategy": "no"}
    for name, (cut, rows) in {
        "1x8": ({}, MARGINS[:8]),
        "4x2": ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, MARGINS[:8]),
        "by tokens": ({"micro_batch_tokens": 100}, MARGINS[:8]),
        "shuffled": ({}, MARGINS[7::-1]),
        "padded": ({"scoring": "padded"}, MARGINS[:8]),
    }.items():
        run = make(tmp_path / name, rows, {"center_rewards_coefficient": 0.1}, train=sgd | cut)
        run.train()
        assert run.forward.scorers[None].packed == (name != "padded")
        weights.append(torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()]))
    for other in weights[1:]:
        assert (other - weights[0]).norm() / weights[0].norm() < 1e-6


def test_a_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    train = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3}
    whole = make(tmp_path / "run", train=train)
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-000003"
    for file in ("metrics.jsonl", "model.safetensors"):
        (tmp_path / file).write_bytes((tmp_path / "run" / file).read_bytes())
    resumed = make(tmp_path / "run", train=train, resume=str(checkpoint))
    resumed.train()
    for file in ("metrics.jsonl", "model.safetensors"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "run" / file).read_bytes(), file


def test_it_learns_and_transformers_alone_gives_the_same_rewards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path / "run", train={"max_steps": 60, "learning_rate": 1e-2})
    result = run.train()
    assert result.metrics["eval_accuracy"] > 0.9
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert (model.config.num_labels, model.config.pad_token_id) == (1, tokenizer.pad_token_id)
    texts = [
        tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
        for row in ROWS
        for side in ("chosen", "rejected")
    ]
    found = model(**tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)).logits.squeeze(-1)
    scored = RewardModel(tmp_path / "run").of_rows(llmtk.data.read_rows(ROWS, ("pair",)))
    rewards = torch.tensor([[row["chosen"], row["rejected"]] for row in scored]).flatten()
    torch.testing.assert_close(found.detach(), rewards, rtol=1e-4, atol=1e-5)

    again = make(tmp_path / "again", model=str(tmp_path / "run"))
    assert again.evaluate()["loss"] == pytest.approx(result.metrics["eval_loss"], rel=1e-4)
    assert torch.equal(again.model.score.weight, run.model.score.weight), "the head is kept"
    with pytest.raises(ConfigurationError, match="writes no text"):
        again.predict("37+48=")

    monkeypatch.setattr(discovery, "get_stage", lambda name: RewardModeling)
    opened = Run.open(tmp_path / "run")
    assert opened.evaluate(ROWS)["loss"] == pytest.approx(result.metrics["eval_loss"], rel=1e-5)


def language_model(folder: Path) -> Path:
    """Write a tiny language model, its embeddings tied to its head."""
    run = make(folder.with_name("for-tokenizer"))
    set_up(run)
    config = run.model.config.__class__.from_dict(run.model.config.to_dict() | {"tie_word_embeddings": True})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    return folder


def test_an_adapter_is_trained_with_the_head_and_goes_on(tmp_path: Path) -> None:
    from peft import AutoPeftModelForSequenceClassification

    base = language_model(tmp_path / "base")
    lora = {"model": str(base), "peft": {"r": 4}, "train": {"max_steps": 20, "learning_rate": 1e-2}}
    run = make(tmp_path / "run", **lora)
    run.train()
    assert run.forward.scorers[None].packed, run.forward.scorers[None].why_padded
    trained = [name for name, parameter in run.model.named_parameters() if parameter.requires_grad]
    assert any("score" in name for name in trained)
    assert all("lora" in name or "score" in name for name in trained)
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "run", num_labels=1).eval()
    ids, mask = padded_rows(run)
    expected = loaded(input_ids=ids, attention_mask=mask).logits.squeeze(-1).detach()
    batch = run.hooks.prepare_batch([run.train_rows[index] for index in range(8)]).windows[0]
    torch.testing.assert_close(run.values_window(batch), expected, rtol=1e-4, atol=1e-5)

    again = make(tmp_path / "again", model=str(tmp_path / "run"))
    assert again.evaluate()["loss"] == pytest.approx(run.evaluate()["loss"], rel=1e-5)
    pairs = llmtk.data.read_rows(ROWS[:8], ("pair",))
    scored = [[row["chosen"], row["rejected"]] for row in RewardModel(tmp_path / "run").of_rows(pairs)]
    torch.testing.assert_close(torch.tensor(scored).flatten(), expected, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_the_head_beside_an_adapter_stays_in_float32(tmp_path: Path) -> None:
    base = language_model(tmp_path / "base")
    train = {"max_steps": 20, "learning_rate": 1e-2, "bf16": True}
    run = make(tmp_path / "run", model=str(base), peft={"r": 4}, train=train)
    before = run.evaluate()["loss"]
    assert run.train().metrics["eval_loss"] < before
    assert run.forward.scorers[None].packed, run.forward.scorers[None].why_padded
    dtypes = {name.rpartition(".")[0].rpartition(".")[2]: p.dtype for name, p in run.model.named_parameters()}
    assert (dtypes["q_proj.base_layer".partition(".")[2]], dtypes["original_module"]) == (torch.bfloat16, torch.float32)


# What is refused


@pytest.mark.parametrize(
    ("margin", "words"),
    [(None, r"row 2 has no margin, as 1 of 24 rows"), (float("nan"), "margin is nan"), ("1", "margin is text")],
)
def test_a_bad_margin_is_refused_by_its_row(tmp_path: Path, margin: Any, words: str) -> None:
    rows = [MARGINS[0], MARGINS[1] | {"margin": margin}, *MARGINS[2:]]
    with pytest.raises(DatasetError, match=words):
        make(tmp_path / "run", rows).train()


def test_margins_in_one_split_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"data\.train has margins and data\.eval has none"):
        make(tmp_path / "run", MARGINS, data={"eval": ROWS}).train()


def test_what_a_reward_model_cannot_do_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"samples\.count: a model of stage rm writes no text"):
        make(tmp_path / "run", samples={"count": 1}).train()
    run = make(tmp_path / "run")
    set_up(run)
    run.save(tmp_path / "rewards")
    with pytest.raises(ModelLoadError, match="has a head of one value"):
        Run("sft", model=str(tmp_path / "rewards"), data=ROWS, output_dir=str(tmp_path / "sft")).train()


def test_an_adapter_of_a_language_model_is_refused(tmp_path: Path) -> None:
    base = language_model(tmp_path / "base")
    rows = [{"prompt": "1+1=", "completion": "2"}] * 8
    train = {"max_steps": 1, "bf16": False, "eval_strategy": "no"}
    sft = Run("sft", model=str(base), data=rows, peft={"r": 2}, train=train, output_dir=str(tmp_path / "sft"))
    sft.train()
    with pytest.raises(ModelLoadError, match="is an adapter of a language model, and a model with a head of one value"):
        make(tmp_path / "run", model=str(tmp_path / "sft")).train()


# llmtk score


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    make(folder, train={"max_steps": 2}).train()
    return folder


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_score_writes_a_line_a_row_whatever_its_format(trained: Path, tmp_path: Path) -> None:
    pairs = write(tmp_path / "pairs.jsonl", ROWS)
    done = CliRunner().invoke(command, [str(trained), "--data", pairs, "--output", str(tmp_path / "out.jsonl")])
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["place"] for line in lines] == [f"{pairs}:{n}" for n in range(1, 25)]

    answered = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
    dialogues = [{"messages": row["prompt"] + row["chosen"]} for row in ROWS]
    for name, rows in {"answered": answered, "dialogues": dialogues}.items():
        data = write(tmp_path / f"{name}.jsonl", rows)
        done = CliRunner().invoke(command, [str(trained), "--data", data, "--batch-tokens", "200"])
        found = [json.loads(line)["reward"] for line in done.stdout.splitlines()]
        assert found == pytest.approx([line["chosen"] for line in lines], rel=1e-4, abs=1e-5)


def test_score_says_what_it_cannot_do(trained: Path, tmp_path: Path) -> None:
    pairs = write(tmp_path / "pairs.jsonl", ROWS[:2])

    def error(*words: str) -> str:
        done = CliRunner().invoke(command, list(words))
        return str(done.exception)

    assert "exists already" in error(str(trained), "--data", pairs, "--output", pairs)
    language = language_model(tmp_path / "language")
    assert "is no reward model: it has a language model's head" in error(str(language), "--data", pairs)
    assert "there is no folder ./nothing" in error("./nothing", "--data", pairs)
    three = AutoModelForSequenceClassification.from_pretrained(trained, num_labels=3, ignore_mismatched_sizes=True)
    three.save_pretrained(tmp_path / "three")
    assert "is a classifier of 3 labels" in error(str(tmp_path / "three"), "--data", pairs)
    long = write(
        tmp_path / "long.jsonl", [{"prompt": "x" * 500, "completion": "y"}, {"prompt": "x", "completion": "y"}]
    )
    done = CliRunner().invoke(command, [str(trained), "--data", long])
    assert [json.loads(line)["reward"] is None for line in done.stdout.splitlines()] == [True, False]


def test_score_runs_as_a_process_of_llmtk(trained: Path, tmp_path: Path) -> None:
    """Found by its entry point, of which there is one in a folder of its own: none needs to be installed."""
    info = tmp_path / "llmtk_rm_for_a_test-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llmtk-rm-for-a-test\nVersion: 1.0\nSummary: s\n")
    (info / "entry_points.txt").write_text("[llmtk.commands]\nscore-for-a-test = llmtk_rm_score:command\n")
    data = write(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        f"from llmtk.cli import main; main(['score-for-a-test', {str(trained)!r}, '--data', {data!r}])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)) == ["place", "reward"]


def test_rewards_of_tokens_share_their_prompts(trained: Path) -> None:
    rewards = RewardModel(trained)
    prompts, answers = [[5, 6, 7], [5, 6, 7], [8], []], [[9, 10], [11], [12, 13], [14]]
    model = AutoModelForSequenceClassification.from_pretrained(trained)
    expected = [float(model(torch.tensor([p + a])).logits) for p, a in zip(prompts, answers, strict=True)]
    assert rewards(prompts, answers) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len(rewards(["1+1=", "2+2="], ["2", "4"])) == 2


# The demo


def test_the_demo_learns(tmp_path: Path) -> None:
    train = {"max_steps": 25, "per_device_train_batch_size": 32}
    run = Run(RewardModeling, train=train, output_dir=str(tmp_path / "run"))
    figures = run.train().metrics
    assert 0.35 < figures["figure_before"] < 0.65
    assert figures["eval_loss"] < math.log(2)


@pytest.mark.slow
def test_the_whole_demo_improves_visibly(tmp_path: Path) -> None:
    figures = Run(RewardModeling, output_dir=str(tmp_path / "run")).train().metrics
    assert figures["figure_after"] > figures["figure_before"] + 0.3
