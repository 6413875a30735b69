"""Asking a trained model: `LanguageModel`, which needs no run, files of predictions, and chat.

    model = LanguageModel("runs/sft")
    model.answer(["37+48="], temperature=0.0)

It loads a run's folder, or that of any causal language model or adapter, and writes with the built-in engine.
"""

from llmtk.inference.model import LanguageModel

__all__ = ["LanguageModel"]
