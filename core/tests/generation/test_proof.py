"""What is wrong in packed generation is caught before it writes, and the plain way is taken, which is said."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmtk import Sampling
from llmtk.generation import cache, generate, packed
from llmtk.generation.cache import Cache, Step
from llmtk.generation.proof import why_not_packed

from .kit import PACKED, PROMPTS, adapted, build, forwards, make_run, patched, told

WINDOWED = PACKED["mistral"] | {"sliding_window": 4096}
"""A window that no short completion meets: the twin's shows it."""


@pytest.mark.parametrize("kind", PACKED)
def test_packed_generation_is_proven_on_every_architecture_that_is_scored_packed(kind):
    assert why_not_packed(patched(build(kind))) is None


@pytest.mark.parametrize("root", [lambda: adapted(build("llama")), lambda: build("qwen3").bfloat16()])
def test_it_is_proven_with_an_adapter_and_in_bfloat16(root):
    assert why_not_packed(patched(root())) is None


def change(name, value):
    """Change a setting of attention in each step."""

    def breaks(monkeypatch):
        attend = Step.attend
        monkeypatch.setattr(Step, "attend", lambda self, *states, **kw: attend(self, *states, **(kw | {name: value})))

    return breaks


def scale(factor):
    """Multiply what attention gives in each step."""

    def breaks(monkeypatch):
        attend = Step.attend
        monkeypatch.setattr(Step, "attend", lambda self, *states, **kw: attend(self, *states, **kw) * factor)

    return breaks


def first_prompt_for_all(monkeypatch):
    of_prompts = cache.Step.attend

    def attend(self, *args, **settings):
        if not self._in_place:
            self._back.fill_(0)
        return of_prompts(self, *args, **settings)

    monkeypatch.setattr(cache.Step, "attend", attend)


def neighbours_slots(monkeypatch):
    """Those that move up when others leave keep their keys where they were."""
    remove = Cache.remove

    def forgetful(self, slots):
        layers, self.layers = self.layers, {}
        remove(self, slots)
        self.layers = layers

    monkeypatch.setattr(Cache, "remove", forgetful)


BROKEN = {
    "ignored window": ("mistral", WINDOWED, change("sliding_window", None)),
    "window off by one": ("mistral", WINDOWED, change("sliding_window", 9)),
    "ignored window of some layers": ("gemma2", PACKED["gemma2"], change("sliding_window", None)),
    "dropped cap": ("gemma2", PACKED["gemma2"], change("softcap", None)),
    "dropped scale": ("granite", PACKED["granite"], change("scaling", None)),
    "another prompt's keys": ("llama", None, first_prompt_for_all),
    "another sequence's keys": ("llama", None, neighbours_slots),
    "a little off": ("gpt2", None, scale(1.01)),
    "not a number": ("llama", None, scale(float("nan"))),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_caught(what, monkeypatch):
    kind, fields, breaks = BROKEN[what]
    root = patched(build(kind, fields))
    assert why_not_packed(root) is None, "it is whole"
    breaks(monkeypatch)
    assert "packed generation's log-probs of a tiny twin of it are off by" in why_not_packed(root)


def test_what_is_broken_in_the_model_alone_is_caught_too(monkeypatch):
    root = patched(build("llama"))
    attend = Step.attend

    def wrong(self, module, *states, **settings):
        return attend(self, module, *states, **settings) * (1.05 if module in set(root.modules()) else 1)

    monkeypatch.setattr(Step, "attend", wrong)
    assert "log-probs of the model are off by" in why_not_packed(root)


def test_a_model_that_says_nan_is_caught():
    root = patched(build("llama"))
    root.model.norm.weight.data.fill_(float("nan"))
    assert "of the model are off by inf" in why_not_packed(root)


def test_an_unforeseen_error_is_a_reason_and_no_crash(monkeypatch):
    def fail(*_):
        raise KeyError("unheard of")

    root = patched(build("llama"))
    monkeypatch.setattr(Cache, "add_prompts", fail)
    assert why_not_packed(root) == "packed generation cannot be set up on it (KeyError: 'unheard of')"


@pytest.mark.parametrize("breaks", [change("sliding_window", 2), scale(float("nan"))])
def test_a_run_takes_the_plain_way_and_says_so(breaks, tmp_path, monkeypatch, capsys):
    breaks(monkeypatch)
    run = make_run(tmp_path / "run")
    run._set_up()
    assert run.forward.scorers[None].packed
    sampling = Sampling(n=2, max_new_tokens=6)
    answers = [run.generate(PROMPTS, sampling) for _ in range(2)]
    assert told(answers[0]) == told(answers[1]) == told(generate(run.model, PROMPTS, sampling))
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("Generation takes the plain way: packed generation's log-probs of a tiny twin") == 1


def test_generators_modes_weights_and_gradients_are_left_alone():
    root = patched(build("gpt2", attn_pdrop=0.0, resid_pdrop=0.3, embd_pdrop=0.3)).train()
    root.transformer.h[0].eval()
    modes = [module.training for module in root.modules()]
    before = copy.deepcopy(root.state_dict())
    torch.manual_seed(3)
    random = torch.get_rng_state()
    assert why_not_packed(root) is None
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in root.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in root.state_dict().items())
    assert all(parameter.grad is None for parameter in root.parameters())


def test_it_costs_little(monkeypatch):
    """Of the model itself, about as many forwards as two short completions need; of the built-in model, no time."""
    from llmtk.models.checks import resolve

    root = patched(AutoModelForCausalLM.from_pretrained(resolve("builtin")))
    calls = []
    hook = root.register_forward_pre_hook(lambda *_: calls.append(1))
    began = time.process_time()
    assert why_not_packed(root) is None
    seconds = time.process_time() - began
    hook.remove()
    print(f"the proof of generation of the built-in model took {len(calls)} forwards and {seconds:.3f} s")
    assert len(calls) <= 30
    assert seconds < 5


def test_the_proof_lets_sequences_wait_leave_and_enter(monkeypatch):
    """What it does not do, it cannot prove."""
    root = patched(build("llama"))
    left = []
    remove = Cache.remove
    monkeypatch.setattr(Cache, "remove", lambda self, slots: left.append(len(slots)) or remove(self, slots))
    entered = []
    admit = packed.Writer._admit
    monkeypatch.setattr(packed.Writer, "_admit", lambda self: entered.append(len(self.rows)) or admit(self))
    with forwards(root):
        assert why_not_packed(root) is None
    assert max(entered) > 0, "some enter while others go on"
