"""Training in part: what is named is trained, or frozen, and nothing else."""

from __future__ import annotations

import pytest
import torch

from llmtk.config.sections import ModelConfig
from llmtk.errors import ConfigurationError
from llmtk.models.freezing import freeze_parts
from llmtk.models.loading import load_model, parameter_counts

from .conftest import GPT2, LLAMA, build

TIED = LLAMA | {"tie_word_embeddings": True}
MIXTURE = {
    "model_type": "mixtral",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 2,
    "max_position_embeddings": 64,
}


def trained(model, **keys):
    """Return the names of what is trained."""
    freeze_parts(model, ModelConfig(name_or_path="any", **keys))
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def names(model):
    return {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("fields", "stack"), [(LLAMA, "model.layers"), (GPT2, "transformer.h"), (MIXTURE, "model.layers")]
)
def test_layers_by_number(tokenizer, fields, stack):
    model = build(tokenizer, fields)
    everything = names(model)
    first, last = ({name for name in everything if name.startswith(f"{stack}.{index}.")} for index in (0, 1))
    assert first
    assert last
    assert trained(build(tokenizer, fields), train_only=1) == last
    assert trained(build(tokenizer, fields), freeze=1) == everything - first
    assert trained(build(tokenizer, fields), train_only=2) == first | last


@pytest.mark.parametrize(
    ("pattern", "of"),
    [
        ("lm_head", lambda name: name == "lm_head.weight"),
        ("layers.1", lambda name: ".layers.1." in name),
        ("layers.1.mlp", lambda name: ".layers.1.mlp." in name),
        ("*norm", lambda name: "norm" in name),
        ("mlp.*_proj", lambda name: ".mlp." in name),
        ("model.norm.weight", lambda name: name == "model.norm.weight"),
        ("layers.[01].self_attn", lambda name: ".self_attn." in name),
    ],
)
def test_names_are_matched_part_by_part(tokenizer, pattern, of):
    model = build(tokenizer)
    chosen = {name for name in names(model) if of(name)}
    assert chosen
    assert trained(build(tokenizer), train_only=[pattern]) == chosen
    assert trained(build(tokenizer), freeze=[pattern]) == names(model) - chosen
    assert trained(build(tokenizer), train_only=[pattern, "embed_tokens"]) == chosen | {"model.embed_tokens.weight"}


def test_a_part_of_a_name_is_not_the_name(tokenizer):
    model = build(tokenizer, LLAMA | {"num_hidden_layers": 11})
    assert {name.split(".")[2] for name in trained(model, train_only=["layers.1"])} == {"1"}


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_tied_weights_go_by_either_name(tokenizer, name):
    assert trained(build(tokenizer, TIED), train_only=[name]) == {"model.embed_tokens.weight"}
    assert "model.embed_tokens.weight" not in trained(build(tokenizer, TIED), freeze=[name])


def test_without_either_all_is_trained(model):
    assert trained(model) == names(model)


def test_a_new_value_head_is_trained_beside_the_last_layers(tokenizer):
    config = ModelConfig(from_config=LLAMA, train_only=1)
    model = load_model(config, tokenizer, trainable=True, compute_dtype=torch.float32, head="value")
    found = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "score.weight" in found
    assert {name.split(".")[2] for name in found - {"score.weight"}} == {"1"}


def test_models_that_are_not_trained_are_not_asked(tokenizer):
    config = ModelConfig(from_config=LLAMA, train_only=1)
    model = load_model(config, tokenizer, trainable=False, compute_dtype=torch.float32)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_is_trained_is_counted(model):
    total = sum(parameter.numel() for parameter in model.parameters())
    assert parameter_counts(model) == (total, total)
    freeze_parts(model, ModelConfig(name_or_path="any", train_only=["lm_head"]))
    assert parameter_counts(model) == (260 * 32, total)


def test_names_that_are_not_there(model):
    with pytest.raises(ConfigurationError, match=r"train_only: no parameter's name has 'lm_haed' in it.* 'lm_head'\?"):
        trained(model, train_only=["layers.1", "lm_haed"])
    with pytest.raises(ConfigurationError, match=r"freeze: 3 layers are asked for, the model has 2"):
        trained(model, freeze=3)


def test_nothing_left_to_train(model):
    with pytest.raises(ConfigurationError, match="leaves no parameter to be trained"):
        trained(model, freeze=["*"])


def test_a_model_whose_layers_are_not_plain(tokenizer):
    model = build(tokenizer)
    model.model.others = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])
    with pytest.raises(ConfigurationError, match=r"is not plain\. Give names .*model\.layers, model\.others"):
        trained(model, train_only=1)


@pytest.mark.parametrize("asked", [0, -1, []])
@pytest.mark.parametrize("key", ["train_only", "freeze"])
def test_nothing_is_no_number_of_layers(key, asked):
    with pytest.raises(ValueError, match=f"{key} is .*give a number of layers"):
        ModelConfig(**{key: asked})


def test_one_of_both():
    with pytest.raises(ValueError, match="train_only or freeze, not both"):
        ModelConfig(train_only=1, freeze=1)
