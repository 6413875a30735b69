"""What is told from memory about a part of a batch, and questions that were not asked about the whole."""

from __future__ import annotations

import pytest
import torch

from llmtk.batch import Batch, Group, Sequence
from llmtk.errors import PluginError
from llmtk.scoring import Memory, Scores

BATCH = Batch.collate(
    [Group([Sequence(list(range(n + 2)), [False] + [True] * (n + 1))], {"rows": 1}) for n in range(4)]
)


def scores(batch: Batch) -> Scores:
    logps = batch.target_tokens.float().requires_grad_()
    return Scores(batch, logps, entropy=2 * logps)


def test_a_part_is_answered_as_the_whole_was_and_without_gradient():
    memory, asked = Memory(), []
    memory.asked(BATCH, lambda: scores(BATCH))
    memory.asked(BATCH, lambda: 3 * scores(BATCH).logps)
    with memory.of(BATCH, [3, 1]) as part:
        assert part.tokens.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
        found = memory.asked(part, lambda: asked.append(part))
        values = memory.asked(part, lambda: asked.append(part))
        assert not torch.is_grad_enabled()
    assert not asked
    assert found.batch is part
    assert found.logps.tolist() == [1, 2, 3, 4, 1, 2]
    assert found.entropy.tolist() == [2, 4, 6, 8, 2, 4]
    assert found.vocab_mean is None
    assert values.tolist() == [3, 6, 9, 12, 3, 6]
    assert not found.logps.requires_grad


def test_one_within_another_asks_the_model_once():
    outer, asked = Memory(), []

    def ask(batch):
        asked.append(batch)
        return scores(batch)

    inner = Memory(outer)
    inner.asked(BATCH, lambda: ask(BATCH))
    with outer.of(BATCH, [1, 2]) as part:
        inner = Memory(outer)
        inner.asked(part, lambda: ask(part))
        with inner.of(part, [1]) as smaller:
            assert inner.asked(smaller, lambda: ask(smaller)).logps.tolist() == [1, 2, 3]
    assert len(asked) == 1


def test_what_was_not_asked_about_the_whole_is_refused():
    memory = Memory()
    memory.asked(BATCH, lambda: scores(BATCH))
    with memory.of(BATCH, [0, 1]) as part, pytest.raises(PluginError, match="about other groups than those"):
        memory.asked(part.select([0]), lambda: scores(part))
    with memory.of(BATCH, [0]) as part:
        memory.asked(part, lambda: scores(part))
        with pytest.raises(PluginError, match="asks the model more about some groups"):
            memory.asked(part, lambda: scores(part))


def test_another_question_in_the_place_of_one_is_refused():
    memory = Memory()
    for model in ("reference", None):
        memory.asked(BATCH, lambda: scores(BATCH), ("score", model, 1.0))
    with memory.of(BATCH, [0, 1]) as part, pytest.raises(PluginError, match=r"None, 1\.0\) where it was .*reference"):
        memory.asked(part, lambda: scores(part), ("score", None, 1.0))
