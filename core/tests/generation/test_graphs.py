"""Steps that are replayed, against steps that are computed: on a CPU a tape stands in for the graphs of CUDA."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from llmtk.generation import Sampling, generate
from llmtk.generation.cache import Step
from llmtk.generation.engines import BuiltinEngine
from llmtk.generation.graphs import on_cuda
from llmtk.generation.proof import why_not_packed

from .kit import PACKED, PROMPTS, VOCABULARY, WINDOW, adapted, build, logps_of, make_run, patched, told

STOPS = tuple(range(0, VOCABULARY, 17))
SETTINGS = Sampling(n=3, max_new_tokens=2 * WINDOW, batch_size=4, seed=3, stop_tokens=STOPS)
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")
"""What has the host wait for the device, which no graph can hold."""


class Tape(TorchDispatchMode):
    """Takes operations down with the tensors that they were given, and does them again into the tensors of before.

    As with a graph of CUDA, Python is not run again: what it decided, and any tensor that it made meanwhile of numbers
    of its own, stays as it was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation._schema.name in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {operation._schema.name}")
        result = operation(*args, **(kwargs or {}))
        self.lines.append((operation, args, kwargs or {}, result))
        return result

    def play(self) -> None:
        for operation, args, kwargs, before in self.lines:
            if operation.is_view:
                continue
            now = operation(*args, **kwargs)
            for old, new in zip(tree_flatten(before)[0], tree_flatten(now)[0], strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


class Recorder:
    """Records on tapes, and counts."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, compute: Any) -> Any:
        self.recorded += 1
        with Tape() as tape:
            output = compute()
        output.fill_(torch.nan)  # a graph's recording computes nothing

        def replay() -> Any:
            self.replayed += 1
            tape.play()
            return output

        return replay


def written(root: Any, settings: Sampling = SETTINGS) -> tuple[Any, Any, Recorder]:
    """Return what is written without and with a recorder, and the recorder."""
    recorder = Recorder()
    computed = generate(root, PROMPTS, settings, packed=True)
    return computed, generate(root, PROMPTS, settings, packed=True, record=recorder), recorder


@pytest.mark.parametrize("kind", [*PACKED, "lora"])
def test_replayed_steps_write_what_computed_ones_write(kind: str) -> None:
    """Prompts of many lengths, sequences that end and others that enter, completions beyond windows."""
    expected, found, recorder = written(patched(adapted(build("llama")) if kind == "lora" else build(kind)))
    assert told(found) == told(expected)
    torch.testing.assert_close(logps_of(found), logps_of(expected), rtol=0, atol=2e-5)
    assert recorder.replayed > recorder.recorded > 1


@pytest.fixture(scope="module")
def llama() -> Any:
    return patched(build("llama"))


def test_what_autocast_keeps_is_felt_and_not_cast_again(llama: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        expected, found, recorder = written(llama)
    assert told(found) == told(expected)
    torch.testing.assert_close(logps_of(found), logps_of(expected), rtol=0, atol=2e-2)
    assert recorder.replayed > 0


def test_steps_are_recorded_anew_only_where_there_is_no_room_or_much_too_much(llama: Any) -> None:
    """Of 20 sequences the last has 126 tokens: twice there is no room, and the rows halve four times at most."""
    settings = Sampling(n=4, max_new_tokens=200, seed=1, stop_tokens=(5,))
    expected, found, recorder = written(llama, settings)
    assert told(found) == told(expected)
    longest = max(len(answer.tokens) for copies in found for answer in copies)
    assert longest > 100
    assert recorder.recorded <= 6
    assert recorder.replayed > 0.9 * longest


FORGETFUL = {
    "tokens": lambda step, kept: step.ids.copy_(kept.ids),
    "positions": lambda step, kept: step.positions.copy_(kept.positions),
    "what was written": lambda step, kept: step._at.copy_(kept._at),
    "whose rows they are": lambda step, kept: step._cells.zero_(),
    "what was recorded": lambda step, kept: setattr(step, "_at", step._at.clone()),
}


@pytest.mark.parametrize("what", FORGETFUL)
def test_the_tape_hears_of_what_is_forgotten(llama: Any, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Else the tests above could not fail."""
    fill = Step.fill

    def forgetful(self: Step, tokens: Any) -> None:
        kept = SimpleNamespace(ids=self.ids.clone(), positions=self.positions.clone(), _at=self._at.clone())
        fill(self, tokens)
        FORGETFUL[what](self, kept)

    monkeypatch.setattr(Step, "fill", forgetful)
    expected, found, _ = written(llama)
    assert told(found) != told(expected)


def test_what_waits_for_the_device_is_told_and_not_replayed(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not_packed(llama, record=Recorder()) is None
    bias = Step._bias
    monkeypatch.setattr(Step, "_bias", lambda self, *rest: bias(self, *rest) + self._at.max().item() * 0)
    assert why_not_packed(llama) is None
    assert "not permitted when stream is capturing" in str(why_not_packed(llama, record=Recorder()))


@pytest.mark.parametrize("works", [True, False])
def test_the_engine_takes_graphs_where_they_are_proven_and_says_where_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], works: bool
) -> None:
    run = make_run(tmp_path / "run")
    run.prepare()
    sampling = run.sampling(n=2, max_new_tokens=6)
    expected = run.generate(PROMPTS, sampling)
    recorder = Recorder()

    def fails(compute: Any) -> Any:
        raise RuntimeError("CUDA error: operation not supported")

    monkeypatch.setattr(BuiltinEngine, "_recorder", lambda self: recorder if works else fails)
    run.engine = None
    assert told(run.generate(PROMPTS, sampling)) == told(expected)
    assert (recorder.replayed > 0) is works
    said = capsys.readouterr().out
    assert said.count("Generation takes no CUDA graphs: packed generation cannot be set up on it") == (not works)
    assert "plain way" not in said


def test_graphs_are_for_cuda_and_can_be_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, asked, device, wanted in [
        ("a", True, "cuda", on_cuda),
        ("b", False, "cuda", None),
        ("c", True, "cpu", None),
    ]:
        run = make_run(tmp_path / name, sections={"generation": {"cuda_graphs": asked}})
        monkeypatch.setattr(type(run), "device", torch.device(device))
        assert BuiltinEngine(run)._recorder() is wanted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_graph_of_cuda_writes_what_is_written_without(llama: Any) -> None:
    root = llama.cuda()
    expected = generate(root, PROMPTS, SETTINGS, packed=True)
    found = generate(root, PROMPTS, SETTINGS, packed=True, record=on_cuda)
    assert told(found) == told(expected)
