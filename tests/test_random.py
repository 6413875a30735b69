"""Configurations and files that chance has made: each is run, or refused in plain words; none ends in a traceback."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from llmtk.cli import call
from llmtk.config import sections
from llmtk.data.files import STREAMED
from llmtk.host import discovery

BUILTIN = Path(discovery.__file__).parents[1] / "demo" / "model"
REWARDS = Path(__file__).with_name("rewards.py")
FEW, MANY = 6, 300
"""Examples of a test, in the suite and in `make test-slow`."""


def examples(number: int) -> settings:
    """Return the settings of a test on so many examples: in the suite the same each time, in the slow one others."""
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=number == FEW,
        database=None,
        phases=[Phase.generate, Phase.shrink] if number == FEW else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module", autouse=True)
def _at_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep tokens in a folder of the tests', and the hub out of reach."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMTK_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


def told(*words: str) -> int:
    """Call the command with these words, and return its exit code: 0, or an error that llmtk raises on purpose."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code = call(list(words))
    assert code in (0, 1, 2), (code, said.getvalue())
    assert code == 0 or "rror: " in said.getvalue() or words[0] == "data"
    assert "Traceback" not in said.getvalue()
    assert "fault in llmtk" not in said.getvalue(), said.getvalue()
    return code


# Configurations


ROWS: dict[str, list[dict[str, Any]]] = {
    "pt": [{"text": f"{n} and {n + 1}"} for n in range(8)],
    "sft": [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)],
    "dpo": [{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": " no"} for n in range(8)],
    "kto": [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}", "label": n % 2 == 0} for n in range(8)],
    "grpo": [{"prompt": f"{n} + 1 ="} for n in range(8)],
}
STAGES = {**dict.fromkeys(("dpo", "ipo", "cpo", "simpo", "orpo", "rm"), "dpo"), "pt": "pt", "sft": "sft", "kto": "kto"}
STAGES |= dict.fromkeys(("grpo", "rloo", "ppo"), "grpo")
"""Stage -> the rows that it takes."""
TINY = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
WORDS: dict[str, list[Any]] = {
    "data.catalog": ["catalog.yaml"],
    "data.template": ["chatml", "template.jinja"],
    "data.train": ["rows.csv", "rows.jsonl", {"path": "rows.jsonl", "weight": 2}, ["rows.jsonl", "rows.jsonl"], "a/b"],
    "generation.engine": ["builtin", "vllm"],
    "model.attn_implementation": ["sdpa", "eager", "flash_attention_2", "flex_attention"],
    "model.from_config": [
        TINY | {"num_hidden_layers": 1},
        TINY | {"num_hidden_layers": 0},
        TINY | {"hidden_size": -1},
        TINY | {"hidden_size": "wide"},
        TINY | {"hidden_size": 15},
        TINY | {"num_attention_heads": 0},
        TINY | {"nonsense": 1},
        {"model_type": "bert"},
        {"model_type": "nonsense"},
    ],
    "model.name_or_path": ["builtin", "missing", "a/b", "rows.jsonl", "."],
    "model.reference": ["builtin", "missing"],
    "model.tokenizer": ["builtin", {"kind": "char"}, {"kind": "byte"}, {"kind": "bpe", "vocab_size": 300}],
    "model.train_only": [1, 99, ["lm_head"], ["nonsense"], ["layers.0", "*"]],
    "model.freeze": [1, 99, ["lm_head"], ["nonsense"], ["*"]],
    "peft.target_modules": ["all-linear", "q_proj", ".*", "(", ["q_proj", "nonsense"]],
    "peft.modules_to_save": [["lm_head"], ["nonsense"]],
    "train.ddp_backend": ["gloo", "nccl", "mpi"],
    "train.length_column_name": ["length", "place", "input_ids"],
    "train.lr_scheduler_kwargs": [{}, {"num_cycles": 2}, {"min_lr": 1e-6}, {"min_lr": "low"}, {"nonsense": 1}],
    "train.lr_scheduler_type": [kind.value for kind in SchedulerType],
    "train.metric_for_best_model": ["loss", "eval_loss", "perplexity", "nonsense"],
    "train.optim": [kind.value for kind in OptimizerNames],
    "train.optim_args": ["momentum=0.9", {"nesterov": True}, {"betas": [0.9, 0.5]}, {"nonsense": 1}],
    "train.report_to": [["tensorboard"], ["nonsense"], ["wandb"], "none"],
    "train.resume_from_checkpoint": ["auto", "missing"],
    "train.torch_compile_backend": ["eager", "nonsense"],
    "train.torch_compile_mode": ["nonsense"],
}
"""What else may stand at a key. Text of chance alone is refused before it comes to anything."""
LEFT_ALONE = {"train.torch_compile", "generation.options"}
"""What costs minutes, or does nothing without an installed engine."""
SMALL = {"data.num_proc", "train.dataloader_num_workers", "samples.max_new_tokens"}
"""Keys of which a large number is taken at its word: processes, threads, tokens written one after the other."""
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([float("nan"), float("inf"), 0.5, -0.5, 1e300]),
    st.text(max_size=5),
    st.lists(st.integers(0, 2), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
SECTIONS: dict[str, type[BaseModel]] = {
    "model": sections.ModelConfig,
    "data": sections.DataConfig,
    "peft": sections.PeftConfig,
    "train": sections.TrainConfig,
    "fsdp": sections.FsdpConfig,
    "deepspeed": sections.DeepspeedConfig,
    "samples": sections.SamplesConfig,
    "generation": sections.GenerationConfig,
}


class Asked(NamedTuple):
    """A command, a stage, and what the configuration says beside what is sound."""

    command: str
    stage: str
    settings: dict[str, Any]


@st.composite
def asked(draw: st.DrawFn) -> Asked:
    """Draw a stage, and values for one key to three; of one in three configurations, the first value is anything."""
    stage = draw(st.sampled_from(sorted(STAGES)))
    known = SECTIONS | {stage: discovery.get_stage(stage).Options}
    keys = [f"{section}.{key}" for section, model in known.items() for key in model.model_fields]
    keys += [*known, "plugins"]
    chosen = draw(st.lists(st.sampled_from([key for key in keys if key not in LEFT_ALONE]), min_size=1, max_size=3))
    is_junk = draw(st.sampled_from([False, False, True]))
    command = draw(st.sampled_from(["plan", "plan", "run"]))
    found = {}
    for key in chosen:
        section, _, name = key.partition(".")
        if not name:
            found[key] = draw(JUNK)
            continue
        fitting = st.sampled_from(WORDS[key]) if key in WORDS else values(known[section].model_fields[name].annotation)
        value = draw(JUNK if is_junk and key == chosen[0] else fitting)
        tame = command == "run" or key in SMALL
        found[key] = min(value, 9) if tame and isinstance(value, int | float) and value > 9 else value
    return Asked(command, stage, found)


def values(annotation: Any) -> st.SearchStrategy[Any]:
    """Return values of a type, at its edges above all."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return values(arguments[0])
    if origin in (Union, types.UnionType):
        return st.one_of([values(argument) for argument in arguments])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is list:
        return st.lists(values(arguments[0]), max_size=2)
    simple = {
        bool: st.booleans(),
        int: st.sampled_from([1, 2, 3, 4, 8, 64, 0, -1, 2**31, 2**63, 10**30]),
        float: st.sampled_from([0.1, 0.2, 0.5, 1.0, 2.0, 1e-8, 0.0, -1.0, 1e-300, 1e300, float("inf")]),
        str: st.text(max_size=4),
        type(None): st.none(),
    }
    return simple.get(annotation, JUNK)


def configuration(folder: Path, asked: Asked) -> dict[str, Any]:
    """Return a sound configuration of a stage, with what was drawn put into it."""
    whole: dict[str, Any] = {
        "model": {"name_or_path": "builtin"},
        "data": {"train": "rows.jsonl", "max_length": 64},
        "train": {"max_steps": 1},
        "output_dir": str(folder / "run"),
    }
    if STAGES[asked.stage] == "grpo":
        whole[asked.stage] = {"max_completion_length": 4, "rewards": [{"file": str(REWARDS), "function": "graded"}]}
    if "model.from_config" in asked.settings:
        whole["model"] = {"tokenizer": {"kind": "byte"}}
    for key, value in asked.settings.items():
        section, _, name = key.partition(".")
        if name:
            whole.setdefault(section, {})[name] = value
    return whole | {key: value for key, value in asked.settings.items() if "." not in key}


def check_configuration(home: Path, asked: Asked) -> int:
    """Plan or run what was asked, in a folder of its own."""
    folder = home / "asked"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in ROWS[STAGES[asked.stage]])
    (folder / "rows.jsonl").write_text(lines)
    (folder / "rows.csv").write_text("a,b\n1,2\n")
    (folder / "template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    (folder / "catalog.yaml").write_text("sums: rows.jsonl\n")
    (folder / "config.yaml").write_text(yaml.safe_dump(configuration(folder, asked)))
    with contextlib.chdir(folder):
        return told(asked.command, asked.stage, "config.yaml")


@examples(FEW)
@given(asked())
def test_a_configuration_of_chance(tmp_path: Path, asked: Asked) -> None:
    check_configuration(tmp_path, asked)


@pytest.mark.slow
@examples(MANY)
@given(asked())
def test_hundreds_of_configurations_of_chance(tmp_path: Path, asked: Asked) -> None:
    check_configuration(tmp_path, asked)


# Files


class Damage(NamedTuple):
    """What befalls a file: at a place (0, its beginning, to 1), bytes are put in the place of so many."""

    file: str
    place: float
    cut: int | None
    """None: all that follows."""
    put: bytes

    def befall(self, path: Path) -> None:
        """Damage a file."""
        data = path.read_bytes()
        at = min(int(self.place * (len(data) + 1)), len(data))
        path.write_bytes(data[:at] + self.put + (b"" if self.cut is None else data[at + self.cut :]))


def damage(files: list[str]) -> st.SearchStrategy[Damage]:
    """Draw a file, and what befalls it: bytes that are other ones, are missing, or are too many."""
    edges = [
        b"",
        b"\0",
        b"\xff",
        b"\n",
        b"}",
        b"[",
        b'"',
        b"-1",
        b"null",
        b"1e999",
        b": ",
        b"&a ",
        b"!!python/object:a.b ",
    ]
    put = st.one_of(st.sampled_from(edges), st.binary(max_size=4))
    return st.builds(Damage, st.sampled_from(files), st.floats(0, 1), st.sampled_from([0, 1, 1, 2, 50, None]), put)


TABLE = [{"text": f"{n} and {n + 1}, {'long ' * (n % 3)}é"} for n in range(9)]
WITH_TINY = [f"model.from_config={json.dumps(TINY | {'num_hidden_layers': 1})}", "model.tokenizer=builtin"]
DATA = ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.txt"]


def write_data(folder: Path) -> None:
    """Write the same table in every kind of file."""
    texts = [row["text"] for row in TABLE]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TABLE))
    (folder / "a.json").write_text(json.dumps(TABLE))
    (folder / "a.txt").write_text("\n".join(texts))
    (folder / "a.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in texts))
    (folder / "a.tsv").write_text("text\tn\n" + "".join(f"{text}\t1\n" for text in texts))
    nested = [[{"role": "user", "content": text}] for text in texts]
    pq.write_table(pa.table({"text": texts, "rest": nested}), folder / "a.parquet", row_group_size=4)


def check_data(whole: Path, damage: Damage) -> int:
    """Look for bad rows in a damaged file, and read it as a run does, as a stream where that can be."""
    with damaged(whole, damage):
        data = f"data.train={damage.file}"
        code = told("data", "check", "pt", data)
        if Path(damage.file).suffix in STREAMED:
            told("run", "pt", *WITH_TINY, data, "data.streaming=true", "train.max_steps=1", "output_dir=run")
        else:
            told("plan", "pt", *WITH_TINY, data)
        return code


@contextlib.contextmanager
def damaged(whole: Path, damage: Damage) -> Iterator[None]:
    """Work in a copy of a folder, with one file in it damaged."""
    folder = whole.with_name("damaged")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    damage.befall(folder / damage.file)
    with contextlib.chdir(folder):
        yield


CONFIGURATION = ["config.yaml", "config.yaml", "catalog.yaml", "template.jinja"]


def write_configuration(folder: Path) -> None:
    """Write a configuration with much in it."""
    rows = [{"question": f"{n} + 1 =", "answer": f" {n + 1}"} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "catalog.yaml").write_text("sums: {path: rows.jsonl, columns: {question: instruction, answer: output}}\n")
    shutil.copy(BUILTIN / "chat_template.jinja", folder / "template.jinja")
    whole = {
        "stage": "sft",
        "model": {"name_or_path": "builtin", "dtype": "float32"},
        "data": {"train": ["sums", {"path": "sums", "weight": 0.5}], "eval": 0.25, "catalog": "catalog.yaml"},
        "peft": {"r": 2, "target_modules": ["q_proj"]},
        "train": {
            "max_steps": 2,
            "learning_rate": 1e-4,
            "optim_args": {"amsgrad": True},
            "lr_scheduler_type": "cosine",
        },
        "plugins": {"early-stopping": {"patience": 2}},
    }
    whole["data"] |= {"template": "template.jinja", "max_length": 64}
    (folder / "config.yaml").write_text(yaml.safe_dump(whole))


def check_damaged_configuration(whole: Path, damage: Damage) -> int:
    """Plan the run of a configuration with a damaged file."""
    with damaged(whole, damage):
        return told("plan", "config.yaml")


MODEL = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"]
MODEL += ["chat_template.jinja", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"]


def write_model(folder: Path) -> None:
    """Write a model, and an adapter on it."""
    shutil.copytree(BUILTIN, folder, dirs_exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS["sft"]))
    with contextlib.chdir(folder):
        given = ["model.name_or_path=.", "data.train=rows.jsonl", "train.max_steps=1", "peft.r=1"]
        assert told("run", "sft", *given, "output_dir=adapter") == 0
    shutil.rmtree(folder / "adapter/checkpoints")


def check_model(whole: Path, damage: Damage) -> int:
    """Plan a run on a model, or on an adapter, of which a file is damaged."""
    with damaged(whole, damage):
        name = "adapter" if damage.file.startswith("adapter") else "."
        return told("plan", "sft", f"model.name_or_path={name}", "data.train=rows.jsonl", "output_dir=run")


def write_run(folder: Path) -> None:
    """Write the folder of a finished run with two checkpoints, on rows beside it."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS["sft"]))
    given = ["data.train=rows.jsonl", "data.eval=0.25", "data.max_length=64", "train.save_steps=1"]
    with contextlib.chdir(folder):
        assert told("run", "sft", *WITH_TINY, *given, "train.max_steps=2", "output_dir=run") == 0


def files_of(folder: Path) -> list[str]:
    """Return the files of the run in a folder."""
    return [str(file.relative_to(folder)) for file in sorted((folder / "run").rglob("*")) if file.is_file()]


def check_run(whole: Path, damage: Damage) -> int:
    """Look at a run of which a file is damaged, ask its model, and go on with it."""
    with damaged(whole, damage):
        if "checkpoint-" not in damage.file:
            told("runs", "list", ".")
            told("evaluate", "run")
        return told("run", "sft", "output_dir=run", "train.max_steps=3", "--resume", "auto")


KINDS: dict[str, tuple[Callable[[Path], None], list[str], Callable[[Path, Damage], int]]] = {
    "data": (write_data, DATA, check_data),
    "configuration": (write_configuration, CONFIGURATION, check_damaged_configuration),
    "model": (write_model, MODEL, check_model),
    "run": (write_run, [], check_run),
}


class Whole(NamedTuple):
    """A folder, its files that may be damaged, and what is done then."""

    folder: Path
    files: list[str]
    check: Callable[[Path, Damage], int]


@pytest.fixture(scope="module", params=KINDS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    make, files, check = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param) / "whole"
    folder.mkdir()
    make(folder)
    return Whole(folder, files or files_of(folder), check)


@examples(FEW)
@given(st.data())
def test_a_file_that_is_damaged(whole: Whole, data: st.DataObject) -> None:
    whole.check(whole.folder, data.draw(damage(whole.files)))


@pytest.mark.slow
@examples(MANY)
@given(st.data())
def test_hundreds_of_files_that_are_damaged(whole: Whole, data: st.DataObject) -> None:
    whole.check(whole.folder, data.draw(damage(whole.files)))
