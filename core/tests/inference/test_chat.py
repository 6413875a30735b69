"""Conversations: their history, answers that are told as they are written, and the terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtk import ConfigurationError, DatasetError
from llmtk.inference import LanguageModel
from llmtk.inference.chat import Chat, _Telling, readable

Llmtk = Callable[..., tuple[int, str, str]]
GREEDY = {"temperature": 0.0, "max_new_tokens": 8}


@pytest.fixture
def chat(model: LanguageModel) -> Chat:
    return Chat(model, model.sampling(**GREEDY), "Add.")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_an_answer_follows_from_all_that_was_said(chat: Chat, model: LanguageModel) -> None:
    first = chat.ask("37+48=")
    second = chat.ask("11+22=")
    system = {"role": "system", "content": "Add."}
    said = [system, user("37+48="), {"role": "assistant", "content": first}, user("11+22=")]
    assert chat.messages == [*said, {"role": "assistant", "content": second}]
    assert [first, second] == model.answer([said[:2], said], **GREEDY)
    chat.reset(chat.system)
    assert chat.messages == [system]
    assert chat.ask("37+48=") == first
    chat.reset(None)
    assert chat.messages == []


def test_an_answer_is_told_piece_by_piece(chat: Chat) -> None:
    pieces: list[str] = []
    answer = chat.ask("thirty-seven plus forty-eight", pieces.append)
    assert "".join(pieces) == answer
    assert len(pieces) > 1


class Bytes:
    """Stands for a model whose tokens are bytes."""

    def text(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


@pytest.mark.parametrize("text", ["héllo 猫 😀!", "a", "", "猫"])
def test_no_piece_ends_within_a_character(text: str) -> None:
    pieces: list[str] = []
    telling: Any = _Telling(Bytes(), pieces.append)  # type: ignore[arg-type]
    tokens = list(text.encode())
    for end in range(1, len(tokens) + 1):
        telling(0, tokens[:end])
    assert pieces == list(text)
    assert telling.finish() == text
    telling(0, [*tokens, 0xE7])
    assert telling.finish() == text + "\ufffd", "what ends within a character is told at last"


def test_questions_are_answered_alike_in_the_same_order_and_otherwise_with_another_seed(model: LanguageModel) -> None:
    def answers(seed: int) -> list[str]:
        chat = Chat(model, model.sampling(temperature=3.0, max_new_tokens=12, seed=seed))
        return [chat.ask("hm") for _ in range(2)]

    assert answers(0) == answers(0) != answers(1)


def test_ctrl_c_ends_an_answer_and_keeps_what_was_written(model: LanguageModel) -> None:
    chat = Chat(model, model.sampling(temperature=0.0, max_new_tokens=8))
    whole = chat.ask("37+48=")
    chat.reset(None)

    heard: list[str] = []

    def hear(piece: str) -> None:
        heard.append(piece)
        if len(heard) == 1:
            raise KeyboardInterrupt

    cut = chat.ask("37+48=", hear)
    assert 0 < len(cut) < len(whole)
    assert whole.startswith(cut)
    assert chat.messages[-1] == {"role": "assistant", "content": cut}


def test_a_dialogue_that_leaves_no_room_is_refused_and_forgotten(chat: Chat, model: LanguageModel) -> None:
    before = list(chat.messages)
    with pytest.raises(DatasetError, match="leave no room to answer"):
        chat.ask("word " * int(model.positions))
    assert chat.messages == before


def test_a_saved_dialogue_can_be_trained_on(chat: Chat, tmp_path: Path) -> None:
    from llmtk.data import read_rows

    file = tmp_path / "saved.jsonl"
    with pytest.raises(ConfigurationError, match="nothing to save yet"):
        chat.save(str(file))
    chat.ask("37+48=")
    chat.save(str(file))
    chat.save(str(file))
    assert [row.messages for row in read_rows(str(file), ("dialogue",))] == [chat.messages] * 2  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match="cannot be written: Is a directory"):
        chat.save(str(tmp_path))


def test_a_model_without_a_chat_template_is_refused(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    with pytest.raises(ConfigurationError, match="has no chat template"):
        Chat(model, model.sampling())


def test_nothing_that_steers_a_terminal_is_shown() -> None:
    assert readable("a\x1b[31mb\r\x07\n\t猫") == "a\ufffd[31mb\ufffd\ufffd\n\t猫"


def talk(llmtk: Llmtk, monkeypatch: pytest.MonkeyPatch, lines: list[str], *words: str) -> tuple[str, str]:
    """Have a chat through a pipe; return what was written to stdout and stderr."""
    given = iter(lines)

    def read(prompt: str) -> str:
        assert prompt == ""
        line = next(given, None)
        if line is None:
            raise EOFError
        return line.encode("latin-1").decode()

    monkeypatch.setattr("builtins.input", read)
    code, out, err = llmtk("chat", *words, "--temperature", "0", "--max-new-tokens", "8")
    assert code == 0, err
    return out, err


def test_commands(loaded: LanguageModel, llmtk: Llmtk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "saved.jsonl"
    said = [
        "/save",
        "37+48=",
        "/reset",
        f"/save {file}",
        "/system Be brief.",
        "11+22=",
        f"/save {file}",
        "/sav",
        "/help",
        "caf\xe9",
    ]
    out, err = talk(llmtk, monkeypatch, [*said, "", "/quit", "never asked"], "builtin", "--system", "Add.")
    (row,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert [message["content"] for message in row["messages"][:2]] == ["Be brief.", "11+22="]
    answers = loaded.answer([[{"role": "system", "content": "Add."}, user("37+48=")], row["messages"][:2]], **GREEDY)
    assert out.splitlines()[:2] == answers
    assert "/save needs a file" in err
    assert "error: that was no UTF-8" in err
    assert "error: there is nothing to save yet" in err
    assert "/sav is no command. Did you mean '/save'?" in err
    assert "/reset   forget what was said" in out


def test_two_models_are_compared(
    loaded: LanguageModel, llmtk: Llmtk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "saved.jsonl"
    out, _ = talk(llmtk, monkeypatch, ["37+48=", f"/save {file}"], "--compare", "builtin", "builtin")
    (answer,) = loaded.answer(["37+48="], **GREEDY)
    assert out.splitlines() == [f"builtin (1): {answer}", f"builtin (2): {answer}"]
    saved = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["model"] for row in saved] == ["builtin (1)", "builtin (2)"]
    assert [row["messages"][1]["content"] for row in saved] == [answer, answer]


@pytest.mark.parametrize("words", [("builtin", "builtin"), ("--compare", "builtin"), ("--compare", *["builtin"] * 3)])
def test_as_many_models_as_are_asked(llmtk: Llmtk, words: Any) -> None:
    code, _, err = llmtk("chat", *words)
    assert (code, "Give two models with --compare, and one without it." in err) == (2, True)


def test_a_model_that_is_not_there(llmtk: Llmtk, tmp_path: Path) -> None:
    code, _, err = llmtk("chat", str(tmp_path / "none"))
    assert (code, f"there is no run and no model in {tmp_path / 'none'}" in err) == (2, True), err


class Terminal:
    """A program in a pseudo-terminal of 80 columns."""

    def __init__(self, *command: str) -> None:
        self._master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, close_fds=True
        )
        os.close(slave)
        self.seen = ""

    def expect(self, pattern: str, seconds: float = 60) -> str:
        """Wait until a pattern was written; return what was written up to its end, and forget it."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"{pattern!r} did not come: {self.seen!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self._master, 65536).decode(errors="replace")
                except OSError:
                    assert re.search(pattern, self.seen), f"it ended: {self.seen!r}"
        upto, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return upto

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())


def test_a_chat_in_a_terminal(tmp_path: Path, model: LanguageModel) -> None:
    """One process: a model alone, with history and commands, then two side by side, and Ctrl-D."""
    (answer,) = model.answer(["37+48="], **GREEDY)
    options = "'--temperature', '0', '--max-new-tokens', '8'"
    program = (
        "from llmtk.cli import call\n"
        f"print('ended with', call(['chat', 'builtin', {options}]))\n"
        f"print('ended with', call(['chat', '--compare', 'builtin', 'builtin', {options}]))\n"
    )
    terminal = Terminal(sys.executable, "-c", program)
    terminal.expect(r"/help lists commands.*\n[^\n]*> ")
    terminal.type("37+48=\n")
    terminal.expect(rf"37\+48=\r\n{answer}\r\n[^\n]*> ")
    terminal.type(f"/save {tmp_path / 'saved.jsonl'}\n")
    terminal.expect(r"saved: (.|\n)*> ")
    terminal.type("half a question")
    terminal.expect("half a question")
    time.sleep(1)  # until it waits for a key again: of a signal just before, Python's readline hears with the next key
    terminal.process.send_signal(signal.SIGINT)
    terminal.expect(r"Ctrl-D ends\.(.|\n)*> ")
    terminal.type("/quit\n")
    terminal.expect("ended with 0")
    messages = json.loads((tmp_path / "saved.jsonl").read_text())["messages"]
    assert messages == [user("37+48="), {"role": "assistant", "content": answer}]

    terminal.expect(r"/help lists commands.*\n[^\n]*> ")
    terminal.type("37+48=\n")
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", terminal.expect(rf"│ +{answer} +│ +{answer} +│"))
    assert re.search(r"builtin \(1\) +┃ +builtin \(2\)", shown)
    terminal.expect("> ")
    terminal.type("\x04")
    terminal.expect("ended with 0")
    assert terminal.process.wait(30) == 0
