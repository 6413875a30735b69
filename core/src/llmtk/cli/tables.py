"""Plain tables: aligned columns, with nothing that a script would have to strip."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmtk.host.discovery import Offer


def offers_table(offers: Sequence[Offer], *, with_kind: bool = False) -> list[str]:
    """Return a line for each offer, and below it what is wrong with it."""
    kinds = [[offer.group.removeprefix("llmtk.").removesuffix("s")] if with_kind else [] for offer in offers]
    rows = [
        [offer.name, *kind, offer.distribution, offer.version, offer.summary]
        for offer, kind in zip(offers, kinds, strict=True)
    ]
    head, *lines = aligned([["NAME", *(["KIND"] if with_kind else []), "DISTRIBUTION", "VERSION", "SUMMARY"], *rows])
    table = [head]
    for offer, line in zip(offers, lines, strict=True):
        table += [line, *([f"    problem: {offer.problem}"] if offer.problem else [])]
    return table


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows as lines, their cells two spaces apart and in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def as_json(value: object) -> None:
    """Print a value as JSON, for scripts."""
    import json

    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def described(offer: Offer) -> dict[str, object]:
    """Return what is known of an offer without importing it."""
    return {
        "name": offer.name,
        "kind": offer.group.removeprefix("llmtk.").removesuffix("s"),
        "distribution": offer.distribution,
        "version": offer.version,
        "summary": offer.summary,
        "requires": offer.requires,
        "problem": offer.problem,
    }
