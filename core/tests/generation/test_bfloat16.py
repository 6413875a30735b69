"""Under autocast: a weight is cast once for all tokens, and log-probs are as near to float32 as scoring's are."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmtk import Sampling
from llmtk.generation import generate

from .kit import PROMPTS, adapted, build, logps_of, make_run, patched, rescored

SETTINGS = {"n": 2, "max_new_tokens": 20, "batch_size": 3, "seed": 1}


class Casts(TorchDispatchMode):
    """Counts casts to bfloat16 of a model's own matrices."""

    def __init__(self, model):
        super().__init__()
        self.names = {parameter.data_ptr(): name for name, parameter in model.named_parameters() if parameter.ndim > 1}
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16:
            self.counts[self.names.get(args[0].data_ptr(), "other")] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("root", [lambda: build("llama"), lambda: build("gpt2"), lambda: build("gemma2")])
def test_each_weight_is_cast_once_a_call(root, packed):
    """All matrices but embeddings that are only looked up."""
    root = patched(root())
    with torch.autocast("cpu", torch.bfloat16), Casts(root) as casts:
        generate(root, PROMPTS, Sampling(**SETTINGS), packed=packed)
    assert casts.counts.pop("other") > 100
    assert set(casts.counts.values()) == {1}
    looked_up = {name for name in casts.names.values() if "embed" in name or "wpe" in name or "wte" in name}
    assert set(casts.names.values()) - set(casts.counts) <= looked_up


def test_a_run_casts_each_weight_once_a_call(tmp_path):
    """The root's forward has an autocast of its own there, which must not let go what is kept outside it."""
    run = make_run(tmp_path / "run", bf16=True)
    run._set_up()
    run.generate(PROMPTS, run.sampling(max_new_tokens=2))
    for _ in range(2):
        with Casts(run.model) as casts:
            run.generate(PROMPTS, run.sampling(n=2, max_new_tokens=20, batch_size=3))
        casts.counts.pop("other")
        assert len(casts.counts) >= 14
        assert set(casts.counts.values()) == {1}


def test_the_next_call_sees_what_an_optimizer_has_changed_in_between(tmp_path):
    run = make_run(tmp_path / "run", bf16=True)
    run._set_up()
    sampling = run.sampling(temperature=0, max_new_tokens=8, stop_tokens=())
    before = run.generate(PROMPTS, sampling)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.mul_(-1.5)
    after = run.generate(PROMPTS, sampling)
    assert [a.tokens for (a,) in after] != [a.tokens for (a,) in before]
    with run.backend.autocast():
        torch.testing.assert_close(logps_of(after), rescored(run.model, PROMPTS, after), rtol=0, atol=3e-2)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt2", "qwen3", "opt"])
def test_log_probs_are_no_further_from_float32_than_plain_scorings(kind, tuning):
    """Not of mixtures of experts, where rounding takes another expert now and then, on either side."""
    root = patched(build(kind) if tuning == "full" else adapted(build(kind)))
    with torch.autocast("cpu", torch.bfloat16):
        answers = generate(root, PROMPTS, Sampling(**SETTINGS | {"n": 4}), packed=True)
        plain = rescored(root, PROMPTS, answers).float()
    exact = rescored(root, PROMPTS, answers)
    found, expected = (logps_of(answers) - exact).norm().item(), (plain - exact).norm().item()
    print(f"{kind}, {tuning}: generation / plain scoring {found / expected:.2f}")
    assert expected > 0
    assert found <= 1.5 * expected
