"""What stages say of where they come from."""

from __future__ import annotations

import inspect
import re

import pytest

from llmtk.host import discovery

OURS = sorted(offer.name for offer in discovery.list_stages() if offer.distribution == f"llmtk-stage-{offer.name}")


@pytest.mark.parametrize("name", OURS)
def test_a_stage_cites_its_papers(name: str) -> None:
    stage = discovery.get_stage(name)
    entries = inspect.cleandoc(stage.citation).split("\n\n")
    fields = [dict(re.findall(r"^    (\w+) = \{(.+?)\},$", entry, re.MULTILINE | re.DOTALL)) for entry in entries]
    assert [entry["eprint"] for entry in fields] == re.findall(r"\d{4}\.\d{5}", stage.paper)
    for entry, text in zip(fields, entries, strict=True):
        assert re.fullmatch(r"@misc\{[a-z]+\d{4}[a-z]+,\n.*\n\}", text, re.DOTALL)
        assert text.count("{") == text.count("}")
        assert entry["year"].endswith(entry["eprint"][:2])
        assert entry["author"] == entry["author"].strip()
        assert len(entry["title"]) > 20
