"""Who writes: the built-in engine with the run's own policy, and engines that distributions bring."""

from __future__ import annotations

import sys
import textwrap

import pytest

from llmtk import ConfigurationError, PluginError, Sampling, hookimpl
from llmtk.generation import generate, packed

from .kit import flat, make_run, told

PROMPTS = [[40, 50, 60], [70]]
ECHO = """
    from llmtk.generation import Completion, Segment

    class Echo:
        def __init__(self, run, options):
            self.run, self.options, self.calls = run, options, []

        def generate(self, prompts, sampling, seeds=None):
            self.calls.append((list(prompts), sampling, seeds))
            segment = Segment([self.options["say"]], [-0.5], version=self.run.step)
            return [[Completion((segment,), "stop")] * sampling.n for _ in prompts]

    class Nothing:
        def __init__(self, run, options): ...
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that makes a distribution with an engine."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])

    def make(name="echo", value="echo_engine:Echo", module=ECHO, requires="llmtk-core>=0.1,<0.2"):
        folder = site / f"llmtk_{name}-1.0.dist-info"
        folder.mkdir()
        about = (
            f"Metadata-Version: 2.1\nName: llmtk-{name}\nVersion: 1.0\nSummary: An engine\nRequires-Dist: {requires}\n"
        )
        (folder / "METADATA").write_text(about)
        (folder / "entry_points.txt").write_text(f"[llmtk.generators]\n{name} = {value}\n")
        (site / "echo_engine.py").write_text(textwrap.dedent(module))
        monkeypatch.delitem(sys.modules, "echo_engine", raising=False)

    return make


def run_with(path, engine=None, **sections):
    generation = {"engine": engine, "options": {"say": 65}} if engine else {}
    return make_run(path / "run", sections={"generation": generation, **sections})


def test_an_installed_engine_writes_for_the_run_and_for_its_users(install, tmp_path):
    install()
    run = run_with(tmp_path, "echo")
    run.train()
    sampling = Sampling(n=2)
    answers = run.generate(PROMPTS, sampling, [3, 4])
    assert told(answers) == [[([65], "stop")] * 2] * 2
    assert flat(answers)[0].segments[0].version == 4
    assert run.engine.calls == [(PROMPTS, sampling, [3, 4])]
    assert run.engine.options == {"say": 65}
    assert run.predict("to be") == run.tokenizer.decode([65])


def test_an_unknown_engine_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(PluginError, match=r"generation\.engine: Unknown generator 'ecko'"):
        run_with(tmp_path, "ecko").train()
    assert not (tmp_path / "run").exists()


def test_an_engine_for_another_core_is_refused_before_anything_is_loaded(install, tmp_path):
    install(requires="llmtk-core>=99")
    with pytest.raises(PluginError, match="is for another core"):
        run_with(tmp_path, "echo").train()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("value", "module", "words"),
    [
        ("echo_engine:Nothing", ECHO, "gave Nothing, which has no `generate`"),
        (
            "echo_engine:Echo",
            "raise ValueError('no device')",
            "cannot be imported: echo_engine raised ValueError: no device",
        ),
        ("echo_engine:Other", ECHO, "has no 'Other'"),
    ],
)
def test_what_is_no_engine_is_refused(install, tmp_path, value, module, words):
    install(value=value, module=module)
    run = run_with(tmp_path, "echo")
    run._set_up()
    with pytest.raises(PluginError, match=words):
        run.generate(PROMPTS, Sampling())


def test_options_without_an_engine_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="options are for installed engines"):
        run_with(tmp_path, generation={"options": {"say": 1}})


def test_the_built_in_engine_writes_packed_with_the_policy_of_the_step(tmp_path, monkeypatch):
    run = run_with(tmp_path, generation={"batch_size": 3})
    run.train()
    writers = []
    writer = packed.Writer
    monkeypatch.setattr(packed, "Writer", lambda *given: writers.append(given) or writer(*given))
    sampling = run.sampling(n=3, max_new_tokens=8, seed=2)
    assert sampling.batch_size == 3
    answers = run.generate(PROMPTS, sampling)
    assert len(writers) == 3, "the proof on twin and model, and the answers"
    assert run.generate(PROMPTS, sampling) == answers
    assert len(writers) == 4, "the proof is made once"
    assert told(answers) == told(generate(run.model, PROMPTS, sampling))
    assert {segment.version for answer in flat(answers) for segment in answer.segments} == {4}


def test_the_built_in_engine_decodes_for_stop_strings(tmp_path):
    run = run_with(tmp_path)
    run._set_up()
    (whole,) = flat(run.generate([[70]], run.sampling(max_new_tokens=12, stop_tokens=())))
    letters = [run.tokenizer.decode([token]) for token in whole.tokens]
    at = next(i for i, letter in enumerate(letters) if i and "\N{REPLACEMENT CHARACTER}" not in letter)
    sampling = run.sampling(max_new_tokens=12, stop_tokens=(), stop_strings=(letters[at],))
    (cut,) = flat(run.generate([[70]], sampling))
    assert cut.stopped == "stop"
    assert cut.tokens == whole.tokens[: letters.index(letters[at]) + 1]


def test_training_goes_on_as_if_nothing_had_been_written(tmp_path):
    """Neither the weights that autocast keeps, nor any generator, is felt by the next step."""

    class Writes:
        name = "writes"

        @hookimpl
        def after_update(self, run, step):
            answers.append(run.generate(PROMPTS, run.sampling(max_new_tokens=4)))

    answers = []
    losses = [
        make_run(tmp_path / f"{len(plugins)}", plugins=plugins, bf16=True).train().final_loss
        for plugins in ((), (Writes(),))
    ]
    assert len(answers) == 4
    assert losses[0] == losses[1]


def test_a_run_whose_model_is_scored_padded_writes_the_plain_way(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "Writer", None)
    run = make_run(tmp_path / "run", scoring="padded")
    run._set_up()
    assert told(run.generate(PROMPTS, Sampling(n=2))) == told(generate(run.model, PROMPTS, Sampling(n=2)))
