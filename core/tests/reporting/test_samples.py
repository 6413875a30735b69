"""What a person sees of completions."""

from __future__ import annotations

from llmtk.reporting.console import Console
from llmtk.reporting.samples import show_samples


def test_what_steers_a_terminal_is_not_printed(capsys):
    wild = "\x1b[2J\x07red\r\n[bold]so[/bold]\x9b"
    show_samples(Console(), [{"prompt": "q", "completion": wild, "reward": 0.5}], step=3)
    told = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\r", "\x9b"} & set(told)
    assert "red" in told
    assert "[bold]so[/bold]" in told
    assert "completions before step 4" in told


def test_of_a_long_text_the_end_is_shown(capsys):
    show_samples(Console(), [{"prompt": "begin" + "x " * 300 + "end?", "completion": "", "reward": 0}], step=0)
    told = capsys.readouterr().out
    assert "begin" not in told
    assert "..." in told
    assert "end?" in told
