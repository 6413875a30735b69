"""`llmtk launch`: the command that it makes of its options, and what it refuses. tests/distributed runs one."""

import shlex
import socket
import sys
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser


def launched(llmtk: Any, *words: str) -> Any:
    """Return what Accelerate's own parser makes of the command that is printed."""
    code, out, err = llmtk("launch", "--dry-run", *words)
    assert (code, err) == (0, "")
    python, flag, module, *options = shlex.split(out)
    assert (python, flag, module) == (sys.executable, "-m", "accelerate.commands.launch")
    return launch_command_parser().parse_args(options)


def test_words_go_on_to_run_and_options_to_the_launcher(runs: list[Any], llmtk: Any) -> None:
    told = launched(llmtk, "-n", "2", "toy", "a.b=c d", "--resume")
    assert (told.num_processes, told.num_machines, told.machine_rank) == (2, 1, 0)
    assert (told.multi_gpu, told.main_process_ip) == (True, "127.0.0.1")
    assert told.module
    assert (told.training_script, told.training_script_args) == ("llmtk", ["run", "toy", "a.b=c d", "--resume"])
    assert runs == [("toy", {"a": {"b": "c d"}}, "auto")]


def test_one_process_is_no_several(runs: list[Any], llmtk: Any) -> None:
    told = launched(llmtk, "-n", "1", "toy")
    assert (told.num_processes, told.multi_gpu) == (1, False)


def test_machines_are_named(runs: list[Any], llmtk: Any) -> None:
    words = ["-n", "8", "--machines", "2", "--machine-rank", "1", "--main-address", "node0", "toy"]
    told = launched(llmtk, *words)
    assert (told.num_processes, told.num_machines, told.machine_rank) == (8, 2, 1)
    assert (told.main_process_ip, told.main_process_port) == ("node0", 29500)
    assert launched(llmtk, "--main-port", "1234", *words).main_process_port == 1234


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-n", "0", "toy"], "0 is not in the range x>=1"),
        (["-n", "3", "--machines", "2", "toy"], "-n 3: 2 machines cannot share them equally"),
        (["-n", "2", "--machines", "2", "--machine-rank", "2", "toy"], "--machine-rank 2: of 2 machines the last is 1"),
        (["-n", "2", "--machines", "2", "toy"], "--main-address is missing"),
        (["-n", "2", "--main-address", "node0", "toy"], "--main-address is for several machines"),
        (["-n", "2"], "Name a stage: llmtk run STAGE"),
        (["-n", "2", "toy", "none.yaml"], "none.yaml: there is no such configuration file"),
        (["-n", "2", "toy", "--nope"], "No such option '--nope'"),
    ],
)
def test_bad_input_is_told_once_and_nothing_is_started(
    runs: list[Any], llmtk: Any, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.setattr("os.execv", lambda *_: pytest.fail("started"))
    code, _, err = llmtk("launch", *words)
    assert code == 2
    assert said in err
    assert "Traceback" not in err


def test_an_unknown_stage_is_told_before_anything_is_started(
    install: Any, llmtk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.execv", lambda *_: pytest.fail("started"))
    install("llmtk-stage-toy", "toy")
    code, _, err = llmtk("launch", "-n", "2", "tox")
    assert code == 2
    assert "Installed stages: toy." in err


def test_a_port_in_use_is_refused(runs: list[Any], llmtk: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, _, err = llmtk("launch", "-n", "2", "--main-port", port, "toy")
    assert (code, err) == (2, f"error: --main-port {port} cannot be had: Address already in use. Give another\n")


def test_without_a_number_it_counts_gpus(runs: list[Any], llmtk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert launched(llmtk, "toy").num_processes == 4
    assert launched(llmtk, "--machines", "2", "--main-address", "node0", "toy").num_processes == 8
    assert "-n: 5 processes on this machine, which has 4 GPUs. Give fewer" in llmtk("launch", "-n", "5", "toy")[2]
    assert launched(llmtk, "-n", "8", "--machines", "2", "--main-address", "node0", "toy").num_processes == 8
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert "-n is missing: this machine has no GPU to count" in llmtk("launch", "toy")[2]
