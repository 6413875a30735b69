"""LLaMA-Factory's keys, and its list of data sets, `dataset_info.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtk import ConfigurationError
from llmtk.config.problems import shown
from llmtk_convert.rules import (
    NOTHING,
    Answer,
    By,
    Done,
    Method,
    Peer,
    Rule,
    Settings,
    To,
    apply,
    as_list,
    done,
    joined,
    leave,
    left,
    put,
)
from llmtk_convert.training_arguments import DEFAULTS, LIGER, TRAINING_ARGUMENTS, evaluates, strategy
from llmtk_convert.trl import revision, targets, uncut

# Data sets

_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_SHARED_COLUMNS = ("system", "tools", "history", "chosen", "rejected")
_TURNS = (("from", "value"), ("role", "content"))
"""What the keys of a turn may be called: who speaks, and what."""
_USUAL_TAGS = {
    "user_tag": ("user", "human"),
    "assistant_tag": ("assistant", "gpt"),
    "system_tag": ("system",),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call",),
}
"""Names of those who speak that our formats know."""


def source(entry: Mapping[str, Any], folder: Path, *, texts: bool = False) -> tuple[dict[str, Any], list[str]]:
    """Return an entry of dataset_info.json as a source of ours, and what of it has no place there.

    With `texts` the column of the prompt is a document to pretrain on.
    """
    lost = [key for key in ("num_samples", "folder") if entry.get(key)]
    hub = entry.get("hf_hub_url")
    if hub:
        found: dict[str, Any] = {"path": hub, "name": entry.get("subset"), "split": entry.get("split", "train")}
    elif "file_name" in entry:
        found = {"path": str(folder / str(entry["file_name"]))}
        lost += [f"{part}: {why}" for part, why in uncut(found["path"], entry.get("split"))]
    else:
        where = next((key for key in _PLACES if key in entry), "")
        found = {"path": str(entry.get(where, ""))}
        lost.append(f"{where}: give a file or a data set of the Hugging Face hub as path")
    columns, unknown = _columns(entry)
    if texts:
        columns = {old: "text" for old, new in columns.items() if new == "instruction"}
    found["columns"] = {old: new for old, new in columns.items() if old != new} or None
    return {key: value for key, value in found.items() if value is not None}, lost + unknown


def _columns(entry: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Return columns of the data by our names, and columns and tags that we have no names for."""
    given, tags = dict(entry.get("columns") or {}), dict(entry.get("tags") or {})
    spoken = entry.get("formatting") in ("sharegpt", "openai")
    roles = (tags.pop("role_tag", "from"), tags.pop("content_tag", "value"))
    messages = "messages" if entry.get("formatting") == "openai" or roles == ("role", "content") else "conversations"
    turns = [] if roles in _TURNS else [f"tags.role_tag, tags.content_tag ({roles[0]}, {roles[1]})"]
    names = {"messages": messages} if spoken else dict(_ALPACA)
    if "kto_tag" in given and not spoken:
        names = {"prompt": "prompt", "response": "completion"}
    names |= {name: name for name in _SHARED_COLUMNS} | {"kto_tag": "label"}
    usual = {"messages": "conversations"} if spoken else {}
    columns = {str(old): names[name] for name, old in (usual | given).items() if name in names and old}
    unknown = [f"columns.{name}" for name in given if name not in names]
    odd = [f"tags.{name}" for name, value in tags.items() if value not in _USUAL_TAGS.get(name, ())]
    return columns, unknown + turns + odd


_PLACES = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
"""Keys of an entry that say where its rows are."""


def is_catalog(settings: Settings) -> bool:
    """Tell whether a file is a list of data sets, dataset_info.json, of which some entries may be dead."""
    return any(_names_data(entry) for entry in settings.values())


def _names_data(entry: Any) -> bool:
    return isinstance(entry, Mapping) and any(key in entry for key in _PLACES)


def _entry(name: str, entry: Any, folder: Path, *, texts: bool | None = None) -> tuple[dict[str, Any], list[str]]:
    """Return an entry as a source, by default of texts where the prompt is its only column.

    Raises ConfigurationError where it has values that LLaMA-Factory does not take.
    """
    try:
        only_prompts = set(entry.get("columns") or {}) == {"prompt"}
        return source(entry, folder, texts=only_prompts if texts is None else texts)
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigurationError(f"the data set {name}: LLaMA-Factory takes no such entry: {shown(entry)}") from error


def catalog(settings: Settings, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a whole dataset_info.json as a catalog, and what each entry could not take along.

    `folder` is where its files lie, seen from the catalog's folder.
    """
    made: dict[str, Any] = {}
    lost: dict[str, str] = {}
    for name, entry in settings.items():
        if not _names_data(entry):
            lost[name] = f"names no data: give {', '.join(_PLACES)}"
            continue
        found, missing = _entry(name, entry, folder)
        made[name] = found["path"] if len(found) == 1 else found
        if missing:
            lost[name] = ", ".join(missing)
    return made, lost


def _evaluation_keys(settings: Settings) -> list[str]:
    """Return our keys for the rows of evaluation: with do_predict they are those that are answered, too."""
    if not settings.get("do_predict"):
        return ["data.eval"]
    return ["data.eval", "data.test"] if settings.get("do_eval") or evaluates(settings) else ["data.test"]


def _evaluation_sets(value: Any, settings: Settings) -> Answer:
    answer = apply(_sets("data.eval"), value, settings)
    if not answer.carried or not settings.get("do_predict"):
        return answer
    rows = dict.fromkeys(_evaluation_keys(settings), answer.put["data.eval"])
    catalog_file = {key: path for key, path in answer.put.items() if key == "data.catalog"}
    return put({**rows, **catalog_file}, f"{answer.note}; train.do_predict answers the rows of data.test".lstrip("; "))


def _sets(key: str) -> By:
    def rule(value: Any, settings: Settings) -> Answer:
        folder = Path(str(settings.get("dataset_dir", "data")))
        names, file = as_list(value), folder / "dataset_info.json"
        if str(folder) == "ONLINE":
            return put({key: [{"path": name, "split": "train"} for name in names]})
        try:
            info = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            note = f"{file} is not here; llmtk convert {file} --output sets.yaml makes the catalog from it"
            return put({key: names, "data.catalog": "sets.yaml"}, note)
        if missing := [name for name in names if name not in info]:
            return leave(f"{file} has no data set {', '.join(missing)}")
        found = [_entry(name, info[name], folder, texts=settings.get("stage") == "pt") for name in names]
        lost = [f"{name}: {', '.join(more)}" for name, (_, more) in zip(names, found, strict=True) if more]
        note = f"as {file} has them" + (f", but without {'; '.join(lost)}" if lost else "")
        sources = [entry["path"] if len(entry) == 1 else entry for entry, _ in found]
        return put({key: sources[0] if len(sources) == 1 else sources}, note)

    return By(rule, key, "data.catalog")


# Other keys


def _trains(value: Any, settings: Settings) -> Answer:
    return NOTHING if value else put({"train.do_train": False})


def _evaluates(value: Any, settings: Settings) -> Answer:
    """Evaluate, also where no strategy says when: there once, after training."""
    if evaluates(settings):
        return NOTHING
    if not value:
        return put({"train.eval_strategy": "no"})
    trains = settings.get("do_train")
    return put(
        {"train.eval_strategy": "epoch"}, "at each epoch's end; there once, when training is over" if trains else ""
    )


def _eval_strategy(value: Any, settings: Settings) -> Answer:
    if not evaluates(settings) and settings.get("do_eval"):
        return NOTHING
    return apply(strategy("eval"), value, settings)


def _continues(settings: Settings) -> bool:
    """Whether an adapter is trained on, which brings its own settings."""
    paths = settings.get("adapter_name_or_path")
    return bool(paths) and len(as_list(paths)) == 1 and not settings.get("create_new_adapter")


def _no_adapter(settings: Settings) -> str:
    """Return why an adapter's keys say nothing, if so."""
    if settings.get("finetuning_type", "lora") != "lora":
        return "it is used with finetuning_type: lora alone"
    return "the adapter is trained on as it is" if _continues(settings) else ""


def _adapter(key: str, value: Any = lambda value: value) -> By:
    def rule(given: Any, settings: Settings) -> Answer:
        why = _no_adapter(settings)
        return leave(why) if why else put({key: value(given)})

    return By(rule, key)


def _rank(value: Any, settings: Settings) -> Answer:
    if why := _no_adapter(settings):
        return leave(why)
    alpha = settings.get("lora_alpha") or (2 * value if isinstance(value, int) else None)
    return put({"peft.r": value} | ({} if alpha is None else {"peft.lora_alpha": alpha}))


def _kept_dropout(value: Any, settings: Settings) -> Answer:
    if not value or (why := _no_adapter(settings)):
        return leave(why) if value else NOTHING
    return put({"peft.lora_dropout": value, "train.disable_dropout": False}, "with all dropout on, as there")


def _kind(value: Any, settings: Settings) -> Answer:
    if value == "lora":
        return NOTHING if _continues(settings) else put({"peft.method": "lora"})
    if value == "full":
        return NOTHING
    if value == "freeze":
        layers = int(settings.get("freeze_trainable_layers", 2))
        if layers > 0:
            return put({"model.train_only": layers}, "the last layers, whole")
        return leave("the first layers alone: name them in model.train_only ([layers.0, layers.1])")
    return leave(f"{value}: adapters are LoRA's. As it stands all weights are trained; peft: {{}} trains an adapter")


def _frozen(value: Any, settings: Settings) -> Answer:
    if settings.get("finetuning_type") != "freeze":
        return leave("it is used with finetuning_type: freeze alone")
    return Answer(note="model.train_only")


def _adapter_path(value: Any, settings: Settings) -> Answer:
    if not _continues(settings):
        return leave("one adapter is trained on, on its base; merge the others first (llmtk export --merge)")
    return put({"model.name_or_path": str(as_list(value)[0])}, "an adapter's folder: it is trained on, on its base")


def _adapter_and_reference(value: Any, settings: Settings) -> Answer:
    """Train an adapter on, against its base: there the reference is the policy without its adapter."""
    answer = _adapter_path(value, settings)
    base = settings.get("model_name_or_path")
    if not answer.carried or not base or settings.get("ref_model"):
        return answer
    return put(
        {**answer.put, "model.reference": base},
        f"{answer.note}; the reference is the base without it, as there",
    )


def _model(value: Any, settings: Settings) -> Answer:
    return put({}, "the adapter names its base") if _continues(settings) else put({"model.name_or_path": value})


_ATTENTION = {"disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}


def _flash(value: Any, settings: Settings) -> Answer:
    name = _ATTENTION.get(str(value))
    return put({"model.attn_implementation": name}) if name else NOTHING


def _bits(value: Any, settings: Settings) -> Answer:
    method = str(settings.get("quantization_method", "bnb"))
    if method not in ("bnb", "bitsandbytes") or value not in (4, 8):
        return leave(f"{value} bits by {method}: weights are quantised by bitsandbytes, to 4 or 8 bits")
    return put({"model.quantization": f"{value}bit"})


def _of_4bit(key: str) -> By:
    def rule(value: Any, settings: Settings) -> Answer:
        return put({key: value}) if settings.get("quantization_bit") == 4 else leave("it is used with 4 bits alone")

    return By(rule, key)


def _template(value: Any, settings: Settings) -> Answer:
    if value == "chatml":
        return put({"data.template": "chatml"})
    return leave(f"{value}: the tokenizer's own chat template is used; data.template takes a file, or chatml")


def _share(value: Any, settings: Settings) -> Answer:
    if 0 < value < 1:
        return put({"data.eval": float(value)})
    return leave("a number of rows; give data.eval a share (0.1) or a file") if value else NOTHING


def _early(value: Any, settings: Settings) -> Answer:
    return put(
        {"plugins.early-stopping.patience": value}, "counts evaluations; pip install llmtk-plugin-early-stopping"
    )


def _when(key: str, value: Any, note: str = "") -> By:
    return By(lambda given, settings: put({key: value}, note) if given else NOTHING, key)


_OPTIMIZER = "no optimizer of a run; train.optim lists those there are"
_WEIGHTS = "weight: beside a source says how often its rows come"
_IMAGES = "text alone is trained on"
_ENGINE = "llmtk predict and llmtk chat answer; the builtin engine writes"
_PACKED = (
    "rows are packed for computing, where that changes no result, and a batch still counts rows: give as many rows as "
    "a packed one holds (gradient_accumulation_steps)"
)

COMMON: dict[str, Rule] = {
    **TRAINING_ARGUMENTS,
    "stage": Done(),
    "do_train": By(_trains, "train.do_train"),
    "do_eval": By(_evaluates, "train.eval_strategy"),
    "eval_strategy": By(_eval_strategy, "train.eval_strategy"),
    "evaluation_strategy": By(_eval_strategy, "train.eval_strategy"),
    "do_predict": "train.do_predict",
    "model_name_or_path": By(_model, "model.name_or_path"),
    "adapter_name_or_path": By(_adapter_path, "model.name_or_path", "peft.method"),
    "create_new_adapter": Done("read with adapter_name_or_path"),
    "model_revision": By(revision, "model.revision"),
    "trust_remote_code": "model.trust_remote_code",
    "flash_attn": By(_flash, "model.attn_implementation"),
    "quantization_bit": By(_bits, "model.quantization"),
    "quantization_method": Done("read with quantization_bit"),
    "quantization_type": _of_4bit("model.bnb_4bit_quant_type"),
    "double_quantization": _of_4bit("model.bnb_4bit_use_double_quant"),
    "pure_bf16": By(
        lambda value, settings: put({"model.dtype": "bfloat16", "train.bf16": True}) if value else NOTHING,
        "model.dtype",
        "train.bf16",
    ),
    "bf16": By(lambda value, settings: put({"train.bf16": bool(value or settings.get("pure_bf16"))}), "train.bf16"),
    "disable_gradient_checkpointing": To("train.gradient_checkpointing", lambda value: not value),
    "use_reentrant_gc": Done("activations are computed anew without reentrance"),
    "finetuning_type": By(_kind, "peft.method", "model.train_only"),
    "freeze_trainable_layers": By(_frozen),
    "lora_rank": By(_rank, "peft.r", "peft.lora_alpha"),
    "lora_alpha": _adapter("peft.lora_alpha"),
    "lora_dropout": _adapter("peft.lora_dropout"),
    "lora_target": _adapter("peft.target_modules", targets),
    "additional_target": _adapter("peft.modules_to_save", as_list),
    "use_rslora": _adapter("peft.use_rslora"),
    "use_dora": _adapter("peft.use_dora"),
    "use_muon": _when("train.optim", "muon"),
    "dataset": _sets("data.train"),
    "eval_dataset": By(_evaluation_sets, "data.eval", "data.test", "data.catalog"),
    "dataset_dir": Done("read with dataset"),
    "cutoff_len": "data.max_length",
    "val_size": By(_share, "data.eval"),
    "template": By(_template, "data.template"),
    "streaming": "data.streaming",
    "preprocessing_num_workers": To("data.num_proc", note="processes in which dialogues are put through the template"),
    "early_stopping_steps": By(_early, "plugins.early-stopping.patience"),
    "plot_loss": Done("every run draws its loss, into loss.png"),
    "compute_accuracy": Done("accuracies are among the metrics of an evaluation"),
    **done(
        "needs no key here, and changes nothing that is trained",
        "overwrite_cache preprocessing_batch_size data_shared_file_system low_cpu_mem_usage",
        "use_fast_tokenizer print_param_status ignore_pad_token_for_loss include_effective_tokens_per_second",
        "offload_folder use_kv_cache sortish_sampler buffer_size adapter_folder",
    ),
    **left("all rows are trained on; cut the file", "max_samples"),
    **left(_WEIGHTS, "mix_strategy", "interleave_probs", off=("concat",)),
    **left("the sources of an evaluation are evaluated together", "eval_on_each_dataset"),
    **left(
        _PACKED,
        "packing neat_packing block_diag_attn",
    ),
    **left(
        "the tokenizer's chat template says how",
        "tool_format default_system enable_thinking preserve_thinking",
        off=(True, False),
    ),
    **left("tokens are kept on disk by themselves, under a hash of what they follow from", "tokenized_path"),
    **left("rows come in an order drawn from the seed", "disable_shuffling"),
    **left(
        "all modules of the last layers are trained; model.train_only takes names",
        "freeze_trainable_modules",
        "freeze_extra_modules",
        off=("all",),
    ),
    **left("one learning rate for all of an adapter", "loraplus_lr_ratio", "loraplus_lr_embedding"),
    **left(
        "an adapter begins as nothing: peft.init_lora_weights is true or gaussian",
        "pissa_init pissa_iter pissa_convert",
    ),
    **left(
        "adapters are LoRA's",
        "module_dropout oft_rank oft_block_size oft_target use_llama_pro",
    ),
    **left(
        _OPTIMIZER,
        "use_adam_mini use_galore galore_target galore_rank galore_update_interval galore_scale",
        "galore_proj_type galore_layerwise use_apollo apollo_target apollo_rank apollo_update_interval",
        "apollo_scale apollo_proj apollo_proj_type apollo_scale_type apollo_layerwise apollo_scale_front",
        "use_badam badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio",
        "badam_mask_mode badam_verbose",
    ),
    **left(
        "train.report_to names trackers; their settings stand in environment variables",
        "use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key",
        "swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret",
    ),
    **left(
        "one trainer, in PyTorch; fsdp or deepspeed shards the model",
        "use_mca use_hyper_parallel hyper_parallel_args use_kt kt_weight_path kt_expert_checkpoint_path",
        "kt_use_lora_experts kt_lora_expert_num kt_lora_expert_intermediate_size",
    ),
    **left(
        "sft.loss is nll or dft",
        "use_asft_loss asft_alpha use_eaft_loss eaft_alpha",
    ),
    **left(
        _IMAGES,
        "freeze_vision_tower freeze_multi_modal_projector freeze_language_model media_dir image_max_pixels",
        "image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels video_min_pixels video_fps",
        "video_maxlen use_audio_in_video audio_sampling_rate",
    ),
    **left(
        "a model is trained as it is saved",
        "rope_scaling shift_attn mixture_of_depths resize_vocab split_special_tokens add_tokens",
        "add_special_tokens new_special_tokens_config init_special_tokens model_max_length",
    ),
    **left("model.from_config makes a model from scratch, by transformers' own fields", "train_from_scratch"),
    **left(
        "faster kernels are not used",
        "use_unsloth use_unsloth_gc use_v1_kernels",
    ),
    **left(LIGER, "enable_liger_kernel"),
    **left("the router's loss is added with the coefficient of the model's configuration", "moe_aux_loss_coef"),
    **left(
        "what is computed in which type follows train.bf16 and model.dtype",
        "upcast_layernorm upcast_lmhead_output compute_dtype fp8 fp8_backend",
        "fp8_enable_fsdp_float8_all_gather",
        off=(False, "auto"),
    ),
    **left("a run places its models", "device_map", "quantization_device_map"),
    **left(
        "HF_TOKEN, HF_HOME and their like are environment variables",
        "hf_hub_token ms_hub_token om_hub_token cache_dir",
    ),
    **left(
        _ENGINE,
        "infer_backend infer_dtype vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank",
        "vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend",
        "eval_num_beams num_beams length_penalty do_sample skip_special_tokens predict_with_generate",
        "generation_max_length generation_num_beams generation_config max_new_tokens temperature top_p top_k",
        "repetition_penalty max_length",
    ),
    **left(
        "llmtk export writes a finished run's model for others",
        "export_dir export_size export_device export_quantization_bit export_quantization_dataset",
        "export_quantization_nsamples export_quantization_maxlen export_legacy_format export_hub_model_id",
    ),
    **left(
        "llmtk launch starts several processes",
        "ray_num_workers ray_init_kwargs ray_run_name ray_storage_path ray_storage_filesystem",
        "resources_per_worker placement_strategy master_addr master_port",
    ),
    **left(
        "python's own profilers take a run as any program",
        "enable_torch_profiler profiler_output_dir profiler_wait_steps profiler_warmup_steps",
        "profiler_active_steps profiler_repeat profiler_record_shapes profiler_profile_memory",
        "profiler_with_stack profile_modules",
    ),
}

_PT: dict[str, Rule] = {**COMMON, **joined("packing"), "neat_packing": Done()}


_PREDICTED = {
    "predict.max_new_tokens": 1024,
    "predict.temperature": 0.95,
    "predict.top_p": 0.7,
    "predict.top_k": 50,
}


def _of_predicting(key: str) -> By:
    """Return the rule of a key that says how an answer is drawn, which counts with do_predict alone."""

    def rule(value: Any, settings: Settings) -> Answer:
        if not settings.get("do_predict"):
            return leave(_ENGINE)
        greedy = key == "predict.temperature" and settings.get("do_sample") is False
        return put({key: 0 if greedy else value})

    return By(rule, key)


def _sampled(value: Any, settings: Settings) -> Answer:
    """Take the likeliest token where nothing is drawn."""
    if not settings.get("do_predict"):
        return leave(_ENGINE) if value else NOTHING
    return put({"predict.temperature": settings.get("temperature", _PREDICTED["predict.temperature"]) if value else 0})


_SFT: dict[str, Rule] = {
    **COMMON,
    **{
        name: _of_predicting(f"predict.{name}")
        for name in ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty")
    },
    "do_sample": By(_sampled, "predict.temperature"),
    "predict_with_generate": By(
        lambda value, settings: NOTHING if settings.get("do_predict") or not value else leave(_ENGINE)
    ),
    "train_on_prompt": _when("data.loss_on", "everything"),
    "mask_history": _when("data.loss_on", "last_turn"),
    "use_dft_loss": _when("STAGE.loss", "dft"),
}
_NO_DROPOUT = By(lambda value, settings: leave("dropout is off for preferences there too") if value else NOTHING)
_POLICY_ADAPTER = By(_adapter_and_reference, "model.name_or_path", "peft.method", "model.reference")
_REFERENCE: dict[str, Rule] = {
    "ref_model": "model.reference",
    "adapter_name_or_path": _POLICY_ADAPTER,
    **left(
        "the reference is the policy as the run starts, or model.reference",
        "ref_model_adapters",
        "ref_model_quantization_bit",
    ),
}
_PAIRS: dict[str, Rule] = {
    **COMMON,
    "pref_loss": Done(),
    "pref_beta": "STAGE.beta",
    "lora_dropout": _NO_DROPOUT,
    **left("BCO's term is not added to another loss", "pref_bco_weight"),
}


def _ftx(value: Any, settings: Settings) -> Answer:
    note = "here a mean over the tokens of all chosen answers, there over answers"
    return put({"STAGE.rpo_alpha": value}, note) if value else NOTHING


_DPO: dict[str, Rule] = {
    **_PAIRS,
    **_REFERENCE,
    "pref_loss": "STAGE.loss",
    "pref_ftx": By(_ftx, "STAGE.rpo_alpha"),
    "dpo_label_smoothing": "STAGE.label_smoothing",
    "ld_alpha": "STAGE.ld_alpha",
}
_IPO: dict[str, Rule] = {**_PAIRS, **_REFERENCE, **left("ipo does not use it", "pref_ftx", "ld_alpha")}
_SIMPO: dict[str, Rule] = {
    **_PAIRS,
    "simpo_gamma": To("STAGE.gamma", note="the same margin of rewards, which is divided by beta there and not here"),
    **left("simpo.nll_alpha is the like of it", "pref_ftx"),
}
_ORPO: dict[str, Rule] = {**_PAIRS, **left("orpo fine-tunes on the chosen answers in any case", "pref_ftx")}
_KTO: dict[str, Rule] = {
    **COMMON,
    **_REFERENCE,
    "pref_beta": "STAGE.beta",
    "lora_dropout": _NO_DROPOUT,
    "kto_chosen_weight": "STAGE.desirable_weight",
    "kto_rejected_weight": "STAGE.undesirable_weight",
    **left("kto has no second term", "pref_ftx"),
}


def _length_with_answer(value: Any, settings: Settings) -> Answer:
    answer = int(settings.get("max_new_tokens") or 1024)
    return put({"data.max_length": value + answer}, "here prompt and completion, there the prompt alone")


_DROPOUT = By(_kept_dropout, "peft.lora_dropout", "train.disable_dropout")
_PPO: dict[str, Rule] = {
    **COMMON,
    "lora_dropout": _DROPOUT,
    "cutoff_len": By(_length_with_answer, "data.max_length"),
    "reward_model": By(
        lambda value, settings: put(
            {"STAGE.rewards": [{"model": str(path)} for path in as_list(value)]},
            "a reward model's folder, of a run of rm: one of LLaMA-Factory's has a head that is saved another way, "
            "train it anew with llmtk run rm",
        ),
        "STAGE.rewards",
    ),
    "max_new_tokens": "STAGE.max_completion_length",
    "temperature": "STAGE.temperature",
    "top_p": "STAGE.top_p",
    "top_k": "STAGE.top_k",
    "repetition_penalty": "STAGE.repetition_penalty",
    "ppo_epochs": "STAGE.num_iterations",
    "ppo_target": "STAGE.kl_target",
    "ppo_whiten_rewards": "STAGE.whiten_rewards",
    "ref_model": "model.reference",
    "adapter_name_or_path": _POLICY_ADAPTER,
    **left("scores are taken as they are", "ppo_score_norm"),
    **left(
        "a round is per_device_train_batch_size x gradient_accumulation_steps prompts on each rank; ppo.mini_batches "
        "cuts it into several steps",
        "ppo_buffer_size",
        off=(1,),
    ),
    **left(
        "a reward model's folder is read as transformers saves it",
        "reward_model_adapters reward_model_quantization_bit reward_model_type ref_model_adapters",
        "ref_model_quantization_bit",
        off=("full",),
    ),
}
_RM: dict[str, Rule] = {**COMMON, "lora_dropout": _DROPOUT}


def _remarks(settings: Settings) -> list[str]:
    if settings.get("do_train") is not None:
        return []
    return ["do_train is not given: there nothing is trained without it, here a run trains"]


_DEFAULTS = DEFAULTS | {
    "train.gradient_checkpointing": True,
    "peft.method": "lora",
    "peft.r": 8,
    "peft.lora_alpha": 16,
    "data.max_length": 2048,
}
METHODS = {
    "pt": Method("pt", _PT, _DEFAULTS, _remarks),
    "sft": Method("sft", _SFT, _DEFAULTS | _PREDICTED, _remarks),
    "rm": Method("rm", _RM, _DEFAULTS, _remarks),
    "dpo": Method("dpo", _DPO, _DEFAULTS, _remarks),
    "dpo, pref_loss: ipo": Method("ipo", _IPO, _DEFAULTS, _remarks),
    "dpo, pref_loss: orpo": Method("orpo", _ORPO, _DEFAULTS, _remarks),
    "dpo, pref_loss: simpo": Method("simpo", _SIMPO, _DEFAULTS | {"STAGE.beta": 0.1, "STAGE.gamma": 0.5}, _remarks),
    "kto": Method("kto", _KTO, _DEFAULTS, _remarks),
    "ppo": Method(
        "ppo",
        _PPO,
        _DEFAULTS
        | {
            "STAGE.kl_coef": 0.2,
            "STAGE.kl_control": "adaptive",
            "STAGE.temperature": 0.95,
            "STAGE.top_p": 0.7,
            "STAGE.top_k": 50,
            "STAGE.max_completion_length": 1024,
            "data.max_length": 3072,
        },
        _remarks,
    ),
}
NAMES = tuple(name for name in METHODS if "," not in name)


def prepare(settings: Settings) -> Settings:
    """Say do_train, which is off there unless told otherwise, where a file asks for something else alone."""
    others = any(settings.get(key) for key in ("do_eval", "do_predict"))
    return {**settings, "do_train": False} if others and settings.get("do_train") is None else settings


def _another_command(settings: Settings) -> str:
    """Say which command of ours does what a file asks for that is no training, if so."""
    model = settings.get("adapter_name_or_path") or settings.get("model_name_or_path") or "MODEL"
    if settings.get("stage") is None and settings.get("export_dir"):
        return f"it exports a model, and trains none: llmtk export RUN --merge --output {settings['export_dir']}"
    if settings.get("stage") is None and settings.get("infer_backend"):
        return f"it asks a model, and trains none: llmtk chat {model}, or llmtk predict {model} --data FILE"
    if settings.get("do_predict") and not settings.get("do_train"):
        return f"do_predict without do_train asks a model, and trains none: llmtk predict {model} --data FILE"
    return ""


def choose(settings: Settings, method: str | None) -> str:
    """Return the method that `stage` and `pref_loss` name. A file that trains nothing is another command's."""
    if command := _another_command(settings):
        raise ConfigurationError(command)
    name = str(method or settings.get("stage", "sft"))
    if name not in NAMES:
        raise ConfigurationError(
            f"there is no stage for LLaMA-Factory's stage {name!r}; there is one for {', '.join(NAMES)}"
        )
    loss = settings.get("pref_loss", "sigmoid")
    if name == "dpo" and loss == "kto_pair":
        raise ConfigurationError(
            "there is no stage for pref_loss: kto_pair; the stage kto takes labelled answers, and pairs as two of "
            "them: --method kto"
        )
    special = f"{name}, pref_loss: {loss}"
    return special if special in METHODS else name


PEER = Peer("llama-factory", "LLaMA-Factory", "0.9.5", METHODS, choose, prepare)
