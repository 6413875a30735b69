"""The keys of transformers' TrainingArguments (5.23), which TRL and LLaMA-Factory share, and older names of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmtk_convert.rules import NOTHING, Answer, By, Rule, Settings, To, as_list, done, leave, left, put, same

STEPS = "a share of all steps there; here a number of steps"


def given(settings: Settings, *names: str) -> Any:
    """Return the value of the first of these keys that is given, if one is."""
    return next((settings[name] for name in names if settings.get(name) is not None), None)


def evaluates(settings: Settings) -> bool:
    """Whether evaluations were asked for."""
    return str(given(settings, "eval_strategy", "evaluation_strategy") or "no") not in ("no", "False")


def mapping(value: Any) -> Any:
    """Return keys and values, which a command line spells as JSON."""
    return json.loads(value) if isinstance(value, str) and value.startswith("{") else value


def strategy(kind: str) -> By:
    """Return the rule of eval_strategy or save_strategy."""

    def rule(value: Any, settings: Settings) -> Answer:
        name = {"False": "no", "epochs": "epoch"}.get(str(value), str(value))
        if name == "best":
            return put({f"train.{kind}_strategy": "epoch"}, "epoch; here a new best evaluation is saved in any case")
        return put({f"train.{kind}_strategy": name})

    return By(rule, f"train.{kind}_strategy")


def every(kind: str) -> By:
    """Return the rule of eval_steps or save_steps, which are used under `steps` alone."""

    def rule(value: Any, settings: Settings) -> Answer:
        usual = "no" if kind == "eval" else "steps"
        names = ("eval_strategy", "evaluation_strategy") if kind == "eval" else ("save_strategy",)
        if str(given(settings, *names) or usual) != "steps":
            return leave(f"it is used under {names[0]}: steps alone, there too")
        if 0 < float(value) < 1:
            return leave(STEPS)
        return put({f"train.{kind}_steps": int(value)})

    return By(rule, f"train.{kind}_steps")


def _warmup_steps(value: Any, settings: Settings) -> Answer:
    if 0 < float(value) < 1:
        return put({"train.warmup_ratio": float(value)})
    return put({"train.warmup_steps": int(value)}) if value else NOTHING


def _warmup_ratio(value: Any, settings: Settings) -> Answer:
    if settings.get("warmup_steps"):
        return leave("warmup_steps goes first, there too")
    return put({"train.warmup_ratio": value}) if value else NOTHING


def optimizer(value: Any, settings: Settings) -> Answer:
    """Keep an optimizer's name if a run knows it."""
    from llmtk.training.optimizers import OPTIMIZERS, REFUSED

    name = {"adamw_hf": "adamw_torch", "adamw_apex_fused": "adamw_torch_fused"}.get(str(value), str(value))
    if name in REFUSED:
        return leave(f"{name}: {REFUSED[name]}. adamw_torch_fused is used")
    if name not in OPTIMIZERS:
        return leave(f"{name}: no optimizer of a run. adamw_torch_fused is used")
    return put({"train.optim": name}, "" if name == value else f"{name} is the same update")


def report(value: Any, settings: Settings) -> Answer:
    """Name the trackers."""
    names = as_list(value)
    if "all" in names:
        return leave("all: name the trackers in train.report_to")
    return put({"train.report_to": [name for name in names if name not in ("none", "None")]})


def _logging_steps(value: Any, settings: Settings) -> Answer:
    return leave(STEPS) if 0 < float(value) < 1 else put({"train.logging_steps": int(value)})


def _metric(value: Any, settings: Settings) -> Answer:
    return put({"train.metric_for_best_model": str(value).removeprefix("eval_")})


def _sampling(value: Any, settings: Settings) -> Answer:
    if value == "group_by_length":
        return put({"train.group_by_length": True})
    return NOTHING if value == "random" else leave(f"{value}: rows come in an order drawn from the seed")


def fsdp(value: Any, settings: Settings) -> Answer:
    """Shard by FSDP2, with the host's memory if that was asked for."""
    if not value:
        return NOTHING
    words = value.split() if isinstance(value, str) else as_list(value)
    config = mapping(settings.get("fsdp_config") or {})
    below = config if isinstance(config, dict) else {}
    offload = "offload" in words or bool(below.get("offload_params", below.get("fsdp_offload_params")))
    reshard = below.get("reshard_after_forward", below.get("fsdp_reshard_after_forward"))
    reshards = reshard not in (False, "NO_SHARD", "SHARD_GRAD_OP") and "shard_grad_op" not in words
    return put({"fsdp.cpu_offload": offload, "fsdp.reshard_after_forward": reshards}, "PyTorch's FSDP2, layer by layer")


FSDP = By(fsdp, "fsdp.cpu_offload", "fsdp.reshard_after_forward")
FSDP_CONFIG = By(
    lambda value, settings: (
        put({}, "read with fsdp: offloading and resharding alone") if settings.get("fsdp") else NOTHING
    )
)


def deepspeed(value: Any, settings: Settings) -> Answer:
    """Spread by the stage of ZeRO that DeepSpeed's configuration names, on the host too if it says so."""
    if not value:
        return NOTHING
    config = _read_deepspeed(value)
    if config is None:
        return leave(f"{value} cannot be read here; deepspeed: {{zero_stage: 2}} names the stage of ZeRO")
    zero = config.get("zero_optimization") or {}
    if not (stage := zero.get("stage")):
        return leave("its stage 0 spreads nothing over the ranks, as a run without the section deepspeed")
    may = ("offload_optimizer", "offload_param") if stage == 3 else ("offload_optimizer",)
    offloads = {f"deepspeed.{key}": "cpu" for key in may if (zero.get(key) or {}).get("device", "none") != "none"}
    return put({"deepspeed.zero_stage": stage, **offloads}, "of it the stage of ZeRO and offloading alone")


def _read_deepspeed(value: Any) -> dict[str, Any] | None:
    """Return keys and values, of which a file may hold the JSON."""
    try:
        found = mapping(value)
        found = found if isinstance(found, dict) else json.loads(Path(str(found)).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


DEEPSPEED = By(deepspeed, "deepspeed.zero_stage", "deepspeed.offload_optimizer", "deepspeed.offload_param")

LIGER = "scores never hold all logits at once; Liger's other kernels are those of plugins: {liger: {}}"

_HUB = "nothing is sent to the hub; llmtk export writes a folder to upload"
_NO_KEY = "needs no key here, and changes nothing that is trained"
_DEVICE = "a run finds its device"

TRAINING_ARGUMENTS: dict[str, Rule] = {
    **same(
        "train",
        "learning_rate max_steps per_device_train_batch_size per_device_eval_batch_size",
        "gradient_accumulation_steps lr_scheduler_type weight_decay adam_beta1 adam_beta2 adam_epsilon",
        "max_grad_norm torch_compile torch_compile_backend torch_compile_mode label_smoothing_factor",
        "neftune_noise_alpha seed data_seed length_column_name dataloader_num_workers dataloader_pin_memory",
        "save_total_limit load_best_model_at_end greater_is_better ddp_backend ddp_find_unused_parameters",
        "run_name log_level gradient_checkpointing group_by_length bf16 fp16",
    ),
    "num_train_epochs": "train.num_train_epochs",
    "output_dir": "output_dir",
    "activation_checkpointing": "train.gradient_checkpointing",
    "lr_scheduler_kwargs": To("train.lr_scheduler_kwargs", mapping),
    "optim_args": To("train.optim_args", mapping),
    "optim": By(optimizer, "train.optim"),
    "warmup_steps": By(_warmup_steps, "train.warmup_steps", "train.warmup_ratio"),
    "warmup_ratio": By(_warmup_ratio, "train.warmup_ratio"),
    "logging_steps": By(_logging_steps, "train.logging_steps"),
    "eval_strategy": strategy("eval"),
    "evaluation_strategy": strategy("eval"),
    "eval_steps": every("eval"),
    "save_strategy": strategy("save"),
    "save_steps": every("save"),
    "metric_for_best_model": By(_metric, "train.metric_for_best_model"),
    "train_sampling_strategy": By(_sampling, "train.group_by_length"),
    "report_to": By(report, "train.report_to"),
    "fsdp": FSDP,
    "fsdp_config": FSDP_CONFIG,
    "deepspeed": DEEPSPEED,
    **left("a run never overwrites another: remove its folder, or give another output_dir", "overwrite_output_dir"),
    **left("a checkpoint of another program cannot be gone on with", "resume_from_checkpoint"),
    **left(
        _HUB,
        "push_to_hub hub_model_id hub_private_repo hub_revision",
    ),
    **left("a token stands in the environment (HF_TOKEN), never in a configuration", "hub_token", "push_to_hub_token"),
    **done(
        _NO_KEY,
        "hub_strategy hub_always_push prediction_loss_only label_names do_train do_eval",
        "remove_unused_columns disable_tqdm logging_strategy logging_first_step average_tokens_across_devices",
        "logging_nan_inf_filter save_safetensors past_index use_cache eval_do_concat_batches",
        "eval_accumulation_steps eval_use_gather_object no_cuda debug include_for_metrics batch_eval_metrics",
        "skip_memory_metrics save_on_each_node log_on_each_node log_level_replica local_rank",
        "dataloader_persistent_workers dataloader_prefetch_factor dataloader_in_order",
        "dataloader_multiprocessing_context torch_empty_cache_steps gradient_checkpointing_kwargs",
        "activation_checkpointing_kwargs logging_dir xpu_backend tpu_num_cores jit_mode_eval bf16_full_eval",
        "fp16_full_eval half_precision_backend fp16_opt_level fp16_backend",
        "restore_callback_states_from_checkpoint ignore_data_skip",
    ),
    **left(
        "torch's own default is used",
        "ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph",
    ),
    **left("a last batch that is not full is trained on, with the weight that its tokens have", "dataloader_drop_last"),
    **left("evaluated as eval_strategy says, first after the first steps", "eval_on_start", "eval_delay"),
    **left("train.do_predict answers the rows of data.test, or of a file, which predict.data names", "do_predict"),
    **left("every checkpoint can be gone on from", "save_only_model", "enable_jit_checkpoint"),
    **left("the batch is what was asked for; train.micro_batch_tokens bounds memory", "auto_find_batch_size"),
    **left("matrix products in TF32 are switched on in torch itself", "tf32"),
    **left(LIGER, "use_liger_kernel", "liger_kernel_config"),
    **left("a run is deterministic on a CPU; on a GPU torch's own switches apply", "full_determinism"),
    **left(
        _DEVICE,
        "use_cpu use_mps_device use_ipex torchdynamo mp_parameters",
    ),
    **left(
        "Accelerate is set up by the run",
        "accelerator_config parallelism_config tp_size",
    ),
    **left(
        "optimizers that take it are refused, since their state is none that a checkpoint can hold",
        "optim_target_modules",
    ),
    **left(
        "tokens are counted and reported in any case",
        "include_num_input_tokens_seen",
        "include_tokens_per_second",
        off=(False, "no"),
    ),
    **left(
        "a tracker's own settings stand in its environment variables",
        "project trackio_space_id trackio_bucket_id trackio_static_space_id",
    ),
    **left("Ray is not used; llmtk launch starts several processes", "ray_scope"),
}

DEFAULTS: dict[str, Any] = {
    "train.learning_rate": 5e-5,
    "train.num_train_epochs": 3.0,
    "train.per_device_train_batch_size": 8,
    "train.gradient_accumulation_steps": 1,
    "train.lr_scheduler_type": "linear",
    "train.weight_decay": 0.0,
    "train.max_grad_norm": 1.0,
    "train.eval_strategy": "no",
    "train.bf16": False,
}
"""What TrainingArguments takes where nothing is said, of what changes the trained model."""
