"""Which commands there are, and what becomes of errors."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch

import llmtk.cli
from llmtk.cli.commands import BUILT_IN
from llmtk.errors import ConfigurationError, LlmtkError, TrainingError
from llmtk.host import discovery

COMMAND = """
    import click

    @click.command()
    @click.argument("name")
    def command(name):
        click.echo(f"hello {name}")
"""
HEAVY = ["torch", "transformers", "datasets", "accelerate", "rich", "pydantic"]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--help"],
        ["list-stages"],
        ["list-stages", "--json"],
        ["list-plugins"],
        ["--version"],
        ["runs", "list", "."],
    ],
)
def test_start_up_imports_nothing_heavy(words: list[str]) -> None:
    program = (
        "import sys\n"
        "from llmtk.cli import call\n"
        f"call({words!r})\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_importing_llmtk_imports_nothing_heavy_and_its_names_are_there() -> None:
    program = (
        "import sys, llmtk\n"
        f"assert not [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert set(llmtk.__all__) <= set(dir(llmtk))\n"
        "for name in llmtk.__all__: getattr(llmtk, name)\n"
        "try: llmtk.nothing\n"
        "except AttributeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "module 'llmtk' has no attribute 'nothing'\n"


def test_help_lists_every_command_by_what_its_own_help_says(llmtk: Any) -> None:
    code, out, _ = llmtk("--help")
    assert code == 0
    for name in BUILT_IN:
        assert f"  {name} " in out
        assert llmtk(name, "--help")[0] == 0
    assert llmtk("-h")[1] == out


def test_nothing_asked_is_a_usage_error(llmtk: Any) -> None:
    code, _, err = llmtk()
    assert code == 2
    assert "Usage: llmtk" in err


def test_a_distributions_command_is_listed_without_being_imported_and_runs(install: Any, llmtk: Any) -> None:
    install("llmtk-hello", "hello", discovery.COMMANDS, COMMAND)
    out = llmtk("--help")[1]
    assert re.search("  hello +from llmtk-hello: A hello", out)
    assert "llmtk_hello" not in sys.modules
    assert llmtk("hello", "you") == (0, "hello you\n", "")
    assert llmtk("hello")[0] == 2


def test_a_broken_command_hurts_only_those_who_call_it(install: Any, llmtk: Any) -> None:
    install("llmtk-broken", "broken", discovery.COMMANDS, "import not_there\n")
    install("llmtk-wrong", "wrong", discovery.COMMANDS, "command = 3\n")
    assert llmtk("--help")[0] == 0
    code, _, err = llmtk("broken")
    assert code == 2
    assert "llmtk-broken" in err
    assert "not_there" in err
    code, _, err = llmtk("wrong")
    assert code == 2
    assert "which is a int, not a click command" in err
    assert "llmtk-wrong" in err


def test_two_commands_of_one_name_are_an_error_that_names_both(install: Any, llmtk: Any) -> None:
    install("llmtk-one", "hello", discovery.COMMANDS, COMMAND)
    install("llmtk-two", "hello", discovery.COMMANDS, COMMAND)
    code, _, err = llmtk("hello", "you")
    assert code == 2
    assert "llmtk-one" in err
    assert "llmtk-two" in err
    assert "unusable" in llmtk("--help")[1]


def test_a_command_with_the_name_of_a_built_in_one_is_an_error(install: Any, llmtk: Any) -> None:
    install("llmtk-mine", "list-stages", discovery.COMMANDS, COMMAND)
    code, _, err = llmtk("list-stages")
    assert code == 2
    assert "llmtk-mine 1.0" in err
    assert "pip uninstall llmtk-mine" in err
    assert "unusable" in llmtk("--help")[1]


def test_an_unknown_command_suggests_the_near_one(install: Any, llmtk: Any) -> None:
    code, _, err = llmtk("schemas")
    assert code == 2
    assert "Did you mean 'schema'?" in err
    install("llmtk-stage-toy", "toy")
    assert "'toy' is a stage; train with it: llmtk run toy" in llmtk("toy")[2]


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(discovery, "list_stages", fail)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigurationError("a.b: wrong. Mend it."), 2, "error: a.b: wrong. Mend it.\n"),
        (TrainingError("the loss is nan"), 1, "error: the loss is nan\n"),
        (LlmtkError("stopped"), 1, "error: stopped\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (click.Abort(), 130, "interrupted\n"),
        (click.UsageError("no"), 2, "Error: no\n"),
    ],
)
def test_an_error_is_a_short_message_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, llmtk: Any, error: BaseException, code: int, said: str
) -> None:
    raising(monkeypatch, error)
    answer = llmtk("list-stages")
    assert answer[0] == code
    assert answer[2].lstrip("\n").endswith(said)
    assert "Traceback" not in answer[2]


def test_an_unexpected_error_names_its_line_and_asks_to_be_reported(
    monkeypatch: pytest.MonkeyPatch, llmtk: Any
) -> None:
    raising(monkeypatch, ZeroDivisionError("by zero"))
    code, _, err = llmtk("list-stages")
    assert code == 1
    line = raising.__code__.co_firstlineno + 2
    assert err.splitlines() == [
        f"error: ZeroDivisionError: by zero (test_commands.py:{line}, in fail)",
        "This is a fault in llmtk or a plugin. Look at that line if it is yours, else please report it; run again with "
        "--debug for the traceback.",
    ]


def test_want_of_memory_is_told_as_such_with_what_takes_less(monkeypatch: pytest.MonkeyPatch, llmtk: Any) -> None:
    with pytest.raises(RuntimeError) as wanted:
        torch.empty(2**60, dtype=torch.uint8)
    raising(monkeypatch, wanted.value)
    code, _, err = llmtk("list-stages")
    assert code == 1
    assert err.startswith("error: not enough memory: ")
    assert "gradient_accumulation_steps" in err
    assert "fault in llmtk" not in err


@pytest.mark.parametrize("words", [["--debug", "list-stages"], ["list-stages", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch, llmtk: Any, words: list[str]
) -> None:
    raising(monkeypatch, ConfigurationError("wrong"))
    code, _, err = llmtk(*words)
    assert code == 2
    assert "Traceback (most recent call last)" in err
    assert err.endswith("error: wrong\n")


def test_a_reader_who_leaves_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m llmtk --help | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_main_exits_with_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        llmtk.cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("llmtk 0.")
