"""What keys of TRL, LLaMA-Factory, axolotl and older transformers are called here, for who types them from memory.

These are the usual ones. Whole configurations are read by `llmtk convert`, of the plugin `convert`.
"""

from __future__ import annotations

OTHER_NAMES = {
    "model_name_or_path": "model.name_or_path",
    "model_name": "model.name_or_path",
    "base_model": "model.name_or_path",
    "ref_model": "model.reference",
    "ref_model_name_or_path": "model.reference",
    "torch_dtype": "model.dtype",
    "load_in_4bit": "model.quantization: 4bit",
    "load_in_8bit": "model.quantization: 8bit",
    "quantization_bit": "model.quantization",
    "flash_attn": "model.attn_implementation",
    "flash_attention": "model.attn_implementation",
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "train_file": "data.train",
    "eval_dataset": "data.eval",
    "val_size": "data.eval",
    "val_set_size": "data.eval",
    "chat_template": "data.template",
    "chat_template_path": "data.template",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "assistant_only_loss": "data.loss_on: assistant",
    "completion_only_loss": "data.loss_on: completion",
    "train_on_prompt": "data.loss_on: everything",
    "train_on_inputs": "data.loss_on: everything",
    "mask_history": "data.loss_on: last_turn",
    "dataset_num_proc": "data.num_proc",
    "preprocessing_num_workers": "data.num_proc",
    "use_peft": "peft.method: lora",
    "adapter": "peft.method",
    "finetuning_type": "peft.method",
    "lora_r": "peft.r",
    "lora_rank": "peft.r",
    "lora_target": "peft.target_modules",
    "lora_target_modules": "peft.target_modules",
    "lora_target_linear": "peft.target_modules: all-linear",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.lr_scheduler_type",
    "optimizer": "train.optim",
    "epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "micro_batch_size": "train.per_device_train_batch_size",
    "eval_batch_size": "train.per_device_eval_batch_size",
    "evaluation_strategy": "train.eval_strategy",
}
"""A key elsewhere -> ours, with a value where the key says it."""

NO_KEY = {
    "packing": "Rows are packed without one, where the model is proven to take it; train.micro_batch_tokens cuts "
    "micro-batches by tokens",
    "logging_dir": "What train.report_to writes stands in output_dir",
}
"""A key elsewhere that needs none here -> why."""
NO_KEY |= dict.fromkeys(("sample_packing", "neat_packing"), NO_KEY["packing"])
