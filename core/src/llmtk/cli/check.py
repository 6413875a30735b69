"""`llmtk check`."""

from __future__ import annotations

import click


@click.command("check")
@click.argument("stage")
@click.option("--only", "only", multiple=True, metavar="CHECK", help="This check alone. May be given several times.")
@click.option("--no-demo", is_flag=True, help="Leave the demo out, which takes the longest.")
def command(stage: str, only: tuple[str, ...], no_demo: bool) -> int:
    """Check that a stage keeps the contract: on two ranks, resumed, cut and shuffled, packed and padded.

    STAGE is an installed one's name. Ends with exit code 1 where a check fails, and says how to mend it.
    """
    from rich.console import Console

    from llmtk.host.discovery import find
    from llmtk.testing import CHECKS, Verdict, outcomes

    find("llmtk.stages", stage)
    wanted = list(only) or [name for name in CHECKS if not (no_demo and name == "demo")]
    console = Console(highlight=False)
    failed, made = [], 0
    styles = {Verdict.PASSED: "green", Verdict.FAILED: "bold red", Verdict.SKIPPED: "dim"}
    for one in outcomes(stage, wanted):
        told = f"[{styles[one.verdict]}]{one.verdict.value:8}[/]"
        console.print(f"{told} {one.check:11} {one.title}  [dim]{one.seconds:.1f} s[/]", soft_wrap=True)
        for label, text in (("", one.message), ("Mend: ", one.mend)):
            if text:
                console.print(f"{label}{text}", markup=False, style="" if label else "yellow", soft_wrap=True)
        failed += [one.check] * (one.verdict is Verdict.FAILED)
        made += 1
    if not failed:
        console.print(f"{stage} conforms")
        return 0
    console.print(f"{stage}: {len(failed)} of {made} checks failed: {', '.join(failed)}", soft_wrap=True)
    if made < len(wanted):
        console.print("The others need a stage that can be loaded")
    return 1
