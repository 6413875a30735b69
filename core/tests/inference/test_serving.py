"""A model served: what OpenAI's own client hears of it, how a server is started and ended, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtk import ConfigurationError, load
from llmtk.cli.serve import _how_to_ask as how_to_ask
from llmtk.demo import addition
from llmtk.inference import LanguageModel, serving
from llmtk.models.saving import save_model
from llmtk.ports import LOCAL, check_port, free_port

QUESTIONS = [problem.prompt for problem in addition.problems("held-out", 3)]
Llmtk = Callable[..., tuple[int, str, str]]
STAND_IN = """
import http.server, os, signal, sys, threading

class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        threading.Timer(0.2, then).start()

def then():
    if ends == "itself":
        os._exit(3)
    os.kill(os.getppid(), signal.Signals[ends])

ends, port = sys.argv[1], int(sys.argv[2])
http.server.HTTPServer(("127.0.0.1", port), Healthy).serve_forever()
"""
"""A server that answers, and then ends, or sends a signal to who has started it."""


def asked(question: str) -> list[Any]:
    return [{"role": "user", "content": question}]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """OpenAI's client of the built-in model, which transformers' server serves."""
    if lacking := [name for name in serving.NEEDED["transformers"][0] if find_spec(name) is None]:
        pytest.skip(f"{', '.join(lacking)} is not installed")
    import openai

    cache, port = tmp_path_factory.mktemp("cache"), free_port()
    served = serving.lay_out("builtin", cache)
    command = serving.command_of("transformers", served, LOCAL, port, ["--device", "cpu"])
    with serving.running(command, served, cache) as server:
        serving.wait_for(server, LOCAL, port)
        yield openai.OpenAI(base_url=f"http://{LOCAL}:{port}/v1", api_key="none", max_retries=0)
    assert server.returncode is not None
    check_port(LOCAL, port, "the port")


def test_openais_client_hears_what_predict_writes(client: Any, model: LanguageModel) -> None:
    expected = model.answer(QUESTIONS, temperature=0.0, max_new_tokens=8)
    how = {"model": "builtin", "temperature": 0.0, "max_tokens": 8}
    answers = [client.chat.completions.create(messages=asked(question), **how) for question in QUESTIONS]
    assert [answer.choices[0].message.content for answer in answers] == expected
    assert {answer.choices[0].finish_reason for answer in answers} == {"stop"}
    pieces = [
        [
            piece.choices[0].delta.content or ""
            for piece in client.chat.completions.create(messages=asked(q), stream=True, **how)
        ]
        for q in QUESTIONS
    ]
    assert ["".join(texts) for texts in pieces] == expected
    assert max(len(list(filter(None, texts))) for texts in pieces) > 1, "in pieces"
    (row,) = [
        model.generate([model.tokenizer("37+48=")["input_ids"]], model.sampling(temperature=0.0, max_new_tokens=4))
    ]
    plain = client.completions.create(prompt="37+48=", **how | {"max_tokens": 4})
    assert plain.choices[0].text == model.text(row[0][0])
    assert [each.id for each in client.models.list()] == ["builtin"]


def test_a_clients_temperature_is_heard(client: Any) -> None:
    said = {
        client.chat.completions.create(
            model="builtin", messages=asked(QUESTIONS[0]), temperature=2.0, max_tokens=4, seed=seed
        )
        .choices[0]
        .message.content
        for seed in range(6)
    }
    assert len(said) > 1


def adapter(folder: Path) -> Path:
    """Write an adapter on the built-in model that changes what it says."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load("builtin")
    model.generation_config.max_new_tokens = None
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    save_model(adapted, tokenizer, folder)
    return folder


def test_an_adapter_is_served_merged(tmp_path: Path) -> None:
    served = serving.lay_out(str(adapter(tmp_path / "my adapter @2:1")), tmp_path / "cache")
    assert (served.name, served.chats) == ("my-adapter-2-1", True)
    assert served.folder is not None
    ids = torch.tensor([[5, 9, 30, 12]])
    folders = served.folder, tmp_path / "my adapter @2:1", "builtin"
    merged, adapted, base = (load(folder)[0](ids).logits.float() for folder in folders)
    torch.testing.assert_close(merged, adapted, rtol=0.02, atol=0.05)  # the base is saved in bfloat16
    assert (adapted - base).abs().max() > 0.5
    assert not (served.folder / "adapter_config.json").exists()


def test_a_model_without_a_template_is_asked_for_completions(tmp_path: Path) -> None:
    model, tokenizer = load("builtin")
    tokenizer.chat_template = None
    save_model(model, tokenizer, tmp_path / "plain")
    served = serving.lay_out(str(tmp_path / "plain"), tmp_path / "cache")
    assert 'client.completions.create(model="plain", prompt="Once")' in how_to_ask(served, LOCAL, 8000)


def test_what_the_makers_say_of_sampling_stands(tmp_path: Path) -> None:
    save_model(*load("builtin"), tmp_path / "model")  # type: ignore[arg-type]
    file = tmp_path / "model" / "generation_config.json"
    cases: list[tuple[Any, Any]] = [
        ({"do_sample": True, "temperature": 0.6, "eos_token_id": 7}, {"temperature": 0.6, "eos_token_id": [7, 0, 3]}),
        ({}, {"top_k": 0, "eos_token_id": [0, 3]}),
        (None, {"top_k": 0, "eos_token_id": [0, 3]}),
    ]
    for number, (theirs, ours) in enumerate(cases):
        file.unlink() if theirs is None else file.write_text(json.dumps(theirs))
        served = serving.lay_out(str(tmp_path / "model"), tmp_path / str(number))
        assert served.folder is not None
        written = json.loads((served.folder / "generation_config.json").read_text())
        assert written == {"do_sample": True, **ours}
        if theirs is not None:
            assert json.loads(file.read_text()) == theirs, "the model's own stays"


@pytest.fixture
def stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that has a server of our own started, which ends as it says."""
    (tmp_path / "server.py").write_text(STAND_IN)
    monkeypatch.setattr(serving, "NEEDED", {"transformers": ((), "")})

    def make(ends: str) -> None:
        monkeypatch.setattr(
            serving,
            "command_of",
            lambda engine, served, host, port, more: [sys.executable, str(tmp_path / "server.py"), ends, str(port)],
        )

    return make


def test_ctrl_c_ends_the_server(stands_in: Callable[[str], None], llmtk: Llmtk, tmp_path: Path) -> None:
    stands_in("SIGINT")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts tests in the background has it ignored
    port = free_port()
    code, out, err = llmtk("serve", "builtin", "--port", str(port))
    assert (code, err.strip()) == (130, "interrupted")
    command, *told = out.splitlines()
    assert "HF_HUB_OFFLINE=1 HF_HUB_CACHE=" in command
    assert command.endswith(f"{tmp_path}/server.py SIGINT {port}")
    assert told == [
        f"Serving builtin on http://127.0.0.1:{port}/v1; Ctrl-C ends it. From Python, with `import openai`:",
        f'    client = openai.OpenAI(base_url="http://127.0.0.1:{port}/v1", api_key="none")',
        '    client.chat.completions.create(model="builtin", messages=[{"role": "user", "content": "Hello"}])',
    ]
    check_port(LOCAL, port, "--port")
    assert not Path(command.split()[1]).exists()


def test_a_signal_ends_the_server_too(stands_in: Callable[[str], None], llmtk: Llmtk) -> None:
    stands_in("SIGTERM")
    before, port = signal.getsignal(signal.SIGTERM), free_port()
    with pytest.raises(SystemExit) as left:
        llmtk("serve", "builtin", "--port", str(port))
    assert left.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    check_port(LOCAL, port, "--port")


def test_a_server_that_ends_is_a_failure(
    stands_in: Callable[[str], None], llmtk: Llmtk, monkeypatch: pytest.MonkeyPatch
) -> None:
    stands_in("itself")
    port = str(free_port())
    code, _, err = llmtk("serve", "builtin", "--port", port)
    assert (code, err) == (1, "error: the server ended by itself, with status 3; it says why above\n")
    monkeypatch.setattr(serving, "command_of", lambda *_: [sys.executable, "-c", "raise SystemExit(4)"])
    code, _, err = llmtk("serve", "builtin", "--port", port)
    assert (code, err) == (1, "error: the server ended with status 4 before it answered; it says why above\n")


def test_a_server_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "PATIENCE", 0.1)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open('up', 'w'); time.sleep(60)"
    served = serving.Served("a", None, chats=True)
    with serving.running([sys.executable, "-c", stubborn], served, tmp_path) as server:
        while not (tmp_path / "up").exists():
            os.sched_yield()
    assert server.returncode == -signal.SIGKILL


def test_a_second_signal_leaves_no_server_behind(tmp_path: Path) -> None:
    tells = "lambda *_: os.kill(os.getppid(), signal.SIGTERM)"
    stubborn = f"import os, signal, time; signal.signal(signal.SIGTERM, {tells}); open('up', 'w'); time.sleep(60)"
    served = serving.Served("a", None, chats=True)
    with serving.running([sys.executable, "-c", stubborn], served, tmp_path) as server:
        while not (tmp_path / "up").exists():
            os.sched_yield()
    assert server.returncode == -signal.SIGKILL


def test_a_server_ends_with_who_has_started_it(tmp_path: Path) -> None:
    """By SIGKILL too, of which `llmtk serve` hears nothing."""
    program = (
        "import os, sys; from pathlib import Path; from llmtk.inference import serving\n"
        "served = serving.Served('a', None, chats=True)\n"
        "with serving.running([sys.executable, '-c', 'import time; time.sleep(60)'], served, Path()):\n"
        "    os.kill(os.getpid(), 9)"
    )
    # The server writes to the same pipe, which ends when both have: else this runs out of time.
    killed = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, stderr=subprocess.PIPE, timeout=50)
    assert killed.returncode == -signal.SIGKILL


def test_vllm_is_preferred_where_it_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda name: name)
    assert serving.choose_engine() == "vllm"
    served = serving.Served("mine", tmp_path, chats=True, trusted=True)
    words = serving.command_of("vllm", served, LOCAL, 8000, ["--max-model-len", "99"])
    assert words[1:6] == ["-m", "vllm.entrypoints.cli.main", "serve", str(tmp_path), "--served-model-name"]
    assert words[6:] == ["mine", "--host", LOCAL, "--port", "8000", "--trust-remote-code", "--max-model-len", "99"]
    on_the_hub = serving.Served("org/name", None, chats=True)
    assert "org/name" in serving.command_of("transformers", on_the_hub, LOCAL, 8000)
    monkeypatch.setattr(serving, "find_spec", lambda name: None if name == "vllm" else name)
    assert serving.choose_engine() == "transformers"
    with pytest.raises(ConfigurationError, match=r"vllm needs what is not installed: vllm\. pip install vllm"):
        serving.choose_engine("vllm")
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigurationError, match=r"not installed: fastapi, openai, uvicorn\. pip install 'llmtk-core\[serve\]'"
    ):
        serving.choose_engine()


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Return a folder of runs that cannot be served."""
    from transformers import AutoModelForSequenceClassification

    from llmtk.models.checks import resolve

    model, tokenizer = load("builtin")
    judge = AutoModelForSequenceClassification.from_pretrained(resolve("builtin"), num_labels=1)
    save_model(judge, tokenizer, tmp_path / "runs" / "reward")
    (tmp_path / "runs" / "unfinished").mkdir()
    (tmp_path / "runs" / "unfinished" / "run.json").write_text("{}")
    (tmp_path / "runs" / "unfinished" / "config.yaml").write_text("stage: sft\n")
    save_model(model, tokenizer, tmp_path / "base")  # type: ignore[arg-type]
    orphan = adapter(tmp_path / "runs" / "orphan")
    config = json.loads((orphan / "adapter_config.json").read_text())
    (orphan / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(tmp_path / "base")})
    )
    shutil.rmtree(tmp_path / "base")
    return tmp_path / "runs"


def test_what_cannot_be_served_is_refused_before_anything_is_started(
    broken: Path, llmtk: Llmtk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("started"))
    monkeypatch.setattr(serving, "NEEDED", {"transformers": ((), "")})
    for name, said in [
        ("unfinish", "there is no run and no model in"),
        ("unfinished", "is not finished: there is no results.json. Go on with --resume"),
        ("reward", "has a head of one value (it is a reward model, or the like), and writes no text"),
        ("orphan", "which is not there any more"),
    ]:
        code, out, err = llmtk("serve", str(broken / name), "--port", str(free_port()))
        assert (code, out) == (2, ""), name
        assert said in err
        assert "Traceback" not in err


def test_a_port_that_cannot_be_had_is_refused(llmtk: Llmtk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "NEEDED", {"transformers": ((), "")})
    with socket.socket() as taken:
        taken.bind((LOCAL, 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, _, err = llmtk("serve", "builtin", "--port", port)
    assert (code, err) == (
        2,
        f"error: --host 127.0.0.1 --port {port} cannot be had: Address already in use. Give another\n",
    )
    for words in (["--port", "70000"], ["--port", "0"], ["--engine", "gpt"]):
        assert llmtk("serve", "builtin", *words)[0] == 2
