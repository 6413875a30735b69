"""Models and tokenizers: checked, loaded or built from scratch, given an adapter, saved.

Importing this, or ``llmtk.models.checks``, brings in neither torch nor transformers; the other modules need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    path: str | Path, *, trust_remote_code: bool = False, key: str = "model.name_or_path"
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a run's folder, or any model or adapter: ``model, tokenizer = load("runs/sft")``.

    The weights keep the dtype they were saved in; an adapter comes on its base, unmerged. The model is in eval mode.
    With `trust_remote_code`, Python code that comes with it is run. `key` is what errors name as the place where `path`
    is said, such as a stage's option for a second model: `load(self.options.teacher, key="distil.teacher")`.

    Raises:
        ModelLoadError: The folder holds neither, it is damaged, or an adapter's base is gone.
    """
    from llmtk.config.sections import ModelConfig
    from llmtk.models.saving import load_folder

    return load_folder(path, ModelConfig(trust_remote_code=trust_remote_code), key=key)
