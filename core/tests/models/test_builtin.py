"""The demo's task, and the model that has half learnt it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtk.config.sections import ModelConfig
from llmtk.demo import addition
from llmtk.models import load
from llmtk.models.checks import check_model, resolve
from llmtk.models.loading import load_model
from llmtk.models.tokenizers import load_tokenizer

FOLDER = Path(resolve("builtin"))


def answers(model, tokenizer, rows):
    """Greedy answers to the rows' questions."""
    prompts = [
        tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, tokenize=False) for row in rows
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    new = model.generate(**batch, do_sample=False, max_new_tokens=16)[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def test_it_is_small_and_sound():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 2_000_000
    assert json.loads((FOLDER / "config.json").read_text())["max_position_embeddings"] >= 256
    check_model(ModelConfig(name_or_path="builtin"))


def test_it_has_half_learnt_the_task():
    model, tokenizer = load("builtin")
    rows = addition.rows("held-out", 400, seed=11)
    right = sum(map(addition.is_correct, rows, answers(model, tokenizer, rows)))
    assert 0.50 <= right / len(rows) <= 0.65


def test_it_loads_for_training_in_float32():
    config = ModelConfig(name_or_path="builtin")
    tokenizer = load_tokenizer(config)
    model = load_model(config, tokenizer, trainable=True, compute_dtype=torch.float32)
    saved = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert model.dtype == torch.float32
    assert saved.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight.float())


def test_its_tokenizer_takes_any_text():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = "".join(map(chr, range(32, 127))) + "\n\té日本"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("1234567890")) == 10


def test_splits_share_no_pair_of_numbers():
    pairs = {
        split: {frozenset((problem.first, problem.second)) for problem in addition.problems(split, n)}
        for split, n in (("train", 11_000), ("held-out", 1_300))
    }
    assert not pairs["train"] & pairs["held-out"]


def test_rows_are_dialogues_decided_by_the_seed():
    rows = addition.rows("train", 50, seed=1)
    assert rows == addition.rows("train", 50, seed=1) != addition.rows("train", 50, seed=2)
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"]
    assert len({row["messages"][0]["content"] for row in rows}) == 50


def test_prompts_and_answers():
    digits, words = (addition.Problem(37, 48, words=words) for words in (False, True))
    assert (digits.prompt, digits.answer) == ("37+48=", "85")
    assert (words.prompt, words.answer) == ("thirty-seven plus forty-eight", "85")


@pytest.mark.parametrize(
    ("answer", "right"), [("85", True), (" 85\n", True), ("86", False), ("85.", False), ("", False)]
)
def test_only_the_exact_answer_is_right(answer, right):
    assert addition.is_correct(addition.dialogue(addition.Problem(37, 48, words=True)), answer) is right


def test_texts_for_continued_pretraining():
    texts = addition.texts("train", 20)
    assert texts == addition.texts("train", 20)
    assert all(row["text"].count("you have") == 6 for row in texts)


def test_more_problems_than_there_are():
    with pytest.raises(ValueError, match="the held-out split has 1343 problems, 2000 were asked for"):
        addition.problems("held-out", 2000)
