"""Rewards of tests, which follow from a completion alone, or from its prompt."""

from __future__ import annotations


def graded(completion_ids):
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def half(prompts, completion_ids):
    """Whatever answers a prompt of 3, 6, 9, ... is worth nothing: those groups are flat."""
    return [
        0 if _number(prompt) % 3 == 0 else sum(ids) % 7 for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


def even(prompts, completion_ids):
    """Prompts with an odd number have no reward."""
    return [None if _number(prompt) % 2 else sum(ids) % 7 for prompt, ids in zip(prompts, completion_ids, strict=True)]


def never(prompts):
    return [None for _ in prompts]


def _number(prompt):
    return int(prompt.split()[-1].rstrip("?"))
