"""Reward models as rewards, against transformers' own forward on the rendered dialogue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llmtk_rl import reward_models
from llmtk_rl.rewards import Rewards, Sample
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from llmtk import ConfigurationError, TrainingError
from llmtk.models.checks import resolve

MakeSamples = Callable[..., list[Sample]]
DIALOGUE = [{"role": "user", "content": "37+48="}]
LENGTH = 64

pytest.importorskip("llmtk_rm_score", reason="reward models are an extra: pip install 'llmtk-rl[model]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny reward model, with the tokenizer and the template of the built-in model."""
    made: Path = tmp_path_factory.mktemp("models") / "judge"
    tokenizer = AutoTokenizer.from_pretrained(resolve("builtin"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.5,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


def by_hand(folder: Path, texts: list[str]) -> list[float]:
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"] for text in texts]
    with torch.no_grad():
        return [float(model(input_ids=one).logits) for one in ids]


def test_a_reward_model_judges_dialogues_by_its_own_template(folder: Path, samples: MakeSamples) -> None:
    rewards = Rewards([{"model": str(folder), "weight": 0.5}], section="grpo")
    assert (rewards.names, rewards.weights, rewards.files()) == (["judge"], [0.5], {})
    completions = ["85", "no", ""]
    found = rewards(samples(*completions, prompt=DIALOGUE)).flatten().tolist()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    texts = [
        tokenizer.apply_chat_template([*DIALOGUE, {"role": "assistant", "content": c}], tokenize=False)
        for c in completions
    ]
    assert found == pytest.approx(by_hand(folder, texts), rel=1e-4, abs=1e-5)
    assert len(set(found)) == 3


def test_a_reward_model_judges_plain_text_as_it_stands(folder: Path, samples: MakeSamples) -> None:
    completions = ["85", "no", ""]
    rewards = Rewards([{"model": str(folder)}], section="grpo")
    end = AutoTokenizer.from_pretrained(folder).eos_token
    expected = by_hand(folder, [f"1+1={completion}{end}" for completion in completions])
    assert rewards(samples(*completions)).flatten().tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert rewards(samples()).shape == (0, 1)


def test_a_completion_over_the_models_length_is_named_or_left_out(folder: Path, samples: MakeSamples) -> None:
    batch = samples("85", "5" * LENGTH, "no")
    with pytest.raises(TrainingError, match=r"^rows.jsonl:2: the reward judge .* judges 64 tokens at most"):
        Rewards([{"model": str(folder)}], section="grpo")(batch)
    rewards = Rewards([{"model": str(folder)}], section="grpo", on_error="drop")
    assert rewards(batch).isnan().flatten().tolist() == [False, True, False]
    assert rewards(batch[1:2]).isnan().all()
    assert len(rewards.left_out) == 1


def test_what_is_no_reward_model_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    language = AutoModelForCausalLM.from_pretrained(resolve("builtin"))
    language.save_pretrained(tmp_path / "language")
    for name, words in (
        (str(tmp_path / "language"), "is no reward model: it has a language model's head"),
        (str(tmp_path / "nothing"), "there is no folder"),
        (str(tmp_path), "is no model"),
    ):
        with pytest.raises(ConfigurationError, match=rf"^grpo.rewards.0: .*{words}"):
            Rewards([{"model": name}], section="grpo")
    monkeypatch.setattr(reward_models, "find_spec", lambda _: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'llmtk-rl\[model\]'"):
        Rewards([{"model": str(folder)}], section="grpo")
