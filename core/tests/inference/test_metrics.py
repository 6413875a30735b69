"""Metrics of text, as distributions bring them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import llmtk
from llmtk import ConfigurationError, PluginError

SAID, RIGHT = ["a", "bb"], ["a", "b"]
Install = Callable[..., None]


def test_all_that_need_no_option_are_computed(install: Install) -> None:
    install("same", "lengths", "judged")
    assert llmtk.compute_metrics(SAID, RIGHT) == {"same": 0.5, "said": 3.0, "wanted": 2.0}


def test_named_ones_take_options(install: Install) -> None:
    install("same", "lengths", "judged")
    assert llmtk.compute_metrics(SAID, RIGHT, ["same"]) == llmtk.compute_metrics(SAID, RIGHT, "same") == {"same": 0.5}
    wanted = {"lengths": {"unit": 2}, "judged": {"model": "four"}}
    assert llmtk.compute_metrics(SAID, RIGHT, wanted) == {"said": 1.5, "wanted": 1.0, "judged": 4.0}


def test_without_any_there_are_none(install: Install) -> None:
    install()
    assert llmtk.compute_metrics(SAID, RIGHT) == {}


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ((SAID, RIGHT[:1]), ConfigurationError, "2 predictions and 1 references"),
        (([], []), ConfigurationError, "0 predictions"),
        (("a", "a"), ConfigurationError, "lists of text"),
        (([1], ["1"]), ConfigurationError, "prediction 1 is a int"),
        ((SAID, ["a", None]), ConfigurationError, "reference 2 is a NoneType"),
        ((SAID, RIGHT, ["sane"]), PluginError, "Unknown metric 'sane'. Did you mean 'same'"),
        ((SAID, RIGHT, ["judged"]), ConfigurationError, "the metric judged needs the option model"),
        ((SAID, RIGHT, {"lengths": {"units": 2}}), ConfigurationError, "units.*; its options are: unit"),
        ((SAID, RIGHT, {"judged": {"model": [4]}}), ConfigurationError, r"^judged\.model: expected text, got \[4\]"),
        ((SAID, RIGHT, ["broken"]), PluginError, "the metric broken failed: ZeroDivisionError: by zero"),
        ((SAID, RIGHT, ["words"]), PluginError, "the metric words failed: ValueError"),
    ],
)
def test_what_is_refused(install: Install, given: Any, error: Any, said: str) -> None:
    install("same", "lengths", "judged", "broken", "words")
    with pytest.raises(error, match=said):
        llmtk.compute_metrics(*given)
