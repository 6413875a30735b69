"""Layers into one configuration, and one error that says all that is wrong with them."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from llmtk.config.described import described_keys
from llmtk.config.other_names import NO_KEY, OTHER_NAMES
from llmtk.config.problems import known_keys
from llmtk.config.reading import read_file
from llmtk.config.run_config import dump, json_schema, resolve, run_config_model
from llmtk.config.sections import Section
from llmtk.contract import Stage
from llmtk.errors import ConfigurationError, LlmtkError, PluginError


class Toy(Stage):
    class Options(Section):
        loss: Literal["nll", "dft"] = "nll"
        """Which loss."""
        beta: float = Field(0.1, gt=0, le=2)
        """Strength, on
        two lines."""
        names: list[str] | None = None
        """Some names."""
        tau: float = 1.0
        """For dft."""

        @model_validator(mode="after")
        def _tau_is_for_dft(self) -> "Toy.Options":
            if self.loss != "dft" and "tau" in self.model_fields_set:
                raise ValueError("tau is used by loss: dft alone")
            return self

    defaults = {"train": {"learning_rate": 2e-5, "save_steps": 50}, "data": {"max_length": 64}}


class Smoothing(Stage):
    honours = frozenset({"label_smoothing_factor"})


def refusal(*layers: Any, stage: type[Stage] = Toy) -> str:
    with pytest.raises(ConfigurationError) as caught:
        resolve("toy", stage, *layers)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_later_layers_go_over_earlier_ones_and_all_over_the_stages_defaults() -> None:
    config = resolve("toy", Toy, {"train": {"seed": 1, "max_steps": 5}}, {"train": {"seed": 2}, "toy": {"beta": 1}})
    assert (config.train.learning_rate, config.train.seed, config.train.max_steps) == (2e-5, 2, 5)
    assert config.data.max_length == 64
    assert isinstance(config.options, Toy.Options)
    assert config.options.beta == 1.0
    assert (config.stage, config.peft, config.plugins, config.output_dir) == ("toy", None, {}, None)


def test_what_the_user_gave_is_known_apart_from_the_stages_defaults() -> None:
    config = resolve("toy", Toy, {"train": {"seed": 1}, "toy": {"beta": 0.5}})
    assert config.given == {"train", "train.seed", "toy", "toy.beta"}
    assert config.train.model_fields_set == {"seed"}
    assert resolve("toy", Toy).given == frozenset()


def test_a_rule_on_given_keys_does_not_hold_the_stages_defaults_against_the_user() -> None:
    config = resolve("toy", Toy, {"train": {"save_strategy": "epoch"}})
    assert config.train.save_steps == 50
    assert "save_steps needs save_strategy: steps" in refusal({"train": {"save_strategy": "epoch", "save_steps": 3}})


def test_the_limits_of_a_key_hold_where_a_stage_changes_its_default() -> None:
    assert "train.learning_rate: expected at least 0, got -1" in refusal({"train": {"learning_rate": -1}})


@pytest.mark.parametrize(("given", "trackers"), [("none", []), ("wandb", ["wandb"]), (["wandb"], ["wandb"])])
def test_a_tracker_may_stand_without_a_list_as_in_training_arguments(given: Any, trackers: list[str]) -> None:
    assert resolve("toy", Toy, {"train": {"report_to": given}}).train.report_to == trackers


def test_an_empty_section_is_one_with_every_line_commented_out() -> None:
    config = resolve("toy", Toy, {"train": None, "toy": None, "plugins": {"early-stopping": None}, "peft": None})
    assert config.train.learning_rate == 2e-5
    assert config.plugins == {"early-stopping": {}}
    assert config.peft is None
    assert resolve("toy", Toy, {"peft": {}}).peft is not None


def test_other_programs_names_are_of_keys_that_there_are() -> None:
    known = set(known_keys(run_config_model("toy", Toy)))
    assert {key.partition(":")[0] for key in OTHER_NAMES.values()} <= known
    assert not {*OTHER_NAMES, *NO_KEY} & {key.rpartition(".")[2] for key in known}


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"train": {"learning_rat": 1}}, "train.learning_rat: unknown key. Did you mean train.learning_rate?"),
        ({"learning_rate": 1}, "learning_rate: unknown key. Did you mean train.learning_rate?"),
        ({"train": {"max_length": 8}}, "train.max_length: unknown key. Did you mean data.max_length?"),
        ({"train": {"beta": 8}}, "train.beta: unknown key. Did you mean toy.beta?"),
        ({"trian": {}}, "trian: unknown key. Did you mean train?"),
        ({"train": {"learning-rate": 1}}, "train.learning-rate: unknown key. Did you mean train.learning_rate?"),
        ({"cutoff_len": 8}, "cutoff_len: unknown key. Did you mean data.max_length?"),
        ({"peft": {"lora_rank": 8}}, "peft.lora_rank: unknown key. Did you mean peft.r?"),
        ({"toy": {"assistant_only_loss": True}}, "unknown key. Did you mean data.loss_on: assistant?"),
        ({"toy": {"packing": True}}, "toy.packing: unknown key. Rows are packed without one, where the model is"),
        ({"toy": {"los": "nll"}}, "toy.los: unknown key. Did you mean toy.loss?"),
        ({"toy": {"qqq": 1}}, "toy.qqq: unknown key. The keys here are loss, beta, names, tau."),
        ({"grpo": {}}, "grpo: unknown key. The keys here are stage, model, data, peft, train, fsdp, deepspeed, toy"),
        ({"options": {}}, "options: unknown key."),
        ({1: 2}, "1: expected text as a key, got 1"),
        ({"train": {"learning_rate": "fast"}}, 'train.learning_rate: expected a number, got "fast"'),
        ({"train": {"learning_rate": True}}, "train.learning_rate: expected a number, got true"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate: expected a finite number, got NaN"),
        ({"train": {"learning_rate": None}}, "train.learning_rate: expected a number, got nothing"),
        ({"train": {"max_steps": 1.5}}, "train.max_steps: expected a whole number, got 1.5"),
        ({"train": {"seed": [1]}}, "train.seed: expected a whole number, got [1]"),
        ({"train": {"fp16": "maybe"}}, 'train.fp16: expected true or false, got "maybe"'),
        (
            {"train": {"save_strategy": "never"}},
            "train.save_strategy: expected 'no', 'steps' or 'epoch', got \"never\"",
        ),
        ({"train": 3}, "train: expected keys and values, got 3"),
        ({"train": {"max_steps": 0}}, "train: max_steps is 0: give a number of steps, or -1"),
        ({"model": {"revision": 3}}, 'model.revision: expected text, got 3; quote it to make it text: "3"'),
        ({"toy": {"beta": 3}}, "toy.beta: expected at most 2, got 3"),
        ({"toy": {"beta": 0}}, "toy.beta: expected a number above 0, got 0"),
        ({"toy": {"names": "a"}}, 'toy.names: expected a list, got "a"'),
        ({"toy": {"names": ["a", 1]}}, "toy.names.1: expected text, got 1"),
        ({"toy": {"tau": 2}}, "toy: tau is used by loss: dft alone"),
        ({"peft": {"r": 0}}, "peft.r: expected at least 1, got 0"),
        ({"plugins": {"a": 3}}, "plugins.a: expected keys and values, got 3"),
        ({"plugins": ["a"]}, 'plugins: expected keys and values, got ["a"]'),
        ({"data": {"train": 3}}, "data.train: expected text or keys and values or a list, got 3"),
        ({"data": {"eval": "10%"}}, "data: eval: a share is written 0.1, not 10%"),
        ({"data": {"test": "2.5 %"}}, "data: test: a share is written 0.025, not 2.5 %"),
        ({"data": {"eval": 1.5}}, "data: eval is a share of the training data between 0 and 1"),
        ({"model": {"tokenizer": {"kind": "x"}}}, "model.tokenizer.kind: expected 'char', 'bpe' or 'byte', got \"x\""),
        ({"model": {"tokenizer": {}}}, "model.tokenizer.kind: required, and not given"),
        ({"model": {"from_config": {}}}, "model: from_config needs model_type"),
        ({"output_dir": 3}, "output_dir: expected text, got 3"),
    ],
)
def test_one_problem_is_said_in_plain_words(layer: dict[Any, Any], message: str) -> None:
    said = refusal(layer)
    assert message in said.splitlines()[0]
    assert said.splitlines()[1:] == ["`llmtk show toy` lists every key with its default."]


def test_all_problems_are_said_at_once() -> None:
    assert refusal({"train": {"seed": "x"}, "lerning_rate": 1, "toy": {"beta": -1}}).splitlines() == [
        "The configuration has 3 problems:",
        "  lerning_rate: unknown key. Did you mean train.learning_rate?",
        '  train.seed: expected a whole number, got "x"',
        "  toy.beta: expected a number above 0, got -1",
        "`llmtk show toy` lists every key with its default.",
    ]


def test_one_bad_row_of_many_is_the_one_that_is_said() -> None:
    said = refusal({"data": {"train": [{"text": "a"}] * 500 + [3]}})
    assert said.startswith("data.train.500: expected keys and values, got 3")


def test_many_problems_and_long_values_are_cut() -> None:
    said = refusal({"toy": {"names": list(range(50))}, "train": {"seed": "x" * 500}})
    assert "and 31 more" in said
    assert max(map(len, said.splitlines())) < 150


def test_an_optional_key_is_refused_by_a_stage_that_does_not_honour_it() -> None:
    layer = {"train": {"label_smoothing_factor": 0.1}}
    assert "train.label_smoothing_factor: the stage toy does not use it. Remove it" in refusal(layer)
    assert resolve("toy", Toy, {"train": {"label_smoothing_factor": 0.0}}).train.label_smoothing_factor == 0
    assert resolve("toy", Smoothing, layer).train.label_smoothing_factor == 0.1


def test_a_file_for_another_stage_is_refused() -> None:
    assert resolve("toy", Toy, {"stage": "toy"}).stage == "toy"
    assert refusal({"stage": "kto"}).startswith('stage: the configuration is for "kto", and the run is asked for "toy"')


def test_what_is_no_mapping_or_holds_itself_is_refused() -> None:
    assert "keys and values, got 3" in refusal(3)
    circle: dict[str, Any] = {}
    circle["plugins"] = circle
    assert "nested too deeply" in refusal(circle)


def stage(**members: Any) -> type[Stage]:
    return type("Other", (Stage,), members)


def test_wrong_defaults_are_the_stages_fault() -> None:
    for defaults, part in [({"tran": {}}, "tran"), ({"train": {"lr": 1}}, "train"), ({"train": {"seed": "x"}}, "seed")]:
        with pytest.raises(PluginError) as caught:
            resolve("other", stage(defaults=defaults))
        assert "'other'" in str(caught.value)
        assert part in str(caught.value)


def test_a_stage_named_like_a_section_is_refused() -> None:
    with pytest.raises(PluginError, match="'train' is a section"):
        run_config_model("train", Toy)


def test_a_stage_may_have_peft_by_default_and_the_user_may_change_a_part_of_it() -> None:
    adapted = stage(defaults={"peft": {"r": 4}})
    assert resolve("other", adapted).peft.r == 4
    config = resolve("other", adapted, {"peft": {"lora_alpha": 8}})
    assert (config.peft.r, config.peft.lora_alpha) == (4, 8)
    assert resolve("other", adapted, {"peft": None}).peft is None


def test_the_name_of_a_stage_may_hold_a_hyphen() -> None:
    assert resolve("my-toy", Toy, {"my-toy": {"beta": 1}}).options.beta == 1


LAYERS = [
    {},
    {"train": {"save_strategy": "epoch", "lr_scheduler_kwargs": {"min_lr": 1e-5}, "run_name": "5e-7"}},
    {"model": {"tokenizer": {"kind": "char"}}, "data": {"train": ["a", "no"], "eval": 0.1}},
    {"data": {"train": [{"path": "a", "weight": 2}, "b"], "eval": {"path": "c", "columns": {"x": None}}, "test": 0.1}},
    {
        "peft": {"r": 2},
        "plugins": {"x": {"y": [1, None]}},
        "output_dir": "runs/${HOME}",
        "toy": {"loss": "dft", "tau": 2},
    },
]


@pytest.mark.parametrize("layer", LAYERS)
def test_a_dump_reads_back_as_the_same_configuration(layer: dict[str, Any], tmp_path: Path) -> None:
    config, file = resolve("toy", Toy, layer), tmp_path / "config.yaml"
    file.write_text(dump(config))
    again = resolve("toy", Toy, read_file(file))
    assert again.model_dump() == config.model_dump()
    assert dump(again) == dump(config)
    assert read_file(file)["train"]["learning_rate"] == 2e-5


def test_a_value_that_yaml_has_no_words_for_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="cannot be written"):
        dump(resolve("toy", Toy, {"plugins": {"x": {"y": object()}}}))


def test_the_schema_describes_and_closes_every_section() -> None:
    schema = json_schema("toy", Toy)
    json.dumps(schema)
    assert schema["additionalProperties"] is False
    assert all(section["additionalProperties"] is False for section in schema["$defs"].values())
    assert schema["properties"]["stage"]["const"] == "toy"
    assert schema["$defs"]["Options"]["properties"]["beta"]["exclusiveMinimum"] == 0
    assert schema["$defs"]["TrainConfig"]["properties"]["learning_rate"]["default"] == 2e-5
    for section in [schema, *schema["$defs"].values()]:
        assert all(key.get("description") or "$ref" in key for key in section["properties"].values())


def test_every_key_is_described_with_its_type_and_default() -> None:
    keys = {key.key: key for key in described_keys("toy", Toy)}
    assert next(iter(keys)) == "toy"
    assert keys["toy.beta"] == ("toy.beta", "number", "0.1", "Strength, on two lines.", False)
    assert keys["toy.loss"].type == "nll | dft"
    assert keys["toy.names"].type == "list of text | null"
    assert keys["train.learning_rate"].default == "2e-05"
    assert keys["model.tokenizer.kind"].default is None
    assert "train.label_smoothing_factor" not in keys
    assert "train.label_smoothing_factor" in {key.key for key in described_keys("toy", Smoothing)}
    assert all(key.help for key in keys.values())


names = st.sampled_from(["train", "data", "model", "peft", "toy", "plugins", "samples", "stage", "seed", "tokenizer"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3)
keys = names | st.text(max_size=5) | st.integers() | st.sampled_from(["learning_rate", "eval", "kind", "beta", "r"])
trees = st.recursive(
    scalars | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4) | st.tuples(inner),
    max_leaves=15,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(keys, trees | st.dictionaries(keys, trees), max_size=4), max_size=2))
def test_no_settings_give_anything_but_a_configuration_or_a_clear_error(layers: list[dict[Any, Any]]) -> None:
    try:
        text = dump(resolve("toy", Toy, *layers))
    except LlmtkError:
        return
    assert text.startswith("stage: toy\n")
