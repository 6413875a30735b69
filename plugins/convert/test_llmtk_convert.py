"""What comes out of small files of each program, what is said of it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from llmtk_convert.command import command
from llmtk_convert.conversion import PEERS, Conversion, convert
from llmtk_convert.llama_factory import source
from llmtk_convert.reading import read_command, read_settings

from llmtk import ConfigurationError
from llmtk.config.reading import read_file
from llmtk.config.sections import DataConfig
from llmtk.data import read_splits
from llmtk.host.discovery import get_stage

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a file into the working folder, and return its path."""
    monkeypatch.chdir(tmp_path)

    def written(text: str, name: str = "theirs.yaml") -> Path:
        file = Path(name)
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        return file

    return written


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])


def error(*words: str | Path) -> str:
    done = run(*words)
    assert isinstance(done.exception, ConfigurationError), done.output
    assert done.exception.exit_code == 2
    return str(done.exception)


def of(peer: str, method: str | None = None, **settings: Any) -> Conversion:
    return convert(PEERS[peer], settings, method)


# TRL


def test_a_file_of_trl_becomes_ours_with_its_defaults_and_says_what_it_left(write: Write) -> None:
    file = write(
        """
model_name_or_path: builtin
dataset_name: pairs.jsonl
learning_rate: 5e-7
use_peft: true
lora_r: 8
beta: 0.2
loss_type: hinge
eval_steps: 10
push_to_hub: true
hub_token: null
packing_free: 3
"""
    )
    done = run(file, "--from", "trl", "--method", "dpo", "--output", "ours.yaml")
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    assert read_file("ours.yaml") == {
        "stage": "dpo",
        "model": {"name_or_path": "builtin"},
        "data": {"train": "pairs.jsonl", "max_length": 1024},
        "peft": {"method": "lora", "r": 8},
        "train": {"learning_rate": 5e-7, "gradient_checkpointing": True},
        "dpo": {"beta": 0.2, "loss": "hinge"},
    }
    said = done.stderr
    assert "TRL, dpo -> stage dpo; 7 keys carried over" in said
    assert "push_to_hub: nothing is sent to the hub" in said
    assert "eval_steps: it is used under eval_strategy: steps alone, there too" in said
    assert "packing_free: unknown to TRL 1.16" in said
    assert "data.max_length: 1024 there, 2048 here" in said
    assert "peft adapts the layers that it lists" in said
    assert "hub_token" not in said, "a key without a value says nothing"


def test_a_command_line_of_trl_is_read_with_its_file(write: Write) -> None:
    write("learning_rate: 1e-4\nuse_peft: true\nmax_length: 512\n", "sft.yaml")
    words = (
        "trl sft --config sft.yaml --model_name_or_path builtin --dataset-name rows.jsonl --learning_rate=1e-5 "
        "--lora_target_modules q_proj v_proj --no_gradient_checkpointing --bf16 --max_steps -1 "
        """--lr_scheduler_kwargs {"min_lr":1e-6}"""
    )
    done = run(*words.split())
    assert done.exit_code == 0, done.output
    ours = yaml.safe_load(done.stdout)
    assert ours["train"] == {
        "learning_rate": 1e-5, "gradient_checkpointing": False, "bf16": True, "max_steps": -1,
        "lr_scheduler_kwargs": {"min_lr": 1e-6},
    }  # fmt: skip
    assert ours["data"] == {"train": "rows.jsonl", "max_length": 512}
    assert ours["peft"]["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    "words",
    [
        "trl dpo --beta 0.2",
        "python trl/scripts/dpo.py --beta 0.2",
        "accelerate launch --config_file a dpo.py --beta 0.2",
    ],
)
def test_a_method_is_found_however_trl_is_started(words: str) -> None:
    assert read_command(words.split(), PEERS["trl"].keys)[:2] == ("dpo", {"beta": 0.2})


@pytest.mark.parametrize(
    ("words", "launcher", "processes"),
    [
        (
            "accelerate launch --config_file=X --num_processes 8 dpo.py",
            "accelerate launch --config_file=X --num_processes 8",
            8,
        ),
        ("torchrun --nproc_per_node=4 --nnodes 2 dpo.py", "torchrun --nproc_per_node=4 --nnodes 2", 8),
        ("torchrun --nproc-per-node gpu dpo.py", "torchrun --nproc-per-node gpu", None),
        ("python3.12 dpo.py", "", None),
    ],
)
def test_words_that_start_several_processes_are_told(words: str, launcher: str, processes: int | None) -> None:
    asked = read_command(words.split(), PEERS["trl"].keys)
    assert (asked.launcher, asked.settings.get("num_processes")) == (launcher, processes)
    said = run(*words.split(), "--beta", "0.2").stderr
    assert (f"{launcher}: llmtk launch starts several processes" in said) == bool(launcher)


def test_a_method_that_is_given_goes_before_the_name_of_a_script() -> None:
    assert run("python", "train.py", "--method", "dpo", "--beta", "0.2").stdout.startswith(
        "# From a command line (TRL, dpo)"
    )
    assert "read as TRL's alone" in error("python", "train.py", "--from", "axolotl", "--method", "dpo")
    assert "LLaMA-Factory's settings are read from a file" in error("llamafactory-cli", "train", "--stage", "sft")
    assert error("axolotl", "train", "a.yaml").endswith("llmtk convert a.yaml")
    assert error("accelerate", "launch", "-m", "axolotl.cli.train", "a.yaml").endswith("llmtk convert a.yaml")


def test_losses_of_trl_that_are_stages_of_ours_are_these() -> None:
    assert of("trl", "dpo", loss_type=["ipo"], beta=0.3).config["ipo"] == {"beta": 0.3}
    simpo = of("trl", "cpo", loss_type="simpo", simpo_gamma=1.5)
    assert simpo.config["simpo"] == {"gamma": 1.5, "beta": 0.1, "nll_alpha": 1.0}
    assert of("trl", "reward", center_rewards_coefficient=0.01).config["rm"] == {"center_rewards_coefficient": 0.01}
    several = of("trl", "dpo", loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])
    assert several.config["dpo"] == {"loss": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        # 64 completions a step, 8 of each of 8 prompts
        ({"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4}, (2, 4, None)),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 16}, (1, 8, None)),
        # 64 completions in two steps
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "steps_per_generation": 8}, (1, 8, 2)),
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "generation_batch_size": 64}, (1, 8, 2)),
    ],
)
def test_batches_of_completions_become_batches_of_prompts(theirs: dict[str, int], ours: tuple[Any, ...]) -> None:
    made = of("trl", "grpo", num_generations=8, **theirs).config
    train = made["train"]
    assert (
        train["per_device_train_batch_size"],
        train["gradient_accumulation_steps"],
        made["grpo"].get("mini_batches"),
    ) == ours


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ({"per_device_train_batch_size": 6}, "6 completions a rank are no whole prompts of 8; here 8 are"),
        ({"num_generations": 6}, "8 completions a rank are no whole prompts of 6; here 6 are"),
        (
            {"per_device_train_batch_size": 8, "steps_per_generation": 3, "gradient_accumulation_steps": 2},
            "3 prompts and 1.5 steps on them do not divide; here one step is taken",
        ),
        ({"generation_batch_size": 64}, "generation_batch_size is read for one process"),
    ],
)
def test_a_batch_of_completions_that_prompts_cannot_make_is_told(theirs: dict[str, int], told: str) -> None:
    made = of("trl", "grpo", **{"per_device_train_batch_size": 8, **theirs})
    assert told in made.changed["per_device_train_batch_size"]


def test_a_batch_of_all_processes_is_divided_by_them() -> None:
    shared = {"per_device_train_batch_size": 8, "generation_batch_size": 64}
    made = of("trl", "grpo", **shared, num_processes=4)
    assert made.config["grpo"]["mini_batches"] == 2
    assert made.changed["generation_batch_size"] == "here it counts prompts, there completions"


@pytest.mark.parametrize(
    ("peer", "settings", "packs", "told"),
    [
        ("trl", {"dataset_text_field": "text"}, {"packing": True}, {"packing": False}),
        (
            "llama-factory",
            {"stage": "pt", "do_train": True},
            {"packing": True, "neat_packing": False},
            {"packing": False},
        ),
        ("axolotl", {"pretraining_dataset": [{"path": "a.txt"}]}, {"sample_packing": True}, {"sample_packing": False}),
        ("axolotl", {"datasets": [{"path": "a.txt", "type": "completion"}]}, {"sample_packing": True}, {}),
        ("trl", {"dataset_text_field": "text"}, {"packing": True}, {}),
    ],
)
def test_texts_are_joined_and_where_they_were_rows_it_is_told(
    peer: str, settings: dict[str, Any], packs: dict[str, Any], told: dict[str, Any]
) -> None:
    def all_of(more: dict[str, Any]) -> str:
        made = of(peer, "sft" if peer == "trl" else None, **settings, **more)
        assert made.stage == "pt"
        return str([made.changed, made.left, made.remarks])

    assert "packed" not in all_of(packs)
    assert "there each text is a row" not in all_of(packs)
    assert "there each text is a row, here texts are joined to blocks" in all_of(told)


def test_reinforcement_keeps_rewards_lengths_and_the_kl() -> None:
    made = of(
        "trl", "grpo", beta=0.04, reward_funcs=["think_format_reward", "mine.score"], reward_weights=[0.5, 1.0],
        max_completion_length=1536, max_prompt_length=512, loss_type="grpo", importance_sampling_level="sequence",
        scale_rewards=False, use_vllm=True,
    )  # fmt: skip
    options = made.config["grpo"]
    assert options["kl_correction"] is True
    assert options["loss"] == "gspo"
    assert options["scale_rewards"] == "none"
    assert [reward["weight"] for reward in options["rewards"]] == [0.5, 1.0]
    assert options["rewards"][1] == {"file": "mine.py", "function": "score", "weight": 1.0}
    assert made.config["data"] == {"max_length": 2048}
    assert "generation.engine" in made.left["use_vllm"]
    assert made.config["train"]["disable_dropout"] is False, "TRL leaves dropout on"


def test_what_a_run_would_still_ask_for_is_said_and_no_reward_is_loaded(write: Write) -> None:
    write("raise SystemExit('run')", "mine.py")
    settings = {"model_name_or_path": "builtin", "dataset_name": "rows.jsonl"}
    assert of("trl", "grpo", **settings, reward_funcs=["mine.score"]).remarks == []
    assert of("trl", "grpo", **settings).remarks == ["Still to be given: grpo.rewards"]
    (told,) = of("trl", "grpo", **settings, num_generations=1, reward_funcs="mine.score").remarks
    assert told.startswith("To be settled before a run: grpo.num_generations: 1 leaves nothing to compare")


def test_a_dataset_of_the_hub_keeps_its_splits_and_is_evaluated_when_asked() -> None:
    settings = {"dataset_name": "trl-lib/Capybara", "dataset_config": "main", "dataset_test_split": "held"}
    made = of("trl", "sft", **settings)
    assert made.config["data"]["train"] == {"path": "trl-lib/Capybara", "name": "main", "split": "train"}
    assert "eval" not in made.config["data"]
    made = of("trl", "sft", **settings, eval_strategy="epoch")
    assert made.config["data"]["eval"] == {"path": "trl-lib/Capybara", "name": "main", "split": "held"}


def test_no_limit_is_said_and_texts_are_pretraining() -> None:
    made = of("trl", "sft", max_length=None, model_name_or_path="m")
    assert "null is no limit there" in made.left["max_length"]
    assert "data" not in made.config
    made = of("trl", "sft", dataset_text_field="body", dataset_name="a.jsonl", packing=True)
    assert made.stage == "pt"
    assert made.config["data"]["columns"] == {"body": "text"}


def test_what_a_stage_does_not_use_is_left_and_an_optimizer_that_is_refused_too() -> None:
    made = of("trl", "dpo", neftune_noise_alpha=5, optim="galore_adamw", report_to="none", lora_dropout=0.1)
    assert made.left["neftune_noise_alpha"] == "dpo does not use train.neftune_noise_alpha"
    assert "galore_adamw" in made.left["optim"]
    assert "without use_peft" not in made.left["lora_dropout"]
    assert made.config["train"]["report_to"] == []
    assert "num_generations" in of("trl", "dpo", num_generations=4).left


@pytest.mark.parametrize("peer", PEERS)
def test_deepspeed_keeps_its_stage_and_offloading_where_its_file_is_there(peer: str, tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    on_host = {"device": "cpu", "pin_memory": True}
    for stage, offloads in [
        (2, {"offload_optimizer": "cpu"}),
        (3, {"offload_optimizer": "cpu", "offload_param": "cpu"}),
    ]:
        zero = {"stage": stage, "offload_optimizer": on_host, "offload_param": on_host, "overlap_comm": True}
        file.write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": "auto"}}))
        assert of(peer, "sft", deepspeed=str(file)).config["deepspeed"] == {"zero_stage": stage, **offloads}
    file.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    assert "spreads nothing" in of(peer, "sft", deepspeed=str(file)).left["deepspeed"]
    assert "cannot be read here" in of(peer, "sft", deepspeed="nowhere/zero3.json").left["deepspeed"]


# LLaMA-Factory

INFO = {
    "mine": {"file_name": "mine.json", "columns": {"prompt": "ask", "response": "say"}},
    "talks": {
        "file_name": "talks.jsonl", "formatting": "sharegpt", "columns": {"messages": "turns", "images": "pictures"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "hub": {"hf_hub_url": "some/pairs", "subset": "a", "columns": {"chosen": "good", "rejected": "bad"}},
    "far": {"ms_hub_url": "some/where"},
}  # fmt: skip
FACTORY = """
stage: {stage}
model_name_or_path: builtin
finetuning_type: lora
lora_rank: 4
lora_target: q_proj,v_proj
dataset: mine,talks
template: llama3
cutoff_len: 256
val_size: 0.1
eval_strategy: steps
warmup_ratio: 0.1
plot_loss: true
"""


def test_a_file_of_llama_factory_becomes_ours_with_its_data(write: Write) -> None:
    write(json.dumps(INFO), "data/dataset_info.json")
    done = run(write(FACTORY.format(stage="sft")))
    assert done.exit_code == 0, done.output
    ours = yaml.safe_load(done.stdout)
    assert ours["data"] == {
        "train": [
            {"path": "data/mine.json", "columns": {"ask": "instruction", "say": "output"}},
            {"path": "data/talks.jsonl", "columns": {"turns": "messages"}},
        ],
        "max_length": 256,
        "eval": 0.1,
    }
    assert ours["peft"] == {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    assert ours["train"] == {
        "eval_strategy": "steps", "warmup_ratio": 0.1, "bf16": False, "gradient_checkpointing": True,
        "learning_rate": 5e-5,
    }  # fmt: skip
    assert "LLaMA-Factory, sft -> stage sft" in done.stderr
    assert "template: llama3: the tokenizer's own chat template is used" in done.stderr
    assert "without talks: columns.images" in done.stderr


def test_the_data_are_read_as_the_columns_say(write: Write) -> None:
    write(json.dumps(INFO), "data/dataset_info.json")
    write(json.dumps([{"ask": "1+1=", "say": "2"}]), "data/mine.json")
    write(
        json.dumps({"turns": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        "data/talks.jsonl",
    )
    made = convert(PEERS["llama-factory"], read_settings(write(FACTORY.format(stage="sft"))))
    made.config["data"].pop("eval")
    splits = read_splits(DataConfig.model_validate(made.config["data"]), ["dialogue"], seed=1)
    assert [row.place.partition(":")[0] for row in splits.train] == ["data/mine.json", "data/talks.jsonl"]


def test_data_sets_become_a_catalog(write: Write) -> None:
    done = run(write(json.dumps(INFO), "data/dataset_info.json"), "--output", "sets.yaml")
    assert done.exit_code == 0, done.output
    assert read_file("sets.yaml") == {
        "mine": {"path": "data/mine.json", "columns": {"ask": "instruction", "say": "output"}},
        "talks": {"path": "data/talks.jsonl", "columns": {"turns": "messages"}},
        "hub": {"path": "some/pairs", "name": "a", "split": "train", "columns": {"good": "chosen", "bad": "rejected"}},
        "far": "some/where",
    }
    assert "far: ms_hub_url" in done.stderr
    made = of("llama-factory", dataset="mine", dataset_dir="elsewhere")
    assert made.config["data"] == {"train": ["mine"], "catalog": "sets.yaml"}
    assert "llmtk convert elsewhere/dataset_info.json" in made.changed["dataset"]


def test_texts_and_dead_entries_of_a_list_of_data_sets(write: Write) -> None:
    info = {"texts": {"file_name": "t.jsonl", "columns": {"prompt": "body"}}, "dead": {"formatting": "sharegpt"}}
    done = run(write(json.dumps(info), "dataset_info.json"))
    assert done.exit_code == 0, done.output
    assert yaml.safe_load(done.stdout) == {"texts": {"path": "t.jsonl", "columns": {"body": "text"}}}
    assert "dead: names no data: give file_name" in done.stderr


@pytest.mark.parametrize("wrong", [{"columns": 5}, {"tags": "x"}, {"columns": ["a"]}])
def test_an_entry_of_a_wrong_type_is_told(wrong: dict[str, Any], write: Write) -> None:
    file = write(json.dumps({"mine": {"file_name": "a.json", **wrong}}), "data/dataset_info.json")
    assert f"{file}: the data set mine: LLaMA-Factory takes no such entry" in error(file)
    assert "the data set mine: LLaMA-Factory takes no such entry" in error(
        write("stage: sft\ndataset: mine\ncutoff_len: 9\n")
    )


@pytest.mark.parametrize(
    ("made", "strategy"),
    [
        (of("llama-factory", do_train=True, val_size=100, eval_strategy="steps"), "steps"),
        (of("trl", "sft", dataset_name="a.jsonl", eval_strategy="epoch"), "epoch"),
        (of("axolotl", base_model="m", val_set_size=4, eval_steps=5), "steps"),
    ],
)
def test_evaluations_without_rows_are_told(made: Conversion, strategy: str) -> None:
    told = f"Still to be given: data.eval, a share (0.1) or a file, since train.eval_strategy is {strategy}"
    assert told in made.remarks
    assert not any("data.eval" in remark for remark in of("trl", "sft", eval_strategy="no").remarks)


@pytest.mark.parametrize(("loss", "stage"), [("sigmoid", "dpo"), ("ipo", "ipo"), ("orpo", "orpo"), ("simpo", "simpo")])
def test_preferences_of_llama_factory_choose_their_stage(loss: str, stage: str) -> None:
    made = of("llama-factory", stage="dpo", pref_loss=loss, pref_beta=0.5, finetuning_type="full")
    assert made.stage == stage
    assert made.config[stage]["beta"] == 0.5
    assert "peft" not in made.config


def test_freezing_continuing_and_proximal_policies() -> None:
    made = of("llama-factory", finetuning_type="freeze", freeze_trainable_layers=3)
    assert made.config["model"] == {"train_only": 3}
    made = of("llama-factory", model_name_or_path="base", adapter_name_or_path="saves/lora", quantization_bit=4)
    assert made.config["model"] == {"name_or_path": "saves/lora", "quantization": "4bit"}
    assert "peft" not in made.config, "the adapter is trained on as it is"
    made = of("llama-factory", stage="rm", lora_rank=4, lora_dropout=0.1)
    assert made.config["peft"] == {"method": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
    assert made.config["train"]["disable_dropout"] is False
    made = of("llama-factory", stage="ppo", reward_model="saves/rm", cutoff_len=512, max_new_tokens=128, top_p=0.9)
    assert made.config["data"] == {"max_length": 640}
    assert made.config["ppo"]["rewards"] == [{"model": "saves/rm"}]
    assert made.config["ppo"]["kl_control"] == "adaptive"
    made = of("llama-factory", finetuning_type="oft")
    assert "LoRA" in made.left["finetuning_type"]
    assert "peft" not in made.config


@pytest.mark.parametrize(
    ("asked", "train"),
    [
        ({"do_train": True}, {}),
        ({"do_train": False, "do_eval": True}, {"do_train": False, "eval_strategy": "epoch"}),
        ({"do_eval": True}, {"do_train": False, "eval_strategy": "epoch"}),
        ({"do_train": False, "eval_strategy": "steps"}, {"do_train": False, "eval_strategy": "steps"}),
        ({"do_train": True, "do_eval": True, "eval_strategy": "no"}, {"eval_strategy": "epoch"}),
        ({"do_train": True, "do_eval": False}, {"eval_strategy": "no"}),
        ({"do_train": True, "do_predict": True}, {"do_predict": True}),
    ],
)
def test_llama_factory_trains_evaluates_and_predicts_what_is_asked(
    asked: dict[str, Any], train: dict[str, Any]
) -> None:
    made = of("llama-factory", model_name_or_path="builtin", **asked).config["train"]
    wanted = ("do_train", "do_eval", "do_predict", "eval_strategy")
    assert {key: made[key] for key in wanted if key in made} == train


def test_what_is_predicted_is_the_data_of_evaluation_and_a_file_that_trains_nothing_names_its_command() -> None:
    shared = {"model_name_or_path": "builtin", "dataset_dir": "ONLINE", "dataset": "a", "eval_dataset": "b"}
    rows = [{"path": "b", "split": "train"}]
    data = of("llama-factory", **shared, do_train=True, do_predict=True).config["data"]
    assert (data.get("eval"), data["test"]) == (None, rows)
    data = of("llama-factory", **shared, do_train=True, do_predict=True, eval_strategy="epoch").config["data"]
    assert (data["eval"], data["test"]) == (rows, rows)
    made = of("llama-factory", **shared, do_train=True, do_predict=True, do_sample=False, max_new_tokens=9)
    assert made.config["predict"] == {"temperature": 0, "max_new_tokens": 9, "top_p": 0.7, "top_k": 50}
    made = of("llama-factory", **shared, do_train=True, do_predict=True, do_sample=True)
    assert made.config["predict"]["temperature"] == 0.95
    assert "llmtk predict" in of("llama-factory", do_train=True, top_p=0.5).left["top_p"]
    assert of("llama-factory", **shared).remarks[0].startswith("do_train is not given")
    with pytest.raises(ConfigurationError, match="llmtk predict builtin --data FILE"):
        of("llama-factory", **shared, do_predict=True)
    with pytest.raises(ConfigurationError, match="llmtk export RUN --merge --output out"):
        of("llama-factory", model_name_or_path="m", export_dir="out")
    with pytest.raises(ConfigurationError, match="llmtk chat saves/a, or llmtk predict saves/a --data FILE"):
        of("llama-factory", model_name_or_path="m", adapter_name_or_path="saves/a", infer_backend="huggingface")


@pytest.mark.parametrize("stage", ["dpo", "kto", "ppo"])
def test_an_adapter_that_is_trained_on_has_its_base_as_reference(stage: str) -> None:
    shared = {"stage": stage, "model_name_or_path": "base", "adapter_name_or_path": "saves/sft"}
    assert of("llama-factory", **shared).config["model"] == {"name_or_path": "saves/sft", "reference": "base"}
    assert of("llama-factory", **shared, ref_model="ours").config["model"]["reference"] == "ours"
    assert "reference" not in of("llama-factory", **(shared | {"stage": "rm"})).config["model"]
    assert "reference" not in of("llama-factory", **(shared | {"stage": "dpo"}), pref_loss="orpo").config["model"]


def test_pure_bf16_computes_in_bfloat16_and_a_rank_that_is_no_number_is_told_as_it_stands() -> None:
    made = of("llama-factory", pure_bf16=True, bf16=False)
    assert made.config["model"] == {"dtype": "bfloat16"}
    assert made.config["train"]["bf16"] is True
    assert of("llama-factory", pure_bf16=True).config["train"]["bf16"] is True
    with pytest.raises(ConfigurationError, match=r"peft\.r: expected a whole number, got .eight"):
        of("llama-factory", lora_rank="eight")


def test_what_a_run_never_does_is_told() -> None:
    assert "never overwrites" in of("llama-factory", overwrite_output_dir=True).left["overwrite_output_dir"]
    assert of("llama-factory", overwrite_output_dir=False).left == {}
    made = of("axolotl", base_model="m", shuffle_merged_datasets=False)
    assert "an order drawn from the seed" in made.left["shuffle_merged_datasets"]
    assert of("axolotl", base_model="m", shuffle_merged_datasets=True).left == {}


# axolotl


def test_a_file_of_axolotl_becomes_ours(write: Write) -> None:
    file = write(
        """
base_model: builtin
load_in_4bit: false
datasets:
  - path: json
    data_files: talks.jsonl
    type: chat_template
    field_messages: turns
    message_property_mappings: {role: from, content: value}
    roles_to_train: [assistant]
val_set_size: 0.1
adapter: lora
lora_r: 8
lora_target_linear: true
sequence_len: 1024
sample_packing: yes
wandb_project:
micro_batch_size: 2
optimizer: adamw_torch
learning_rate: 0.0002
bf16: auto
evals_per_epoch: 4
saves_per_epoch: 1
flash_attention: true
special_tokens: {pad_token: <pad>}
"""
    )
    done = run(file)
    assert done.exit_code == 0, done.output
    assert yaml.safe_load(done.stdout) == {
        "stage": "sft",
        "model": {"name_or_path": "builtin", "attn_implementation": "flash_attention_2"},
        "data": {
            "train": {"path": "talks.jsonl", "columns": {"turns": "conversations"}},
            "eval": 0.1,
            "max_length": 1024,
            "on_too_long": "drop",
        },
        "peft": {"method": "lora", "r": 8, "target_modules": "all-linear"},
        "train": {
            "per_device_train_batch_size": 2, "optim": "adamw_torch", "learning_rate": 0.0002,
            "eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 1.0,
            "lr_scheduler_type": "cosine", "warmup_ratio": 0.03,
        },
    }  # fmt: skip
    assert "evals_per_epoch: once an epoch, and not 4 times" in done.stderr
    assert "datasets: without roles_to_train" in done.stderr
    assert "sample_packing: rows are packed for computing" in done.stderr


@pytest.mark.parametrize(
    ("settings", "stage"),
    [
        ({"rl": "dpo", "rl_beta": 0.2}, "dpo"),
        ({"rl": "kto", "kto_desirable_weight": 0.5}, "kto"),
        ({"rl": "simpo", "simpo_gamma": 1.0}, "simpo"),
        ({"rl": "orpo", "orpo_alpha": 0.2}, "orpo"),
        ({"reward_model": True}, "rm"),
        ({"pretraining_dataset": [{"path": "some/texts"}]}, "pt"),
        ({"datasets": [{"path": "some/texts", "type": "completion"}]}, "pt"),
        ({"rl": "grpo", "micro_batch_size": 8, "trl": {"num_generations": 4, "beta": 0.1}}, "grpo"),
    ],
)
def test_methods_of_axolotl_choose_their_stage(settings: dict[str, Any], stage: str) -> None:
    made = of("axolotl", base_model="builtin", learning_rate="1e-5", **settings)
    assert made.stage == stage
    assert made.left == {}
    if stage == "grpo":
        assert made.config["train"]["per_device_train_batch_size"] == 2
        assert made.config["grpo"] == {
            "num_generations": 4, "beta": 0.1,
        }  # fmt: skip


def test_preferences_of_axolotl_name_their_columns() -> None:
    data = [
        {"path": "a/b", "split": "train", "type": "chatml.intel"},
        {"path": "c.jsonl", "type": {"field_prompt": "q"}},
    ]
    assert of("axolotl", rl="dpo", datasets=data).config["data"]["train"] == [
        {"path": "a/b", "split": "train", "columns": {"question": "instruction"}},
        {"path": "c.jsonl", "columns": {"q": "instruction"}},
    ]


ASK, SAY, NAY = ({"role": "assistant" if text != "q" else "user", "content": text} for text in "qab")


@pytest.mark.parametrize(
    ("rl", "entry", "row"),
    [
        (None, {"type": "alpaca"}, {"instruction": "q", "input": "", "output": "a"}),
        (None, {"type": {"field_instruction": "x", "field_output": "y"}}, {"x": "q", "y": "a"}),
        (None, {"type": "chat_template", "field_messages": "talk"}, {"talk": [ASK, SAY]}),
        (None, {"type": "completion", "field": "body"}, {"body": "q a"}),
        ("dpo", {"type": "chat_template.default"}, {"messages": [ASK], "chosen": SAY, "rejected": NAY}),
        ("dpo", {"type": "chatml.intel"}, {"system": "s", "question": "q", "chosen": "a", "rejected": "b"}),
        ("dpo", {"type": "llama3.ultra"}, {"prompt": "q", "chosen": [ASK, SAY], "rejected": [ASK, NAY]}),
        ("orpo", {"type": "chat_template.argilla"}, {"chosen": [ASK, SAY], "rejected": [ASK, NAY]}),
        ("kto", {"type": "llama3.intel"}, {"question": "q", "completion": "a", "label": True}),
    ],
)
def test_data_sets_of_axolotl_are_read_by_their_type(rl: str | None, entry: Any, row: Any, write: Write) -> None:
    path = str(write(json.dumps(row), "rows.jsonl"))
    made = of("axolotl", rl=rl, base_model="m", datasets=[{"path": path, "ds_type": "json", **entry}])
    config = DataConfig.model_validate(made.config["data"])
    (found,) = read_splits(config, get_stage(made.stage).row_types, seed=1).train
    if rl == "dpo":
        assert found.prompt[-1] == ASK  # type: ignore[union-attr]
        assert found.chosen == [SAY]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("made", "key"),
    [
        (of("axolotl", base_model="m", datasets=[{"path": "a.jsonl", "split": "train[:10%]"}]), "datasets.split"),
        (
            of(
                "axolotl",
                base_model="m",
                test_datasets=[{"path": "json", "data_files": "a.jsonl", "split": "train[90%:]"}],
            ),
            "test_datasets.split",
        ),
        (
            of("trl", "sft", datasets=[{"path": "json", "data_files": "a.jsonl", "split": "train[:9%]"}]),
            "datasets.split",
        ),
        (of("trl", "sft", dataset_name="a.jsonl", dataset_train_split="train[:9%]"), "dataset_train_split"),
    ],
)
def test_a_split_of_a_file_is_told_since_files_are_read_whole(made: Conversion, key: str) -> None:
    assert "of a.jsonl: a file is read whole; cut the file" in made.left[key]


def test_a_split_of_a_file_that_is_all_of_it_and_one_of_the_hub_are_kept() -> None:
    assert of("axolotl", base_model="m", datasets=[{"path": "a.jsonl", "split": "train"}]).left == {}
    made = of("trl", "sft", datasets=[{"path": "a/b", "split": "train[:9%]"}])
    assert made.config["data"]["train"] == [{"path": "a/b", "split": "train[:9%]"}]
    assert made.left == {}
    assert (
        "give data.eval a file"
        in of("trl", "sft", dataset_name="a.csv", dataset_test_split="t").left["dataset_test_split"]
    )


def test_keys_of_a_data_set_of_axolotl_that_a_source_has_not_are_told() -> None:
    entry = {
        "path": "a.jsonl", "type": "chat_template", "field_messages": "talk", "field_system": "sys",
        "chat_template": "chatml", "roles": {"user": ["human", "q"], "assistant": "gpt"},
        "message_property_mappings": {"role": "speaker", "content": "text"},
    }  # fmt: skip
    made = of("axolotl", base_model="m", datasets=[entry, {"path": "b.jsonl", "type": "mine.format"}])
    assert made.config["data"]["train"][0]["columns"] == {"talk": "messages", "sys": "system"}
    assert made.left["datasets.roles"].startswith("q (user): rename")
    assert made.left["datasets.message_property_mappings"].startswith("speaker, text:")
    assert made.left["datasets.chat_template"].startswith("chatml:")
    assert made.left["datasets.type"].startswith("mine.format: unknown here")
    usual = {"chat_template": "tokenizer_default", "roles": {"user": ["human"]}, "type": "sharegpt"}
    assert of("axolotl", base_model="m", datasets=[{"path": "a.jsonl", **usual}]).left == {}


def test_a_reward_model_of_axolotl_keeps_its_prompts(write: Write) -> None:
    path = str(write(json.dumps({"system": "s", "input": "q", "chosen": "a", "rejected": "b"}), "rows.jsonl"))
    data = [{"path": path, "type": "bradley_terry.chat_template"}]
    made = of("axolotl", reward_model=True, base_model="m", datasets=data)
    (row,) = read_splits(DataConfig.model_validate(made.config["data"]), get_stage("rm").row_types, seed=1).train
    assert row.prompt == [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("tags", "told"),
    [
        ({"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}, []),
        ({"role_tag": "speaker", "content_tag": "text"}, ["tags.role_tag, tags.content_tag (speaker, text)"]),
        ({"user_tag": "q"}, ["tags.user_tag"]),
    ],
)
def test_tags_of_llama_factory_that_no_format_knows_are_told(tags: dict[str, str], told: list[str]) -> None:
    entry = {"file_name": "a.json", "formatting": "sharegpt", "tags": tags}
    assert source(entry, Path("data")) == ({"path": "data/a.json"}, told)


def test_grpo_of_axolotl_takes_what_its_own_trl_takes() -> None:
    made = of("axolotl", rl="grpo", base_model="m", sequence_len=512, trl={"beta": 0.1, "use_bias_correction_kl": True})
    assert made.config["grpo"] == {"beta": 0.1, "kl_correction": True}
    assert made.config["data"]["max_length"] == 1280
    assert of("axolotl", rl="grpo", base_model="m", rl_beta=0.1).config["grpo"]["beta"] == 0.1
    assert "kl_correction" not in of("axolotl", rl="grpo", base_model="m", rl_beta=0.1).config["grpo"]


# What is refused


def test_files_that_are_none_of_them_are_refused(write: Write) -> None:
    assert "none of TRL, LLaMA-Factory, axolotl has such keys" in error(write("title: x\nauthor: y\n"))
    assert "theirs.yaml, line 3: is not YAML" in error(write("a: 1\nb: [\n"))
    assert "holds no settings" in error(write(""))
    assert "a configuration is keys and values" in error(write("- a\n"))
    assert "there is no such configuration file" in error("absent.yaml")
    assert "a configuration of llmtk's own already" in error(write("stage: sft\ntrain: {learning_rate: 1}\n"))
    assert "in use by TRL and by LLaMA-Factory" in error(write("model_name_or_path: m\nlearning_rate: 1e-5\n"))
    assert "exists already" in error(write("base_model: m\n"), "--output", "theirs.yaml")


def test_methods_that_there_is_no_stage_for_name_those_there_are(write: Write) -> None:
    assert "no stage for axolotl's 'ebft'; there is one for pretraining, sft, dpo" in error(
        write("base_model: m\nrl: ebft\n")
    )
    assert "no stage for LLaMA-Factory's stage 'grpo'" in error(write("stage: grpo\ncutoff_len: 1\n"))
    assert "pref_loss: kto_pair" in error(write("stage: dpo\npref_loss: kto_pair\ncutoff_len: 1\n"))
    assert "no stage for TRL's 'gkd'; there is one for sft, dpo" in error("trl", "gkd", "--beta", "1")
    told = error(write("model_name_or_path: m\ndataset_name: d\n"))
    assert "does not say the method" in told
    assert "--method sft|dpo" in told


def test_words_that_are_no_command_line_and_values_that_do_not_fit(write: Write) -> None:
    assert "give one file, or TRL's command line" in error("a.yaml", "b.yaml")
    assert "a setting of TRL's is written --name value" in error("trl", "sft", "stray")
    told = error(write("base_model: m\nlearning_rate: fast\n"))
    assert 'theirs.yaml: learning_rate: axolotl takes no such value: "fast"' in told
    told = error(write("base_model: m\nsequence_len: long\n"))
    assert "data.max_length: expected a whole number, got" in told


def test_a_stage_that_is_not_installed_is_written_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtk import PluginError
    from llmtk.host import discovery

    def absent(name: str) -> Any:
        raise PluginError(name)

    monkeypatch.setattr(discovery, "get_stage", absent)
    made = of("trl", "kto", model_name_or_path="m", desirable_weight=2.0)
    assert made.config["kto"] == {"desirable_weight": 2.0}
    assert any("pip install llmtk-stage-kto" in remark for remark in made.remarks)
