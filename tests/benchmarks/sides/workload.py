"""The model and the rows of a comparison: SmolLM2-135M's shape with random weights, and real instructions and answers.

Needs llmtk, so it is imported in its environment alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from sides.job import MAX_LENGTH, ROWS

from llmtk.config.sections import ModelConfig, TokenizerConfig
from llmtk.models.loading import load_model
from llmtk.models.saving import save_model
from llmtk.models.tokenizers import load_tokenizer
from llmtk.training.order import shuffled

SHAPE = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
FILES = {"sft": "alpaca_en_demo.json", "dpo": "dpo_en_demo.json", "kto": "kto_en_demo.json"}
ANSWERS = ("completion", "chosen", "rejected")
"""Columns of a row that stand behind its prompt."""


def prepare(stage: str, steps: int, data: Path, folder: Path) -> list[list[int]]:
    """Write model and rows of `steps` steps into a job's folder; return the tokens of every sequence, sorted."""
    rows = READ[stage](json.loads((data / FILES[stage]).read_text()))
    config = ModelConfig(from_config=SHAPE, tokenizer=TokenizerConfig(kind="bpe", vocab_size=16384))
    tokenizer = load_tokenizer(config, lambda: (text for row in rows for text in row.values() if isinstance(text, str)))

    def encoded(row: dict[str, str]) -> list[list[int]]:
        answers = [row[name] for name in ANSWERS if name in row]
        return [[*tokenizer(row["prompt"] + answer)["input_ids"], tokenizer.eos_token_id] for answer in answers]

    def apart(row: dict[str, str]) -> list[list[int]]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answers = [tokenizer(row[name])["input_ids"] for name in ANSWERS if name in row]
        return [[*prompt, *answer, tokenizer.eos_token_id] for answer in answers]

    # LLaMA-Factory encodes prompt and answer apart, the others together: rows where that differs are left out.
    fitting = [row for row in rows[:600] if max(map(len, encoded(row))) <= MAX_LENGTH and encoded(row) == apart(row)]
    fitting = fitting[: ROWS[stage] * steps]
    ordered = [fitting[index] for index in shuffled(len(fitting), 42, 0)]
    save_model(load_model(config, tokenizer, trainable=True, compute_dtype=torch.float32), tokenizer, folder / "model")
    (folder / "rows.json").write_text(json.dumps(fitting))
    (folder / "ordered.json").write_text(json.dumps(ordered))
    return sorted(tokens for row in fitting for tokens in encoded(row))


def read_sft(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Turn alpaca rows into prompts and completions."""
    return [
        {"prompt": "\n".join(filter(None, (row["instruction"], row["input"]))) + "\n", "completion": row["output"]}
        for row in rows
        if row["output"]
    ]


def read_dpo(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Turn conversations with two answers into pairs."""
    return [
        {
            "prompt": "\n".join(turn["value"] for turn in row["conversations"]) + "\n",
            "chosen": row["chosen"]["value"],
            "rejected": row["rejected"]["value"],
        }
        for row in rows
    ]


def read_kto(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turn labelled conversations into prompts, completions and labels."""
    return [
        {
            "prompt": "\n".join(turn["content"] for turn in row["messages"][:-1]) + "\n",
            "completion": row["messages"][-1]["content"],
            "label": row["label"],
        }
        for row in rows
    ]


READ: dict[str, Any] = {"sft": read_sft, "dpo": read_dpo, "kto": read_kto}
