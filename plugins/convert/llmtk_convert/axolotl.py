"""axolotl's keys. Those below `trl:` are TRL's own, and are read by its table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtk import ConfigurationError
from llmtk_convert import trl
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
    apply,
    as_list,
    done,
    leave,
    left,
    put,
    same,
    targets_of,
    together,
)
from llmtk_convert.training_arguments import DEEPSPEED, LIGER, mapping, optimizer, strategy
from llmtk_convert.trl import PROMPT_ROOM, attention, source, targets, uncut

# Data sets

_ASK = {"intel": "question", "icr": "input", "prompt_pairs": "prompt", "ultra": "prompt", "argilla": "instruction"}
"""The column that is the question, by the second word of a preference type: chatml.intel, llama3.icr."""
_BUILDERS = ("json", "csv", "parquet", "text")
"""Paths that say how data_files are read."""
Columns = dict[str, str | None]


def read_source(entry: Mapping[str, Any], method: Any = None) -> tuple[list[Any], list[str], list[tuple[str, str]]]:
    """Return an entry of `datasets` as sources of ours, what of it is different, and which of its keys are lost."""
    notes: list[str] = []
    columns = _columns(entry, method, notes)
    lost = _lost(entry)
    path, files = str(entry.get("path", "")), as_list(entry.get("data_files") or [])
    if files and path not in (*_BUILDERS, *files):
        notes.append(f"data_files of {path}: give them as paths")
    if path in _BUILDERS:
        found = [source(str(file)) for file in files]
        lost += [told for file in files for told in uncut(str(file), entry.get("split"))]
    else:
        lost += uncut(path, entry.get("split"))
        found = [source(path, entry.get("name"), entry.get("split"), entry.get("revision"))]
    more = sorted(key for key in entry if key not in _READ and entry[key] not in (None, "", False))
    notes += [f"without {', '.join(more)}"] if more else []
    return [_with(item, columns) for item in found], notes, lost


_READ = {
    "path", "name", "split", "revision", "type", "data_files", "ds_type", "field", "field_messages", "field_chosen",
    "field_rejected", "field_tools", "field_system", "message_property_mappings", "message_field_role",
    "message_field_content", "text_column", "roles", "chat_template", "trust_remote_code", "conversation",
}  # fmt: skip
"""Keys of an entry that are read here, or say what is so in any case."""
_KNOWN_TYPES = (
    "chat_template", "sharegpt", "completion", "pretrain", "alpaca", "chatml", "llama3", "zephyr", "bradley_terry",
)  # fmt: skip
_USUAL_ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system", "tool": "tool",
}  # fmt: skip
"""Names of those who speak, and whose turns they are."""


def _lost(entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the keys of an entry that ask for what a source cannot do, and why."""
    told: list[tuple[str, str]] = []
    kind = entry.get("type")
    if isinstance(kind, str) and kind.partition(".")[0] not in _KNOWN_TYPES:
        told.append(("type", f"{kind}: unknown here; say by columns what its columns are (docs: data)"))
    if entry.get("chat_template") not in (None, "", "tokenizer_default"):
        told.append(("chat_template", f"{entry['chat_template']}: one template for all rows, data.template"))
    roles = {str(name): ours for ours, names in (entry.get("roles") or {}).items() for name in as_list(names)}
    if unusual := [f"{name} ({ours})" for name, ours in roles.items() if _USUAL_ROLES.get(name) != ours]:
        told.append(("roles", f"{', '.join(unusual)}: rename them in the data to user, assistant, system or tool"))
    names = _names_of_turns(entry)
    if names not in (("role", "content"), ("from", "value")):
        told.append(
            ("message_property_mappings", f"{', '.join(names)}: a turn has role and content, or from and value")
        )
    return told


def _names_of_turns(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Return what the keys of a turn are called: who speaks, and what."""
    named = entry.get("message_property_mappings") or {}
    role = named.get("role") or entry.get("message_field_role")
    content = named.get("content") or entry.get("message_field_content")
    from_value = role == "from" or (role is None and _field(entry) == "conversations")
    usual = ("from", "value") if from_value else ("role", "content")
    return str(role or usual[0]), str(content or usual[1])


def _field(entry: Mapping[str, Any]) -> str:
    """Return the column of the turns."""
    return str(entry.get("field_messages") or ("conversations" if entry.get("type") == "sharegpt" else "messages"))


def _with(item: Any, columns: Columns) -> Any:
    renamed = {old: new for old, new in columns.items() if old != new}
    if not renamed:
        return item if isinstance(item, str) or len(item) > 1 else item["path"]
    return {**({"path": item} if isinstance(item, str) else item), "columns": renamed}


def _columns(entry: Mapping[str, Any], method: Any, notes: list[str]) -> Columns:
    """Return columns of the data by our names."""
    kind = entry.get("type")
    if isinstance(kind, Mapping):
        return _own_columns(kind, notes)
    name, _, variant = str(kind or "chat_template").partition(".")
    if name == "chat_template" or kind in ("sharegpt", "chatml.messages"):
        return _messages(entry, preferences=variant == "default" or "field_chosen" in entry)
    if name in ("completion", "pretrain"):
        return {str(entry.get("field") or entry.get("text_column") or "text"): "text"}
    if name == "alpaca":
        notes.append("alpaca: by the chat template, where there Alpaca's own words stand around the instruction")
        return {}
    if name in ("chatml", "llama3", "zephyr"):
        return _preferences(str(kind), method, notes)
    return {"input": "instruction"} if name == "bradley_terry" else {}


def _preferences(kind: str, method: Any, notes: list[str]) -> Columns:
    """Return the columns of a type such as chatml.intel, whose words stand around the question."""
    variant = kind.partition(".")[2]
    if method == "kto":
        notes.append(f"{kind}: prompt and completion as they stand; rows of messages go through the chat template")
        return {_ASK[variant]: "prompt"} if variant in _ASK else {}
    notes.append(f"{kind}: by the tokenizer's own chat template")
    if variant == "ultra":  # chosen and rejected are messages, and begin with the prompt
        return {"prompt": None}
    return {_ASK[variant]: "instruction"} if variant in _ASK else {}


def _messages(entry: Mapping[str, Any], *, preferences: bool) -> Columns:
    field = _field(entry)
    if preferences:
        answers: Columns = {str(entry.get(f"field_{name}") or name): name for name in ("chosen", "rejected")}
        return {field: "prompt", **answers}
    ours = "conversations" if _names_of_turns(entry)[0] == "from" else "messages"
    tools: Columns = {str(entry["field_tools"]): "tools"} if entry.get("field_tools") else {}
    system: Columns = {str(entry["field_system"]): "system"} if entry.get("field_system") else {}
    return {field: ours, **tools, **system}


_FIELDS = {
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "field_system": "system",
    "field_prompt": "instruction",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_completion": "completion",
    "field_label": "label",
}


def _own_columns(kind: Mapping[str, Any], notes: list[str]) -> Columns:
    if formats := sorted(key for key in kind if key not in _FIELDS and kind[key]):
        notes.append(f"without {', '.join(formats)}: the chat template renders the columns")
    fields = dict(_FIELDS) | ({"field_prompt": "prompt"} if kind.get("field_completion") else {})
    return {str(kind[key]): ours for key, ours in fields.items() if kind.get(key)}


def _sets(key: str) -> By:
    def rule(value: Any, settings: Settings) -> Answer:
        sources: list[Any] = []
        notes: list[str] = []
        lost: list[tuple[str, str]] = []
        for entry in as_list(value):
            one = entry if isinstance(entry, Mapping) else {"path": entry}
            found, told, without = read_source(one, settings.get("rl"))
            sources += found
            lost += without
            notes += [note for note in told if note not in notes]
        return put({key: sources[0] if len(sources) == 1 else sources}, "; ".join(notes), together(lost))

    return By(rule, key)


def _share(value: Any, settings: Settings) -> Answer:
    if not value:
        return NOTHING
    if settings.get("test_datasets"):
        return leave("test_datasets are evaluated")
    return put({"data.eval": float(value)}) if value < 1 else leave("a number of rows; give data.eval a share (0.1)")


# Other keys


def _no_adapter(settings: Settings) -> str:
    """Return why an adapter's keys say nothing, if so."""
    if settings.get("adapter") not in ("lora", "qlora"):
        return "without adapter: lora it does nothing"
    return "the adapter of lora_model_dir is trained on as it is" if settings.get("lora_model_dir") else ""


def _adapter(value: Any, settings: Settings) -> Answer:
    if value in ("lora", "qlora"):
        return NOTHING if settings.get("lora_model_dir") else put({"peft.method": "lora"})
    return leave(f"{value}: adapters are LoRA's. As it stands all weights are trained") if value else NOTHING


def _of_adapter(key: str, value: Any = lambda value: value) -> By:
    def rule(given: Any, settings: Settings) -> Answer:
        why = _no_adapter(settings)
        return leave(why) if why else put({key: value(given)})

    return By(rule, key)


def _dropout(value: Any, settings: Settings) -> Answer:
    if (settings.get("rl") not in (None, "grpo") or settings.get("reward_model")) and value:
        return leave("dropout is off for preferences, there too")
    return apply(_of_adapter("peft.lora_dropout"), value, settings) if value else NOTHING


def _modules(value: Any, settings: Settings) -> Answer:
    if settings.get("lora_target_linear"):
        return leave("lora_target_linear takes all linear layers")
    return apply(_of_adapter("peft.target_modules", targets), value, settings)


def _linear(value: Any, settings: Settings) -> Answer:
    return apply(_of_adapter("peft.target_modules", lambda _: "all-linear"), value, settings) if value else NOTHING


def _base(value: Any, settings: Settings) -> Answer:
    if settings.get("lora_model_dir"):
        return Answer(note="the adapter of lora_model_dir names its base")
    return put({"model.name_or_path": value})


def _bits(bits: str) -> By:
    return By(lambda value, s: put({"model.quantization": bits}) if value else NOTHING, "model.quantization")


def _uses(name: str) -> By:
    def rule(value: Any, settings: Settings) -> Answer:
        return put({"model.attn_implementation": name}) if value else NOTHING

    return By(rule, "model.attn_implementation")


def _bf16(value: Any, settings: Settings) -> Answer:
    if value == "auto":
        return NOTHING
    if value == "full":
        return put({"model.dtype": "bfloat16"}, "weights and what is computed, in bfloat16")
    return put({"train.bf16": bool(value)})


def _checkpointing(value: Any, settings: Settings) -> Answer:
    note = "" if isinstance(value, bool) else f"{value}: activations are not moved off the device"
    return put({"train.gradient_checkpointing": bool(value)}, note)


def _scheduler(value: Any, settings: Settings) -> Answer:
    if settings.get("cosine_min_lr_ratio"):
        return Answer(note="cosine_with_min_lr, by cosine_min_lr_ratio")
    if value in ("one_cycle", "rex", "jagged_restart"):
        return put({"train.lr_scheduler_type": "cosine"}, f"cosine; {value} is no schedule of transformers'")
    return put({"train.lr_scheduler_type": value})


def _floor(value: Any, settings: Settings) -> Answer:
    values = {"train.lr_scheduler_type": "cosine_with_min_lr", "train.lr_scheduler_kwargs": {"min_lr_rate": value}}
    return put(values) if value else NOTHING


def _warmup(value: Any, settings: Settings) -> Answer:
    return put({"train.warmup_ratio": value} if 0 < value < 1 else {"train.warmup_steps": int(value)})


def _ratio(value: Any, settings: Settings) -> Answer:
    if settings.get("warmup_steps") is not None:
        return leave("warmup_steps goes first, there too")
    return put({"train.warmup_ratio": value})


def _has_evaluation(settings: Settings) -> bool:
    return bool(settings.get("val_set_size") or settings.get("test_datasets"))


def _steps(kind: str) -> By:
    def rule(value: Any, settings: Settings) -> Answer:
        if not value:
            return NOTHING
        if float(value) < 1:
            return put({f"train.{kind}_strategy": "epoch"}, "each epoch; there a share of all steps, here a number")
        return put({f"train.{kind}_strategy": "steps", f"train.{kind}_steps": int(value)})

    return By(rule, f"train.{kind}_strategy", f"train.{kind}_steps")


def _strategy(kind: str) -> By:
    def rule(value: Any, settings: Settings) -> Answer:
        return NOTHING if settings.get(f"{kind}_steps") else strategy(kind)(value, settings)

    return By(rule, f"train.{kind}_strategy")


def _per_epoch(kind: str) -> By:
    def rule(value: Any, settings: Settings) -> Answer:
        if not value:
            return put({f"train.{kind}_strategy": "no"})
        if kind == "eval" and not _has_evaluation(settings):
            return Answer(note="there is no evaluation data")
        note = f"once an epoch, and not {value} times; {kind}_strategy: steps counts steps" if value != 1 else ""
        return put({f"train.{kind}_strategy": "epoch"}, note)

    return By(rule, f"train.{kind}_strategy")


_TRACKERS = {
    "use_wandb": "wandb",
    "wandb_project": "wandb",
    "use_mlflow": "mlflow",
    "use_tensorboard": "tensorboard",
    "use_comet": "comet_ml",
    "use_trackio": "trackio",
}


def _tracker(value: Any, settings: Settings) -> Answer:
    names = dict.fromkeys(name for key, name in _TRACKERS.items() if settings.get(key))
    note = "" if isinstance(value, bool) else "the project's name is an environment variable's (WANDB_PROJECT)"
    return put({"train.report_to": list(names)}, note) if value else NOTHING


def _fsdp(value: Any, settings: Settings) -> Answer:
    if not value:
        return NOTHING
    config = mapping(settings.get("fsdp_config")) or {}
    below = {str(key).removeprefix("fsdp_"): item for key, item in config.items()}
    values = {
        "fsdp.cpu_offload": bool(below.get("offload_params")) or "offload" in as_list(settings.get("fsdp") or []),
        "fsdp.reshard_after_forward": below.get("reshard_after_forward") in (None, True, "FULL_SHARD"),
    }
    return put(values, "PyTorch's FSDP2, layer by layer; of fsdp_config offloading and resharding alone")


def _template(value: Any, settings: Settings) -> Answer:
    if value == "tokenizer_default":
        return NOTHING
    if value == "chatml":
        return put({"data.template": "chatml"})
    return leave(f"{value}: the tokenizer's own chat template is used; data.template takes a file, or chatml")


def _compiles(value: Any, settings: Settings) -> Answer:
    return put({"train.torch_compile": bool(value)}, "where that is proven to give the same" if value == "auto" else "")


def _on_too_long(value: Any, settings: Settings) -> Answer:
    if value == "raise":
        return leave("raise: rows that are too long are cut or left out, counted and said")
    return put({"data.on_too_long": value})


def _sample(key: str) -> By:
    def rule(value: Any, settings: Settings) -> Answer:
        return put({key: value}) if settings.get("generate_samples") else NOTHING

    return By(rule, key)


def _samples(value: Any, settings: Settings) -> Answer:
    return put({"samples.count": settings.get("num_generation_samples") or 3}) if value else NOTHING


def _beta(value: Any, settings: Settings) -> Answer:
    if settings.get("trl.beta") is not None:
        return leave("trl.beta goes first, there too")
    return put({"STAGE.beta": value})


_PACKED = (
    "rows are packed for computing, where that changes no result, and a batch still counts rows: give as many rows as "
    "a packed one holds (gradient_accumulation_steps)"
)
_KERNELS = "other kernels are not used; log-probs never hold all logits at once"
_PARALLEL = "ranks hold copies of the model, or shards with fsdp or deepspeed"

COMMON: dict[str, Rule] = {
    "base_model": By(_base, "model.name_or_path"),
    "lora_model_dir": To("model.name_or_path", note="an adapter's folder: it is trained on, on its base"),
    "model_revision": "model.revision",
    "revision_of_model": "model.revision",
    "tokenizer_config": "model.tokenizer",
    "trust_remote_code": "model.trust_remote_code",
    "load_in_8bit": _bits("8bit"),
    "load_in_4bit": _bits("4bit"),
    "attn_implementation": By(attention, "model.attn_implementation"),
    "flash_attention": _uses("flash_attention_2"),
    "sdp_attention": _uses("sdpa"),
    "eager_attention": _uses("eager"),
    "flex_attention": _uses("flex_attention"),
    "rl": Done(),
    "datasets": _sets("data.train"),
    "pretraining_dataset": _sets("data.train"),
    "test_datasets": _sets("data.eval"),
    "val_set_size": By(_share, "data.eval"),
    "sequence_len": "data.max_length",
    "excess_length_strategy": By(_on_too_long, "data.on_too_long"),
    "streaming": "data.streaming",
    "dataset_processes": "data.num_proc",
    "dataset_num_proc": "data.num_proc",
    "train_on_inputs": By(lambda value, s: put({"data.loss_on": "everything"}) if value else NOTHING, "data.loss_on"),
    "chat_template": By(_template, "data.template"),
    "adapter": By(_adapter, "peft.method"),
    "lora_r": _of_adapter("peft.r"),
    "lora_alpha": _of_adapter("peft.lora_alpha"),
    "lora_dropout": By(_dropout, "peft.lora_dropout"),
    "lora_target_modules": By(_modules, "peft.target_modules"),
    "lora_target_linear": By(_linear, "peft.target_modules"),
    "lora_modules_to_save": _of_adapter("peft.modules_to_save", as_list),
    "peft_use_dora": _of_adapter("peft.use_dora"),
    "peft_use_rslora": _of_adapter("peft.use_rslora"),
    "peft_init_lora_weights": By(
        lambda value, s: (
            put({"peft.init_lora_weights": value})
            if value in (True, "gaussian")
            else leave(f"{value}: an adapter begins as nothing (true or gaussian)")
        ),
        "peft.init_lora_weights",
    ),
    "output_dir": "output_dir",
    "micro_batch_size": "train.per_device_train_batch_size",
    "eval_batch_size": "train.per_device_eval_batch_size",
    "learning_rate": To("train.learning_rate", float),
    "num_epochs": "train.num_train_epochs",
    "optimizer": By(optimizer, "train.optim"),
    "optim_args": "train.optim_args",
    "lr_scheduler": By(_scheduler, "train.lr_scheduler_type"),
    "lr_scheduler_kwargs": "train.lr_scheduler_kwargs",
    "cosine_min_lr_ratio": By(_floor, "train.lr_scheduler_type", "train.lr_scheduler_kwargs"),
    "warmup_steps": By(_warmup, "train.warmup_steps", "train.warmup_ratio"),
    "warmup_ratio": By(_ratio, "train.warmup_ratio"),
    "bf16": By(_bf16, "train.bf16", "model.dtype"),
    "fp16": To("train.fp16", bool),
    "bfloat16": By(lambda value, s: _bf16("full" if value else "auto", s), "model.dtype"),
    "float16": By(lambda value, s: put({"model.dtype": "float16"}) if value else NOTHING, "model.dtype"),
    "gradient_checkpointing": By(_checkpointing, "train.gradient_checkpointing"),
    "torch_compile": By(_compiles, "train.torch_compile"),
    "eval_steps": _steps("eval"),
    "save_steps": _steps("save"),
    "eval_strategy": _strategy("eval"),
    "evaluation_strategy": _strategy("eval"),
    "save_strategy": _strategy("save"),
    "evals_per_epoch": _per_epoch("eval"),
    "saves_per_epoch": _per_epoch("save"),
    "early_stopping_patience": By(
        lambda value, s: (
            put(
                {"plugins.early-stopping.patience": value},
                "counts evaluations; pip install llmtk-plugin-early-stopping",
            )
            if value
            else NOTHING
        ),
        "plugins.early-stopping.patience",
    ),
    "metric_for_best_model": To("train.metric_for_best_model", lambda value: str(value).removeprefix("eval_")),
    "wandb_name": "train.run_name",
    **dict.fromkeys(_TRACKERS, By(_tracker, "train.report_to")),
    "fsdp": By(_fsdp, "fsdp.cpu_offload", "fsdp.reshard_after_forward"),
    "fsdp_config": By(_fsdp, "fsdp.cpu_offload", "fsdp.reshard_after_forward"),
    "deepspeed": DEEPSPEED,
    "generate_samples": By(_samples, "samples.count"),
    "num_generation_samples": By(lambda value, s: NOTHING),
    "generation_max_new_tokens": _sample("samples.max_new_tokens"),
    "generation_temperature": _sample("samples.temperature"),
    **same(
        "train",
        "gradient_accumulation_steps max_steps weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm",
        "torch_compile_backend torch_compile_mode logging_steps save_total_limit load_best_model_at_end",
        "greater_is_better neftune_noise_alpha seed group_by_length dataloader_num_workers",
        "dataloader_pin_memory ddp_find_unused_parameters",
    ),
    "noisy_embedding_alpha": "train.neftune_noise_alpha",
    **done(
        "needs no key here, and changes nothing that is trained",
        "model_type type_of_model tokenizer_type processor_type tokenizer_use_fast strict base_model_config",
        "dataset_prepared_path skip_prepare_dataset dataset_keep_in_memory remove_unused_columns local_rank",
        "world_size ddp device debug save_safetensors include_tokens_per_second include_tkps gc_steps",
        "gc_collect_steps torch_empty_cache_steps is_preprocess preprocess_iterable total_num_tokens",
        "total_supervised_tokens sample_packing_eff_est axolotl_config_path is_falcon_derived_model",
        "is_llama_derived_model is_mistral_derived_model is_qwen_derived_model low_cpu_mem_usage",
        "pad_to_sequence_len pad_to_multiple_of gradient_checkpointing_kwargs dataloader_prefetch_factor",
        "shuffle_before_merging_datasets lora_on_cpu tokenizer_save_jinja_files",
        "do_causal_lm_eval hf_use_auth_token dpo_use_logits_to_keep push_dataset_to_hub save_first_step",
        "peft_autocast_adapter_dtype merge_lora merge_method trl vllm capabilities env_capabilities",
        "dataset_shard_num dataset_shard_idx num_dataset_shards_to_save eval_table_size eval_max_new_tokens",
        "dpo_generate_during_eval dpo_padding_free dpo_use_liger_kernel use_kernels",
        "experimental_skip_move_to_device generation_do_sample generation_prompt_ratio",
    ),
    **left(
        _PACKED,
        "sample_packing eval_sample_packing sample_packing_group_size sample_packing_bin_size",
        "sample_packing_sequentially sample_packing_mp_start_method multipack_real_batches batch_flattening",
        "pretrain_multipack_buffer_size pretrain_multipack_attn pretraining_sample_concatenation",
        "streaming_multipack_buffer_size max_packed_sequence_len",
    ),
    **left("rows come in an order drawn from the seed", "shuffle_merged_datasets", off=(True,)),
    **left("rows come in an order drawn from the seed; see llmtk-plugin-curriculum", "curriculum_sampling"),
    **left(
        "a checkpoint of another program cannot be gone on with",
        "resume_from_checkpoint",
        "auto_resume_from_checkpoints",
    ),
    **left(
        "the tokenizer's own are used; padding never takes a token that ends a text",
        "special_tokens eot_tokens default_system_message chat_template_kwargs",
    ),
    **left("chat templates stand in a file: data.template", "chat_template_jinja"),
    **left(
        "no tokens are added",
        "tokens added_tokens_overrides resize_token_embeddings_to_32x mean_resizing_embeddings",
        "shrink_embeddings fix_untrained_tokens tokenizer_legacy tokenizer_use_mistral_common",
    ),
    **left(
        _KERNELS,
        "xformers_attention flash_attn_cross_entropy flash_attn_fuse_mlp flash_optimum sage_attention",
        "gemma4_hybrid_attn_impl large_head_attention flash_attn_d512 sdpa_varlen fused_attn_kernel",
        "experts_implementation s2_attention flash_attn_rms_norm lora_mlp_kernel lora_qkv_kernel",
        "lora_o_kernel lora_embedding_kernel chunked_cross_entropy chunked_cross_entropy_num_chunks",
        "cut_cross_entropy tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp",
        "llama4_linearized_experts flex_attn_compile_kwargs torch_compile_options unsloth_lora_mlp",
        "unsloth_lora_qkv unsloth_lora_o unsloth_cross_entropy_loss",
    ),
    **left(
        LIGER,
        "liger_rope liger_rms_norm liger_rms_norm_gated liger_layer_norm liger_swiglu liger_glu_activation",
        "liger_cross_entropy liger_fused_linear_cross_entropy liger_use_token_scaling liger_kernel_impl",
    ),
    **left(
        "axolotl's plugins and their keys stay there; llmtk list-plugins lists those that act here",
        "plugins dense_mixer diffusion dsv4_bf16_all dsv4_fp4_grouped_mode dsv4_fp8_lora_kernel",
        "dsv4_fp8_nonexpert_mode dsv4_shared_mlp_lora_kernel expert_backend expert_parallel_backend",
        "expert_parallel_fallback_on_unsupported expert_parallel_num_nvl_bytes expert_parallel_num_rdma_bytes",
        "expert_parallel_size expert_parallel_token_capacity gemma4_fp8_nonexpert gemma4_nf4_nonexpert",
        "grokfast_alpha grokfast_lamb hatchery kd_alpha kd_beta kd_ce_alpha kd_normalize_topk kd_online_server",
        "kd_online_server_base_url kd_online_timeout kd_online_topk kd_temperature kd_temperature_min kd_trainer",
        "llmcompressor lm_eval_batch_size lm_eval_model lm_eval_post_train lm_eval_tasks moe_bnb_fast",
        "moe_dequant_chunk_size moe_grouped_backend mora nemo_gym_auto_clone nemo_gym_auto_start",
        "nemo_gym_config_paths nemo_gym_datasets nemo_gym_dir nemo_gym_enabled nemo_gym_head_port",
        "nemo_gym_max_turns nemo_gym_model_name nemo_gym_multi_turn nemo_gym_run_timeout nemo_gym_server_timeout",
        "nemo_gym_verify_timeout nonexpert_quantization nvfp4_merge_aware nvfp4_merge_aware_start_step",
        "spectrum_model_name spectrum_top_fraction use_dsv4_kernels use_glm_dsa_kernels use_scattermoe use_sonicmoe",
        "swanlab_project swanlab_experiment_name swanlab_description swanlab_mode swanlab_workspace use_swanlab",
    ),
    **left("DeepSpeed compiles nothing; train.torch_compile is torch's own", "deepcompile"),
    **left(
        _PARALLEL,
        "dp_shard_size dp_replicate_size sequence_parallel_degree context_parallel_size heads_k_stride",
        "ring_attn_func tensor_parallel_size qlora_sharded_model_loading",
        off=(0, 1),
    ),
    **left("read with fsdp_config alone", "fsdp_version", "fsdp_final_state_dict_type", off=(1, 2)),
    **left(
        "torch's own default is used",
        "ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers dataloader_drop_last accelerator_config",
        "device_map max_memory gpu_memory_limit",
    ),
    **left(
        "what is computed in which type follows train.bf16 and model.dtype",
        "fp8 fp8_config fp8_enable_fsdp_float8_all_gather tf32 float32 embeddings_skip_upcast fp32_norms",
        "fp32_norm_classes",
        off=(False, "auto"),
    ),
    **left(
        "memory: train.gradient_checkpointing, train.micro_batch_tokens, fsdp.cpu_offload",
        "selective_checkpointing activation_offloading layer_offloading ple_cpu_offload",
    ),
    **left(
        "quantised weights are bitsandbytes', 4 or 8 bits: model.quantization",
        "gptq bnb_config_kwargs qat quantization model_quantization_config model_quantization_config_kwargs",
        "use_onebitllms quantize_moe_experts",
    ),
    **left(
        "peft's own; the section peft has what is supported",
        "lora_fan_in_fan_out lora_target_parameters lora_rank_pattern lora_alpha_pattern",
        "peft_layers_to_transform peft_layers_pattern peft peft_layer_replication",
        "peft_trainable_token_indices peft_ensure_weight_tying relora relora_prune_ratio relora_prune_method",
        "relora_cpu_offload lisa_n_layers lisa_step_interval lisa_layers_attribute",
    ),
    **left(
        "one learning rate, and transformers' schedules",
        "loraplus_lr_ratio loraplus_lr_embedding embedding_lr embedding_lr_scale lr_quadratic_warmup",
        "cosine_constant_lr_ratio lr_div_factor lr_groups jagged_restart_steps jagged_restart_warmup_steps",
        "jagged_restart_anneal_steps",
    ),
    **left(
        "no option of an optimizer of a run; train.optim_args has those there are",
        "optim_target_modules torchdistx_path adam_epsilon2 adam_beta3 dion_lr dion_momentum",
        "dion_rank_fraction dion_rank_multiple_of qgalore_rank qgalore_update_proj_gap qgalore_scale",
        "qgalore_proj_type qgalore_proj_quant qgalore_proj_bits qgalore_proj_group_size qgalore_cos_threshold",
        "qgalore_gamma_proj qgalore_queue_size",
    ),
    **left(
        "the batch is micro_batch_size x gradient_accumulation_steps rows on each rank",
        "batch_size",
        "auto_find_batch_size",
    ),
    **left(
        "model.train_only and model.freeze take names, with * for anything", "unfrozen_parameters", "freeze_mm_modules"
    ),
    **left(
        "a model is trained as it is saved",
        "reinit_weights rope_scaling overrides_of_model_config overrides_of_model_kwargs model_config",
        "model_kwargs cls_model_config processor_kwargs num_labels scaling_softmax scaling_softmax_factor",
        "scaling_softmax_bias use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks",
        "image_size image_resize_algorithm role_boundaries",
    ),
    **left(
        "metrics of text are llmtk predict's, by llmtk-plugin-text-metrics",
        "eval_causal_lm_metrics do_bench_eval bench_dataset bench_split",
    ),
    **left("evaluation rows have the length of training rows", "eval_sequence_len"),
    **left(
        "a step whose loss is not finite changes nothing, and train.max_nonfinite_steps of them end the run",
        "loss_watchdog_threshold",
        "loss_watchdog_patience",
    ),
    **left("rows that say nothing to learn are left out by themselves", "min_sample_len"),
    **left("duplicates are counted by llmtk data stats", "dataset_exact_deduplication"),
    **left("prompts: data.max_prompt_length", "max_prompt_len"),
    **left(
        "nothing is sent to the hub; llmtk export writes a folder to upload",
        "hub_model_id hub_strategy hub_revision",
    ),
    **left("a checkpoint is whole; Ctrl-C writes one at any time", "save_only_model", "dynamic_checkpoint"),
    **left(
        "a tracker's own settings stand in environment variables",
        "wandb_run_id wandb_mode wandb_entity wandb_watch wandb_log_model mlflow_tracking_uri",
        "mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts comet_api_key comet_workspace",
        "comet_project_name comet_experiment_key comet_mode comet_online comet_experiment_config",
        "trackio_project_name trackio_run_name trackio_space_id use_otel_metrics otel_metrics_host",
        "otel_metrics_port",
    ),
    **left(
        "llmtk chat talks with a model",
        "gradio_title gradio_share gradio_server_name gradio_server_port gradio_max_new_tokens",
        "gradio_temperature",
    ),
    **left(
        "llmtk launch starts several processes",
        "use_ray ray_run_name ray_num_workers resources_per_worker",
        off=(False, 1),
    ),
    **left("python's own profilers take a run as any program", "profiler_steps", "profiler_steps_start"),
    **left("samples take the likeliest token, or samples.temperature", "generation_top_p", "generation_top_k"),
    **left(
        "sft.loss is nll or dft",
        "use_eaft eaft_alpha eaft_k",
    ),
    **left(
        "a stage is chosen by its name",
        "trainer_cls process_reward_model ebft",
    ),
}

_PT: dict[str, Rule] = {
    **COMMON,
    **done("", "sample_packing eval_sample_packing pretraining_sample_concatenation"),
}
_SFT: dict[str, Rule] = dict(COMMON)
_PAIRS: dict[str, Rule] = {
    **COMMON,
    "rl_beta": By(_beta, "STAGE.beta"),
    "dpo_beta": By(_beta, "STAGE.beta"),
    "trl.beta": "STAGE.beta",
    "max_prompt_len": Leave("prompts of pairs are never cut; one without room for an answer is left out"),
}
_DPO: dict[str, Rule] = {
    **_PAIRS,
    "dpo_loss_type": By(trl.dpo_losses, "STAGE.loss"),
    "dpo_loss_weights": "STAGE.loss_weights",
    "dpo_label_smoothing": To("STAGE.label_smoothing", note="sigmoid honours it here (conservative DPO), not there"),
    "dpo_use_weighting": "STAGE.use_weighting",
    "precompute_ref_log_probs": "train.precompute_reference",
    "rpo_alpha": "STAGE.rpo_alpha",
    "dpo_norm_loss": Leave("dpo.loss: sigmoid_norm divides scores by the lengths of the answers"),
}
_IPO: dict[str, Rule] = {**_PAIRS, "precompute_ref_log_probs": "train.precompute_reference"}
_KTO: dict[str, Rule] = {
    **_PAIRS,
    "kto_desirable_weight": "STAGE.desirable_weight",
    "kto_undesirable_weight": "STAGE.undesirable_weight",
}
_ORPO: dict[str, Rule] = {**_PAIRS, "orpo_alpha": To("STAGE.beta", note="the paper's lambda")}
_SIMPO: dict[str, Rule] = {
    **_PAIRS,
    "simpo_gamma": To("STAGE.gamma", note="a margin of rewards, as there"),
    "cpo_alpha": "STAGE.nll_alpha",
}
_RM: dict[str, Rule] = {
    **COMMON,
    "reward_model": Done(),
    "center_rewards_coefficient": "STAGE.center_rewards_coefficient",
}

_AS_TRL = {"micro_batch_size": "per_device_train_batch_size", "eval_batch_size": "per_device_eval_batch_size"}


def _seen_by_trl(settings: Settings) -> dict[str, Any]:
    """Return the settings by TRL's names, with what axolotl's TRL, 1.9, takes where nothing is said."""
    shared = {_AS_TRL.get(key, key): value for key, value in settings.items()}
    usual = {"per_device_train_batch_size": 1, "use_bias_correction_kl": False}
    return usual | shared | {key.removeprefix("trl."): settings[key] for key in settings if key.startswith("trl.")}


def _as_trl(name: str) -> By:
    rule = trl.GRPO[name]
    return By(lambda value, settings: apply(rule, value, _seen_by_trl(settings)), *targets_of(rule))


def _of_trl(*names: str) -> dict[str, Rule]:
    return {f"trl.{name}": _as_trl(name) for name in " ".join(names).split()}


_COMPLETION = 256
"""Tokens of a completion, at most, where nothing is said."""
_ASYNC = "completions are written, rewarded and learnt from in turns"
_GRPO: dict[str, Rule] = {
    **COMMON,
    **_of_trl(
        "beta max_completion_length use_vllm vllm_mode vllm_server_host vllm_server_port vllm_server_timeout",
        "vllm_guided_decoding_regex reward_funcs reward_weights generation_batch_size num_generations",
        "log_completions num_completions_to_print importance_sampling_level sync_ref_model",
        "ref_model_mixup_alpha ref_model_sync_steps scale_rewards temperature top_p top_k min_p",
        "repetition_penalty generation_kwargs chat_template_kwargs num_iterations epsilon epsilon_high",
        "loss_type mask_truncated_completions entropy_coef use_adaptive_entropy entropy_target",
        "entropy_coef_delta entropy_coef_min entropy_coef_max vllm_importance_sampling_clip_min",
        "vllm_importance_sampling_clip_max log_multimodal vllm_enable_sleep_mode multi_objective_aggregation",
        "vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_cap",
        "off_policy_mask_threshold use_bias_correction_kl",
    ),
    "micro_batch_size": _as_trl("per_device_train_batch_size"),
    "gradient_accumulation_steps": _as_trl("gradient_accumulation_steps"),
    "eval_batch_size": _as_trl("per_device_eval_batch_size"),
    "rl_beta": By(lambda value, s: apply(_as_trl("beta"), value, s), "STAGE.beta", "STAGE.kl_correction"),
    **left(
        _ASYNC,
        "trl.use_data_producer trl.async_prefetch trl.prefetch_depth trl.vllm_sync_interval",
        "trl.streaming_partial_batch trl.streaming_min_groups trl.replay_buffer_size",
        "trl.replay_recompute_logps trl.reroll_start_fraction trl.reroll_max_groups trl.vllm_lora_sync",
        "trl.reward_num_workers trl.rollout_func",
        off=(False, 0, 1, 1.0, True),
    ),
    "trl.use_liger_loss": Leave(_KERNELS),
    "trl.skip_zero_advantage_batches": Done("a step of which nothing is left is skipped and counted"),
    "sequence_len": By(
        lambda value, s: put(
            {"data.max_length": max(value, int(s.get("trl.max_completion_length") or _COMPLETION) + PROMPT_ROOM)},
            "holds prompt and completion",
        ),
        "data.max_length",
    ),
}

_DEFAULTS: dict[str, Any] = {
    "train.num_train_epochs": 1.0,
    "train.per_device_train_batch_size": 1,
    "train.lr_scheduler_type": "cosine",
    "train.warmup_ratio": 0.03,
    "train.eval_strategy": "no",
    "train.save_strategy": "epoch",
    "data.max_length": 512,
    "data.on_too_long": "drop",
}


def _remarks_of_texts(settings: Settings) -> list[str]:
    if settings.get("sample_packing") or settings.get("pretraining_sample_concatenation"):
        return []
    return [f"sample_packing is not on: {ROWS_AS_TEXTS}"]


_CUT = {key: value for key, value in _DEFAULTS.items() if key != "data.on_too_long"}
METHODS = {
    "pretraining": Method("pt", _PT, _CUT, _remarks_of_texts),
    "sft": Method("sft", _SFT, _DEFAULTS),
    "dpo": Method("dpo", _DPO, _DEFAULTS),
    "ipo": Method("ipo", _IPO, _DEFAULTS),
    "kto": Method("kto", _KTO, _DEFAULTS),
    "orpo": Method("orpo", _ORPO, _DEFAULTS | {"STAGE.nll_on": "all"}),
    "simpo": Method("simpo", _SIMPO, _DEFAULTS | {"STAGE.beta": 0.1, "STAGE.gamma": 0.5, "STAGE.nll_alpha": 1.0}),
    "grpo": Method("grpo", _GRPO, _CUT | {"train.disable_dropout": False, "STAGE.max_completion_length": _COMPLETION}),
    "reward_model": Method("rm", _RM, _DEFAULTS),
}


def choose(settings: Settings, method: str | None) -> str:
    """Return the method: `rl`, `reward_model`, or by the type of the data sets."""
    name = method or settings.get("rl")
    if settings.get("process_reward_model"):
        name = "process_reward_model"
    elif name is None and settings.get("reward_model"):
        name = "reward_model"
    if name is None:
        types = {str(_type(entry)) for entry in as_list(settings.get("datasets") or [])}
        of_text = bool(types) and types <= {"completion", "pretrain"}
        name = "pretraining" if settings.get("pretraining_dataset") or of_text else "sft"
    if name not in METHODS:
        raise ConfigurationError(
            f"there is no stage for axolotl's {name!r}; there is one for {', '.join(METHODS)} (--method says which)"
        )
    return str(name)


def _type(entry: Any) -> Any:
    return entry.get("type") if isinstance(entry, Mapping) else None


def prepare(settings: Settings) -> Settings:
    """Bring the keys below `trl:` up, each as trl.KEY."""
    below = settings.get("trl")
    if not isinstance(below, Mapping):
        return settings
    return {key: value for key, value in settings.items() if key != "trl"} | {f"trl.{k}": v for k, v in below.items()}


PEER = Peer("axolotl", "axolotl", "0.19", METHODS, choose, prepare)
