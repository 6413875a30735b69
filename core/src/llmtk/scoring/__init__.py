"""Scoring: the log-prob of every target token under a causal language model, forward and backward.

Stages see `Scores` alone. How they are computed (here padded, plain) is nobody else's business.
"""

from llmtk.scoring.padded import map_logits, score
from llmtk.scoring.scores import ALSO, Scores

__all__ = ["ALSO", "Scores", "map_logits", "score"]
