"""TRL's keys: its script arguments, ModelConfig and the configurations of its trainers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from llmtk import ConfigurationError
from llmtk.errors import suggest
from llmtk_convert.rules import (
    NOTHING,
    ROWS_AS_TEXTS,
    Answer,
    By,
    Done,
    Leave,
    Method,
    Peer,
    Rule,
    Settings,
    To,
    as_list,
    done,
    joined,
    leave,
    left,
    put,
    together,
)
from llmtk_convert.training_arguments import DEFAULTS, TRAINING_ARGUMENTS, evaluates, mapping

# Data

FILES = (".json", ".jsonl", ".csv", ".parquet", ".txt", ".ndjson", ".tsv")


def is_file(path: str) -> bool:
    """Tell a file of rows from a data set of the hub, and from a folder."""
    return path.endswith(FILES)


def uncut(path: str, split: Any) -> list[tuple[str, str]]:
    """Say that a file is read whole, where a split asks for some of its rows."""
    if not is_file(path) or split in (None, "train"):
        return []
    return [("split", f"{split} of {path}: a file is read whole; cut the file, or its other rows are read too")]


def source(path: str, name: str | None = None, split: str | None = None, revision: str | None = None) -> Any:
    """Return a source of rows; a file is its path alone."""
    if is_file(path):
        return path
    more = {"name": name, "split": split, "revision": revision}
    return {"path": path, **{key: value for key, value in more.items() if value}}


def _dataset(value: Any, settings: Settings) -> Answer:
    if settings.get("datasets"):
        return leave("`datasets` goes first, there too")
    path, name = str(value), settings.get("dataset_config")
    values = {"data.train": source(path, name, str(settings.get("dataset_train_split", "train")))}
    if evaluates(settings) and not is_file(path):
        values["data.eval"] = source(path, name, str(settings.get("dataset_test_split", "test")))
    return put(values)


def _with_dataset(value: Any, settings: Settings) -> Answer:
    return NOTHING if settings.get("dataset_name") else leave("it is used with dataset_name alone")


def _train_split(value: Any, settings: Settings) -> Answer:
    told = uncut(str(settings.get("dataset_name", "")), value)
    return leave(told[0][1]) if told else _with_dataset(value, settings)


def _test_split(value: Any, settings: Settings) -> Answer:
    if is_file(str(settings.get("dataset_name", ""))):
        return leave("a file is read whole; give data.eval a file of its own, or a share (0.1)")
    return _with_dataset(value, settings)


def _mixture(value: Any, settings: Settings) -> Answer:
    if not value:
        return NOTHING
    sources, lost = [], set()
    whole: list[tuple[str, str]] = []
    for item in as_list(mapping(value)):
        files = item.get("data_files")
        paths = as_list(files) if isinstance(files, str | list) else [item["path"]]
        sources += [source(str(path), item.get("name"), item.get("split", "train")) for path in paths]
        lost |= {key for key in ("columns", "fraction", "data_dir") if item.get(key)}
        whole += [told for path in paths for told in uncut(str(path), item.get("split"))]
    note = f"without {', '.join(sorted(lost))}; weight: says how often a source's rows come" if lost else ""
    return put({"data.train": sources}, note, together(whole))


def _test_share(value: Any, settings: Settings) -> Answer:
    if isinstance(value, float) and 0 < value < 1:
        return put({"data.eval": value})
    return leave("a number of rows; give data.eval a share (0.1) or a file")


# Model


def adapter(key: str, value: Any = lambda value: value) -> By:
    """Return the rule of an adapter's key, which counts with use_peft alone."""

    def rule(given: Any, settings: Settings) -> Answer:
        return put({key: value(given)}) if settings.get("use_peft") else leave("without use_peft there is no adapter")

    return By(rule, key)


def _use_peft(value: Any, settings: Settings) -> Answer:
    return put({"peft.method": "lora"}) if value else NOTHING


def lora_dropout(value: Any, settings: Settings) -> Answer:
    """Keep an adapter's dropout, where dropout is on."""
    if not settings.get("use_peft"):
        return leave("without use_peft there is no adapter")
    return put({"peft.lora_dropout": value})


def no_dropout(value: Any, settings: Settings) -> Answer:
    """Leave an adapter's dropout out, in methods that switch all dropout off."""
    if settings.get("disable_dropout") is False:
        return lora_dropout(value, settings)
    return leave("disable_dropout switches it off there too, and dropout is off here") if value else NOTHING


def targets(value: Any) -> Any:
    """Name the layers that get an adapter."""
    names = value if isinstance(value, str) and "," not in value and not value.isidentifier() else as_list(value)
    return "all-linear" if names in ("all-linear", ["all-linear"], ["all"]) else names


def _bits(bits: str) -> By:
    return By(lambda value, settings: put({"model.quantization": bits}) if value else NOTHING, "model.quantization")


def _of_4bit(key: str) -> By:
    def rule(value: Any, settings: Settings) -> Answer:
        return put({key: value}) if settings.get("load_in_4bit") else leave("it is used with load_in_4bit alone")

    return By(rule, key)


def revision(value: Any, settings: Settings) -> Answer:
    """Name a revision, if it is not the usual one."""
    return NOTHING if value == "main" else put({"model.revision": str(value)})


def dtype(value: Any, settings: Settings) -> Answer:
    """Load the weights in a type, which is what they are trained in."""
    name = str(value).removeprefix("torch.")
    if name not in ("auto", "float32", "bfloat16", "float16"):
        return leave(f"{name}: model.dtype takes auto, float32, bfloat16 and float16")
    if name == "float32":
        return put({"model.dtype": name})
    if name == "auto":
        return put({}, "the checkpoint's own type there; here weights that are trained are float32")
    return put({"model.dtype": name}, "weights that are trained keep this type, too; auto trains them in float32")


def attention(value: Any, settings: Settings) -> Answer:
    """Name an implementation of attention that transformers brings."""
    if "/" in str(value):
        return leave(f"{value}: kernels from the hub are not loaded; a run packs attention by itself where it can")
    return put({"model.attn_implementation": value})


def template_file(value: Any, settings: Settings) -> Answer:
    """Name a chat template that is a file."""
    if str(value).endswith((".jinja", ".jinja2", ".txt")):
        return put({"data.template": str(value)})
    return leave("a folder or a hub name; data.template takes a file, and model.tokenizer another tokenizer")


NO_LIMIT = "no limit"


def _max_length(value: Any, settings: Settings) -> Answer:
    if value == NO_LIMIT:
        return leave(
            "null is no limit there; here data.max_length has a default, which is to be raised where it is low"
        )
    return put({"data.max_length": value})


COMMON: dict[str, Rule] = {
    **TRAINING_ARGUMENTS,
    "model_name_or_path": "model.name_or_path",
    "model_revision": By(revision, "model.revision"),
    "dtype": By(dtype, "model.dtype"),
    "torch_dtype": By(dtype, "model.dtype"),
    "attn_implementation": By(attention, "model.attn_implementation"),
    "trust_remote_code": "model.trust_remote_code",
    "use_peft": By(_use_peft, "peft.method"),
    "lora_r": adapter("peft.r"),
    "lora_alpha": adapter("peft.lora_alpha"),
    "lora_dropout": By(lora_dropout, "peft.lora_dropout"),
    "lora_target_modules": adapter("peft.target_modules", targets),
    "lora_modules_to_save": adapter("peft.modules_to_save", as_list),
    "use_rslora": adapter("peft.use_rslora"),
    "use_dora": adapter("peft.use_dora"),
    "lora_task_type": Done("the stage says which model is trained"),
    "load_in_8bit": _bits("8bit"),
    "load_in_4bit": _bits("4bit"),
    "bnb_4bit_quant_type": _of_4bit("model.bnb_4bit_quant_type"),
    "use_bnb_nested_quant": _of_4bit("model.bnb_4bit_use_double_quant"),
    "dataset_name": By(_dataset, "data.train", "data.eval"),
    "dataset_config": By(_with_dataset),
    "dataset_train_split": By(_train_split),
    "dataset_test_split": By(_test_split),
    "dataset_streaming": "data.streaming",
    "streaming": "data.streaming",
    "datasets": By(_mixture, "data.train"),
    "test_split_size": By(_test_share, "data.eval"),
    "dataset_num_proc": "data.num_proc",
    "max_length": By(_max_length, "data.max_length"),
    **left("peft's own; peft.target_modules names modules", "lora_target_parameters"),
    **left("quantised weights are stored as bitsandbytes does", "bnb_4bit_quant_storage"),
    **left("keys of from_pretrained that have no key of ours; see the section model", "model_init_kwargs"),
    **left("the router's loss is added with the coefficient of the model's own configuration", "router_aux_loss_coef"),
    **left("activations stay on the device; train.gradient_checkpointing saves most of them", "activation_offloading"),
    **left(
        "llmtk launch starts several processes",
        "accelerate_config num_processes num_machines machine_rank main_process_ip main_process_port gpu_ids",
        "mixed_precision use_deepspeed config_file",
    ),
    **left("an environment variable is set in the shell", "env"),
    **left("chat templates stand in a file: data.template", "chat_template"),
    **left(
        "no key of TRL's own, but of a recipe; data.train takes sources, with weight",
        "dataset_mixer dataset_mixture dataset_splits dataset_configs",
    ),
    **done(
        "needs no key here, and changes nothing that is trained",
        "ignore_bias_buffers pad_to_multiple_of padding_free is_encoder_decoder padding_value",
        "preprocessing_num_workers",
    ),
}


# Methods

_TEXT = "the tokenizer's own is used"


def _side(value: Any, settings: Settings) -> Answer:
    return put({"data.truncation_side": "left"}) if value == "keep_end" else NOTHING


def _loss_on(words: Mapping[Any, str]) -> By:
    def rule(value: Any, settings: Settings) -> Answer:
        return put({"data.loss_on": words[value]}) if value in words else NOTHING

    return By(rule, "data.loss_on")


def _sft_loss(value: Any, settings: Settings) -> Answer:
    name = {"chunked_nll": "nll"}.get(value, value)
    return put({"STAGE.loss": name}) if name in ("nll", "dft") else leave(f"{value}: losses are nll and dft")


def _text_field(value: Any, settings: Settings) -> Answer:
    return NOTHING if value == "text" else put({"data.columns": {value: "text"}})


SFT: dict[str, Rule] = {
    **COMMON,
    "truncation_mode": By(_side, "data.truncation_side"),
    "loss_type": By(_sft_loss, "STAGE.loss"),
    "dataset_text_field": Done(),
    "completion_only_loss": _loss_on({True: "completion", False: "everything"}),
    "assistant_only_loss": _loss_on({True: "assistant"}),
    "chat_template_path": By(template_file, "data.template"),
    "use_dft_loss": By(lambda value, s: put({"STAGE.loss": "dft"}) if value else NOTHING, "STAGE.loss"),
    **left(
        "rows are packed for computing, where that changes no result, and a batch still counts rows: "
        "where TRL packs, give as many rows as a packed one holds (gradient_accumulation_steps)",
        "packing packing_strategy eval_packing",
        off=(False, "bfd", "wrapped"),
    ),
    **left(_TEXT, "eos_token", "pad_token"),
    **left("rows come in an order drawn from the seed", "shuffle_dataset", off=(True, False)),
    **left("keys of the preparation there; see the section data", "dataset_kwargs"),
}

TEXTS: dict[str, Rule] = {
    **SFT,
    "dataset_text_field": By(_text_field, "data.columns"),
    **left(
        "texts are learnt whole, joined to blocks of data.max_length tokens",
        "loss_type completion_only_loss assistant_only_loss use_dft_loss truncation_mode chat_template_path",
        off=(False, "nll", "keep_start"),
    ),
    **joined("packing"),
    **done("texts are joined to blocks of data.max_length tokens", "packing_strategy eval_packing"),
}

REFERENCE: dict[str, Rule] = {
    "precompute_ref_log_probs": "train.precompute_reference",
    "precompute_ref_batch_size": Done("train.per_device_eval_batch_size and the token budget bound it"),
}
_SMOOTHED = "sigmoid honours it here (conservative DPO), and ignores it there"
DPO_LOSSES = (
    "sigmoid", "sigmoid_norm", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft",
)  # fmt: skip


def dpo_losses(value: Any, settings: Settings) -> Answer:
    """Name the losses of dpo, one or several."""
    names = [{"aot_pair": "aot"}.get(name, name) for name in as_list(value)]
    if unknown := [name for name in names if name not in DPO_LOSSES]:
        return leave(f"{', '.join(unknown)}: no loss of the stage dpo; {', '.join(DPO_LOSSES)} are")
    return put({"STAGE.loss": names[0] if len(names) == 1 else names})


def _smoothing(value: Any, settings: Settings) -> Answer:
    losses = as_list(settings.get("loss_type") or "sigmoid")
    if not value:
        return NOTHING
    if not set(losses) & {"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"}:
        return leave(f"loss_type {', '.join(losses)} does not use it")
    return put({"STAGE.label_smoothing": value}, _SMOOTHED if "sigmoid" in losses else "")


_DIVERGENCES = {"js_divergence": "js", "alpha_divergence": "alpha"}


def _f_alpha(value: Any, settings: Settings) -> Answer:
    if settings.get("f_divergence_type") != "alpha_divergence":
        return leave("it is used with f_divergence_type: alpha_divergence alone, there too")
    return put({"STAGE.f_alpha": value})


def with_sync(key: str) -> By:
    """Return the rule of a key that counts where the reference moves."""

    def rule(value: Any, settings: Settings) -> Answer:
        return put({key: value}) if settings.get("sync_ref_model") else leave("it is used with sync_ref_model alone")

    return By(rule, key)


def _discopop(value: Any, settings: Settings) -> Answer:
    if "discopop" not in as_list(settings.get("loss_type") or []):
        return leave("it is used with loss_type: discopop alone, there too")
    return put({"STAGE.discopop_tau": value})


PAIRS: dict[str, Rule] = {
    **COMMON,
    "beta": "STAGE.beta",
    "disable_dropout": "train.disable_dropout",
    "lora_dropout": By(no_dropout, "peft.lora_dropout"),
    "max_prompt_length": Leave("prompts of pairs are never cut; one without room for an answer is left out"),
    "max_completion_length": Leave("answers are cut where the row is over data.max_length"),
    "truncation_mode": By(_side, "data.truncation_side"),
    **left("llmtk's samples answer prompts at each evaluation: samples.count", "generate_during_eval"),
    **left(_TEXT, "eos_token", "pad_token"),
}

DPO: dict[str, Rule] = {
    **PAIRS,
    **REFERENCE,
    "loss_type": By(dpo_losses, "STAGE.loss"),
    "loss_weights": To("STAGE.loss_weights", as_list),
    "label_smoothing": By(_smoothing, "STAGE.label_smoothing"),
    "f_divergence_type": To("STAGE.f_divergence", lambda value: _DIVERGENCES.get(str(value), value)),
    "f_alpha_divergence_coef": By(_f_alpha, "STAGE.f_alpha"),
    "ld_alpha": "STAGE.ld_alpha",
    "use_weighting": "STAGE.use_weighting",
    "discopop_tau": By(_discopop, "STAGE.discopop_tau"),
    "reference_free": "STAGE.reference_free",
    "rpo_alpha": "STAGE.rpo_alpha",
    "sync_ref_model": "STAGE.sync_ref_model",
    "ref_model_mixup_alpha": with_sync("STAGE.ref_model_mixup_alpha"),
    "ref_model_sync_steps": with_sync("STAGE.ref_model_sync_steps"),
    "ref_model_name_or_path": "model.reference",
}


IPO: dict[str, Rule] = {
    **PAIRS,
    **REFERENCE,
    "loss_type": Done(),
    "ref_model_name_or_path": "model.reference",
    **left(
        "ipo does not use it",
        "loss_weights label_smoothing f_divergence_type f_alpha_divergence_coef ld_alpha use_weighting",
        "discopop_tau reference_free rpo_alpha sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
        off=(False, 0, "reverse_kl"),
    ),
}


def precompute_for_kto(value: Any, settings: Settings) -> Answer:
    """Precompute the reference where no KL is estimated on new pairs of prompts and answers."""
    if not value:
        return NOTHING
    if settings.get("loss_type") != "apo_zero_unpaired":
        return leave("loss kto asks the reference about mismatched answers, which are new in each window")
    return put({"train.precompute_reference": True})


KTO: dict[str, Rule] = {
    **PAIRS,
    **REFERENCE,
    "precompute_ref_log_probs": By(precompute_for_kto, "train.precompute_reference"),
    "loss_type": "STAGE.loss",
    "desirable_weight": "STAGE.desirable_weight",
    "undesirable_weight": "STAGE.undesirable_weight",
    "ref_model_name_or_path": "model.reference",
    **left(
        "the reference of kto does not move",
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
    ),
}

REWARD: dict[str, Rule] = {
    **COMMON,
    "disable_dropout": "train.disable_dropout",
    "lora_dropout": By(no_dropout, "peft.lora_dropout"),
    "center_rewards_coefficient": "STAGE.center_rewards_coefficient",
    "chat_template_path": By(template_file, "data.template"),
    **left(_TEXT, "eos_token", "pad_token"),
}

_ALPHA = Leave("AlphaPO's transformation is left out")
CPO: dict[str, Rule] = {
    **PAIRS,
    "loss_type": "STAGE.loss",
    "cpo_alpha": "STAGE.cpo_alpha",
    "label_smoothing": "STAGE.label_smoothing",
    "simpo_gamma": Leave("it is used with loss_type: simpo alone, there too"),
    "alpha": _ALPHA,
}
SIMPO: dict[str, Rule] = {
    **PAIRS,
    "loss_type": Done(),
    "cpo_alpha": "STAGE.nll_alpha",
    "label_smoothing": "STAGE.label_smoothing",
    "simpo_gamma": To("STAGE.gamma", note="a margin of rewards, as there: TRL divides it by beta and multiplies again"),
    "alpha": _ALPHA,
}
ORPO: dict[str, Rule] = dict(PAIRS)


# Reinforcement

THINK = r"(?s)\s*<think>(?!.*<think>)(.*?)</think>.*"
PROMPT_ROOM = 1024
"""Tokens that are left for a prompt where nothing is said of it."""


def rewards(value: Any, settings: Settings) -> Answer:
    """Name the rewards, a model before functions as there: TRL's own by those of ours that are nearest."""
    models = as_list(settings.get("reward_model_name_or_path") or [])
    found = [({"model": str(path)}, "a folder of one label, such as a run of rm") for path in models]
    found += [_reward(str(name)) for name in as_list(settings.get("reward_funcs") or [])]
    weights = as_list(settings.get("reward_weights") or [None] * len(found))
    entries = [
        entry | ({} if weight is None else {"weight": weight})
        for (entry, _), weight in zip(found, weights, strict=False)
    ]
    return put({"STAGE.rewards": entries}, "; ".join(note for _, note in found if note))


def _reward(name: str) -> tuple[dict[str, Any], str]:
    if name in ("accuracy_reward", "reasoning_accuracy_reward"):
        return {"name": "math", "column": "solution"}, f"{name}: math-verify against the column solution"
    if name == "think_format_reward":
        return {"name": "format", "pattern": THINK}, f"{name}: a pattern for the whole completion"
    if name == "get_soft_overlong_punishment":
        return {"name": "length", "max_tokens": 1280, "buffer_tokens": 256}, ""
    if "." in name:
        module, _, function = name.rpartition(".")
        return {"file": f"{module.replace('.', '/')}.py", "function": function}, f"{name}: a file, and its function"
    return {"name": name}, f"{name}: if no installed reward is called so, give a file and its function"


class Prompts(NamedTuple):
    """A batch of ours, which counts prompts."""

    size: int
    accumulation: int
    steps: int
    notes: list[str]
    """Where it is not the batch of completions that was asked for."""


def prompts(settings: Settings, defaults: Mapping[str, int]) -> Prompts:
    """Return our batch for TRL's, which counts completions.

    TRL makes per_device_train_batch_size x steps_per_generation completions on each rank, num_generations of each
    prompt, and takes steps_per_generation / gradient_accumulation_steps optimizer steps on them.
    """
    size, accumulation, group = (
        int(settings.get(key) or defaults[key])
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations")
    )
    notes: list[str] = []
    rounds = int(settings.get("steps_per_generation") or 0) or _rounds(settings, size, notes) or accumulation
    wanted = max(1, round(size * rounds / group))
    if wanted * group != size * rounds:
        notes.append(f"{size * rounds} completions a rank are no whole prompts of {group}; here {wanted * group} are")
    micro = max(1, size // group)
    while wanted % micro:
        micro -= 1
    steps = max(1, rounds // accumulation)
    if wanted % steps or (rounds > accumulation and rounds % accumulation):
        notes.append(
            f"{wanted} prompts and {rounds / accumulation:g} steps on them do not divide; here one step is taken"
        )
        steps = 1
    return Prompts(micro, wanted // micro, steps, notes)


def _rounds(settings: Settings, size: int, notes: list[str]) -> int:
    """Return how many micro-batches generation_batch_size holds, which counts the completions of all processes."""
    completions, processes = int(settings.get("generation_batch_size") or 0), settings.get("num_processes")
    if completions and not processes:
        notes.append("generation_batch_size is read for one process, and counts those of all there")
    return completions // (size * int(processes or 1))


def _batch(group: int) -> dict[str, Rule]:
    usual = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_generations": group}
    note = "here it counts prompts, there completions"

    def size(value: Any, settings: Settings) -> Answer:
        made = prompts(settings, usual)
        values = {
            "train.per_device_train_batch_size": made.size,
            "train.gradient_accumulation_steps": made.accumulation,
        }
        if made.steps > 1:
            values["STAGE.mini_batches"] = made.steps
        return put(values, "; ".join([note, *made.notes]))

    def evaluated(value: Any, settings: Settings) -> Answer:
        each = int(settings.get("num_generations") or group)
        return put({"train.per_device_eval_batch_size": max(1, int(value) // each)}, note)

    rule = By(size, "train.per_device_train_batch_size", "train.gradient_accumulation_steps", "STAGE.mini_batches")

    def generations(value: Any, settings: Settings) -> Answer:
        if any(settings.get(key) for key in keys):  # whose rule says so
            return put({"STAGE.num_generations": value})
        batch = size(value, settings)
        notes = prompts(settings, usual).notes
        return put({"STAGE.num_generations": value, **batch.put}, batch.note if notes else "")

    keys = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "steps_per_generation",
        "generation_batch_size",
    )
    table: dict[str, Rule] = dict.fromkeys(keys, rule)
    return table | {
        "num_generations": By(generations, "STAGE.num_generations", *rule.targets),
        "per_device_eval_batch_size": By(evaluated, "train.per_device_eval_batch_size"),
    }


def _completion_length(value: Any, settings: Settings) -> Answer:
    room = int(settings.get("max_prompt_length") or PROMPT_ROOM)
    values = {"STAGE.max_completion_length": value}
    if value + room > 2048 or settings.get("max_prompt_length"):
        values["data.max_length"] = value + room
    return put(values, "data.max_length holds prompt and completion" if len(values) > 1 else "")


def _or_none(key: str) -> By:
    return By(lambda value, settings: put({key: value}) if value else NOTHING, key)


_VLLM = "generation.engine names an installed engine; the builtin one writes the completions"
RL: dict[str, Rule] = {
    **COMMON,
    "beta": "STAGE.beta",
    "disable_dropout": "train.disable_dropout",
    "num_generations": "STAGE.num_generations",
    "max_completion_length": By(_completion_length, "STAGE.max_completion_length", "data.max_length"),
    "max_prompt_length": Done(
        "data.max_length holds prompt and completion; a prompt without room is left out, not cut"
    ),
    "temperature": "STAGE.temperature",
    "top_p": "STAGE.top_p",
    "top_k": "STAGE.top_k",
    "min_p": _or_none("STAGE.min_p"),
    "repetition_penalty": "STAGE.repetition_penalty",
    "num_iterations": "STAGE.num_iterations",
    "epsilon": "STAGE.epsilon",
    "mask_truncated_completions": "STAGE.mask_truncated_completions",
    "reward_funcs": By(rewards, "STAGE.rewards"),
    "reward_model_name_or_path": By(rewards, "STAGE.rewards"),
    "reward_weights": Done("weight: beside each of the rewards"),
    "shuffle_dataset": Leave("prompts come in an order drawn from the seed", (True,)),
    "log_completions": Done("four completions are shown at each line of the log, and written to samples.jsonl"),
    "use_transformers_paged": Leave("the builtin engine writes completions packed"),
    **left(_VLLM, "use_vllm"),
    **left(
        "a key of vLLM's or of another way to write completions: generation.options, for an installed engine",
        "vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex",
        "vllm_guided_decoding_regex vllm_server_base_url vllm_server_host vllm_server_port",
        "vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length",
        "vllm_max_model_len vllm_device vllm_dtype vllm_enable_prefix_caching vllm_tensor_parallel_size",
        "use_transformers_continuous_batching transformers_continuous_batching_config cache_implementation",
        "generation_kwargs ds3_gather_for_generation",
    ),
    **left("an evaluation answers its prompts as training does", "num_generations_eval"),
    **left("nothing is handed to chat templates beside messages and tools", "chat_template_kwargs"),
    **left(
        "the reference does not move",
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
    ),
    **left(
        "four completions are shown at each line of the log",
        "num_completions_to_print log_unique_prompts wandb_log_unique_prompts log_multimodal",
        off=(False, True),
    ),
}


def _grpo_loss(value: Any, settings: Settings) -> Answer:
    if value == "vespo":
        return leave("vespo: no loss of grpo here; dapo is used")
    if settings.get("importance_sampling_level") == "sequence":
        if value == "grpo":
            return put({"STAGE.loss": "gspo"}, "grpo with ratios of whole completions is gspo here")
        if value != "luspo":
            return put({"STAGE.loss": value}, "with ratios of tokens; those of completions are gspo's and luspo's")
    return put({"STAGE.loss": value})


def _level(value: Any, settings: Settings) -> Answer:
    if value == "token":
        return NOTHING
    if settings.get("loss_type") in ("grpo", "luspo"):
        return put({}, "gspo and luspo limit the ratios of whole completions")
    return leave("ratios of whole completions are those of grpo.loss gspo and luspo")


def _clipped(key: str, *others: str) -> By:
    def rule(value: Any, settings: Settings) -> Answer:
        loss = settings.get("loss_type")
        return leave(f"the loss {loss} does not use it here") if loss in others else put({key: value})

    return By(rule, key)


def _kl(value: Any, settings: Settings) -> Answer:
    if not value or not settings.get("beta"):
        return NOTHING
    return put({"STAGE.kl_correction": True}, "by the ratio of each token; there by that of the completion in gspo")


def _grpo_beta(value: Any, settings: Settings) -> Answer:
    corrected = bool(value) and settings.get("use_bias_correction_kl") is not False
    if not corrected:
        return put({"STAGE.beta": value})
    note = "with kl_correction, since use_bias_correction_kl is on there unless told otherwise"
    return put({"STAGE.beta": value, "STAGE.kl_correction": True}, note)


def _of_sapo(key: str) -> By:
    def rule(value: Any, settings: Settings) -> Answer:
        used = settings.get("loss_type") == "sapo"
        return put({key: value}) if used else leave("it is used with loss_type: sapo alone, there too")

    return By(rule, key)


def _scale(value: Any) -> str:
    return {"True": "group", "False": "none"}.get(str(value), str(value))


GRPO: dict[str, Rule] = {
    **RL,
    **_batch(8),
    "beta": By(_grpo_beta, "STAGE.beta", "STAGE.kl_correction"),
    "use_bias_correction_kl": By(_kl, "STAGE.kl_correction"),
    "loss_type": By(_grpo_loss, "STAGE.loss"),
    "importance_sampling_level": By(_level),
    "epsilon": _clipped("STAGE.epsilon", "cispo", "sapo"),
    "epsilon_high": _clipped("STAGE.epsilon_high", "sapo"),
    "delta": _clipped("STAGE.delta", "cispo", "sapo"),
    "sapo_temperature_pos": _of_sapo("STAGE.sapo_temperature_pos"),
    "sapo_temperature_neg": _of_sapo("STAGE.sapo_temperature_neg"),
    "scale_rewards": To("STAGE.scale_rewards", _scale),
    "entropy_coef": "STAGE.entropy_coef",
    "cast_lm_head_to_fp32": Done("log-probs are computed in float32"),
    **left(
        "the loss vespo is not there",
        "vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg",
    ),
    **left(
        "rewards are added up, and their sum is normalised", "multi_objective_aggregation", off=("sum_then_normalize",)
    ),
    **left("every token counts", "top_entropy_quantile", off=(1.0,)),
    **left(
        "grpo.entropy_coef is one number for the whole run",
        "use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target",
    ),
    **left(
        "log-probs at sampling and at scoring are compared and reported; the loss takes those of scoring",
        "vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max",
        "vllm_importance_sampling_clip_min vllm_importance_sampling_cap",
    ),
    **left("completions are learnt from in the round in which they are written", "off_policy_mask_threshold"),
    **left("completions are written in one turn", "max_tool_calling_iterations"),
    **left("nothing is sent to the hub", "log_completions_hub_repo"),
}

RLOO: dict[str, Rule] = {
    **RL,
    **_batch(2),
    "normalize_advantages": "STAGE.normalize_advantages",
    **left("rloo.epsilon limits ratios on both sides", "epsilon_high"),
    **left("rewards are taken as they are", "reward_clip_range"),
}

# What stands where nothing is said

_SHARED = {key: value for key, value in DEFAULTS.items() if key != "train.bf16"} | {
    "train.gradient_checkpointing": True,
    "train.learning_rate": 1e-6,
    "peft.lora_dropout": 0.05,
    "model.bnb_4bit_use_double_quant": False,
}
DEFAULTS_OF: dict[str, dict[str, Any]] = {
    "sft": _SHARED | {"train.learning_rate": 2e-5, "data.max_length": 1024},
    "pairs": _SHARED | {"data.max_length": 1024, "peft.lora_dropout": 0.0},
    "reward": _SHARED | {"data.max_length": 1024, "peft.lora_dropout": 0.0, "train.learning_rate": 1e-4},
    "grpo": _SHARED
    | {"STAGE.max_completion_length": 512, "train.disable_dropout": False, "train.per_device_train_batch_size": 1},
    "rloo": _SHARED
    | {
        "STAGE.max_completion_length": 512,
        "train.disable_dropout": False,
        "STAGE.num_generations": 2,
        "train.per_device_train_batch_size": 4,
    },
}


def remarks(settings: Settings) -> list[str]:
    """Say what peft takes where no modules are named."""
    if not settings.get("use_peft") or settings.get("lora_target_modules"):
        return []
    return [
        "lora_target_modules is not given: there peft adapts the layers that it lists for the architecture (often "
        "q_proj and v_proj), here all linear layers are adapted (peft.target_modules)"
    ]


def _remarks_of_sft(settings: Settings) -> list[str]:
    told = remarks(settings)
    if not settings.get("assistant_only_loss"):
        told.append(
            "assistant_only_loss is not set: of dialogues TRL learns every token, a run what the assistant says "
            "(data.loss_on: everything is TRL's). Rows of plain text are for the stage pt: give dataset_text_field"
        )
    return told


def _remarks_of_texts(settings: Settings) -> list[str]:
    told = remarks(settings)
    return told if "packing" in settings else [*told, f"packing is not set: {ROWS_AS_TEXTS}"]


METHODS = {
    "sft": Method("sft", SFT, DEFAULTS_OF["sft"], _remarks_of_sft),
    "sft, dataset_text_field": Method("pt", TEXTS, DEFAULTS_OF["sft"], _remarks_of_texts),
    "dpo": Method("dpo", DPO, DEFAULTS_OF["pairs"], remarks),
    "dpo, loss_type: ipo": Method("ipo", IPO, DEFAULTS_OF["pairs"], remarks),
    "kto": Method("kto", KTO, DEFAULTS_OF["pairs"], remarks),
    "reward": Method("rm", REWARD, DEFAULTS_OF["reward"], remarks),
    "grpo": Method("grpo", GRPO, DEFAULTS_OF["grpo"], remarks),
    "rloo": Method("rloo", RLOO, DEFAULTS_OF["rloo"], remarks),
    "cpo": Method("cpo", CPO, DEFAULTS_OF["pairs"], remarks),
    "cpo, loss_type: simpo": Method(
        "simpo", SIMPO, DEFAULTS_OF["pairs"] | {"STAGE.beta": 0.1, "STAGE.gamma": 0.5, "STAGE.nll_alpha": 1.0}
    ),
    "orpo": Method("orpo", ORPO, DEFAULTS_OF["pairs"] | {"STAGE.nll_on": "all"}),
}
NAMES = tuple(name for name in METHODS if "," not in name)
_ALIASES = {"rm": "reward", "reward_modeling": "reward", "ipo": "dpo", "simpo": "cpo"}


def choose(settings: Settings, method: str | None) -> str:
    """Return the method. A file of TRL's does not say it: it is the one that knows all keys, if there is one."""
    name = _ALIASES.get(method or "", method)
    if name is None:
        fitting = [name for name in NAMES if all(key in METHODS[name].table for key in settings)]
        if len(fitting) != 1:
            raise ConfigurationError(
                "a file of TRL's does not say the method, and these keys fit several. Say which: "
                f"--method {'|'.join(fitting or NAMES)}"
            )
        name = fitting[0]
    if name not in NAMES:
        raise ConfigurationError(
            f"there is no stage for TRL's {name!r}; there is one for {', '.join(NAMES)}.{suggest(name, NAMES)}"
        )
    if name == "sft" and settings.get("dataset_text_field"):
        return "sft, dataset_text_field"
    losses = as_list(settings.get("loss_type") or [])
    special = f"{name}, loss_type: {losses[0]}" if len(losses) == 1 else ""
    return special if special in METHODS else name


def prepare(settings: Settings) -> Settings:
    """Tell `max_length: null`, which takes a limit away, from keys without a value, which say nothing."""
    return {**settings, "max_length": NO_LIMIT} if settings.get("max_length", NO_LIMIT) is None else settings


PEER = Peer("trl", "TRL", "1.16", METHODS, choose, prepare)
