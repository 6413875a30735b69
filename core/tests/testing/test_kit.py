"""The conformance kit: a sound stage passes, and each broken one is caught by the check that is about it."""

from __future__ import annotations

import importlib.util
import pickle
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file

from llmtk import ConfigurationError, Group, Round, Run, Sequence
from llmtk.testing import CHECKS, ConformanceError, Verdict, check_stage, outcomes, two_ranks
from llmtk.testing.training import BRIEF, _is_pickle
from llmtk.testing.trial import find

# By its place, as the kit's second process finds it: the tests are no package.
_spec = importlib.util.spec_from_file_location("broken", Path(__file__).with_name("broken.py"))
assert _spec is not None
assert _spec.loader is not None
broken = sys.modules["broken"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(broken)


REFUSED = {"AroundThatReturnsNothing", "HookWithADefault", "MisspeltHook", "NotASum", "StateThatIsNoData"} | {
    "ExportsNoModel",
    "NoRowsOnARank",
    "WeightKnownTooLate",
}
"""Those that the core refuses, in an error that says what to do."""


@pytest.mark.parametrize("check", [pytest.param(name, marks=[pytest.mark.slow] * (name == "ranks")) for name in CHECKS])
def test_a_sound_stage_passes(check: str) -> None:
    (outcome,) = outcomes(broken.Sound, check)
    wanted = Verdict.SKIPPED if check == "listed" else Verdict.PASSED
    assert outcome.verdict is wanted, outcome.message


def _cases() -> list[Any]:
    """Return the broken stages; those that two ranks tell are slow but for one, and tested by `make conform`."""
    slow = {one for one in broken.BROKEN if one.caught_by == "ranks"} - {broken.DenominatorOfARank}
    return [pytest.param(one, id=one.__name__, marks=[pytest.mark.slow] * (one in slow)) for one in broken.BROKEN]


@pytest.mark.parametrize("stage", _cases())
def test_a_broken_stage_is_caught_by_the_check_that_is_about_it(stage: type) -> None:
    (outcome,) = outcomes(stage, stage.caught_by)
    assert outcome.verdict is Verdict.FAILED
    assert outcome.message
    assert not outcome.message.startswith("it crashes")
    assert outcome.mend or stage.__name__ in REFUSED, "a newcomer is told what to do"


def test_every_check_catches_something() -> None:
    assert len(broken.BROKEN) >= 20
    assert {stage.caught_by for stage in broken.BROKEN} >= CHECKS.keys() - {"listed"}


def test_a_failure_is_an_assertion_with_the_mend() -> None:
    with pytest.raises(
        ConformanceError, match=r"(?s)1 of 2 checks failed.*loss: its loss is finite.*Mend: Return sums"
    ):
        check_stage(broken.NoGradient, ["declared", "loss"])


def test_a_stage_that_no_run_would_take_is_told_once() -> None:
    found = list(outcomes(broken.MisspeltHook, ["declared", "loss", "demo"]))
    assert [one.check for one in found] == ["declared"]
    assert "resembles the hook compute_loss" in found[0].message


def test_a_crash_is_told_once_with_its_line() -> None:
    class Crashes(broken.Sound):
        def compute_loss(self, run, batch):
            return run.score(batch).logp

    first, second = outcomes(Crashes, ["loss", "cut"])
    assert re.match(r"it crashes: AttributeError: 'Scores' .* \(test_kit\.py:\d+, in compute_loss\)", first.message)
    assert "--debug" in first.mend
    assert second.message == "as told of the check 'loss'"


def test_a_stage_that_ends_the_program_fails() -> None:
    class Exits(broken.Sound):
        def demo(self):
            raise SystemExit

        def compute_loss(self, run, batch):
            raise SystemExit

    found = list(outcomes(Exits, ["loss", "demo"], rows=broken.ROWS))
    assert [one.verdict for one in found] == [Verdict.FAILED] * 2


def test_a_column_that_rows_do_not_have_is_told_with_those_that_they_have() -> None:
    class Asks(broken.Sound):
        def group(self, row):
            return row["chosen_ids"]

    (found,) = outcomes(Asks, "loss")
    assert "'chosen_ids'" in found.message
    assert "input_ids, targets" in found.mend


def test_a_key_that_no_row_was_asked_for_is_not_blamed_on_the_rows() -> None:
    class Looks(broken.Sound):
        def group(self, row):
            return {"a": 1}["b"]

    (found,) = outcomes(Looks, "loss")
    assert re.match(r"it crashes: KeyError: 'b' \(test_kit\.py:\d+, in group\)", found.message)


def test_options_that_only_a_hook_of_the_loop_or_a_dump_reads_are_not_ignored() -> None:
    class OnlySometimes(broken.Sound):
        class Options(broken.Sound.Options):
            """Two more."""

            decay: float = 0.9
            """Of an average."""
            kind: str = "a"
            """Written into the model's folder."""

        def after_update(self, run, step):
            self.average = self.options.decay

        def export_model(self, run, path):
            super().export_model(run, path)
            (path / "kind.txt").write_text(self.options.kind)

    class Dumped(broken.IgnoredOption):
        def prepare_batch(self, run, rows):
            assert self.options.model_dump()
            return super().prepare_batch(run, rows)

    for stage in (OnlySometimes, Dumped):
        (found,) = outcomes(stage, "options")
        assert found.verdict is Verdict.PASSED, found.message


@pytest.mark.parametrize(("learnt", "verdict"), [(True, Verdict.PASSED), (False, Verdict.FAILED)])
def test_the_stop_token_that_a_policy_writes_is_to_be_a_target(learnt: bool, verdict: Verdict) -> None:
    class Writes(broken.Sound):
        row_types = ("prompt",)
        needs = frozenset({"generation"})

        def prepare_batch(self, run, rows):
            (stop, *_) = run.sampling().stop_tokens
            return Round.of([self.written(row, stop) for row in rows])

        def written(self, row, stop):
            targets = [False] * len(row["prompt_ids"]) + [True, learnt]
            return Group(
                [Sequence([*row["prompt_ids"], 65, stop], targets)], {"tokens": sum(targets)}, place=row["place"]
            )

    (found,) = outcomes(Writes, "stop", rows=[{"prompt": f"{n}"} for n in range(24)])
    assert found.verdict is verdict, found.message


def test_options_are_given_to_the_demo_too() -> None:
    (found,) = outcomes(broken.Sound, "demo", options={"weight": 0.0})
    assert found.verdict is Verdict.FAILED


def test_a_stage_that_stops_its_runs_early_passes() -> None:
    class Stops(broken.Sound):
        def should_stop(self, run, step):
            return "enough" if step.step == 2 else None

    (found,) = outcomes(Stops, "resume")
    assert found.verdict is Verdict.PASSED, found.message
    Stops.should_stop = lambda self, run, step: "enough"
    (found,) = outcomes(Stops, "resume")
    assert found.verdict is Verdict.SKIPPED, found.message


@pytest.mark.parametrize("declared", [{"row_types": None}, {"needs": None}, {"may_change": ("bta",)}, {"head": "valu"}])
def test_a_declaration_of_no_right_kind_is_told_once(declared: dict[str, Any]) -> None:
    found = list(outcomes(type("Declares", (broken.Sound,), declared), ["declared", "loss"]))
    assert len(found) == 1
    assert f" {next(iter(declared))}" in found[0].message


def test_a_file_that_checks_its_stage_as_it_is_imported_starts_no_processes_without_end(tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    stage = Path(broken.__file__)
    file.write_text(
        f"import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('broken', {str(stage)!r})\n"
        f"broken = sys.modules['broken'] = importlib.util.module_from_spec(spec)\n"
        f"spec.loader.exec_module(broken)\n"
        f"class Mine(broken.Sound): pass\n"
        f"from llmtk.testing import check_stage\n"
        f"open({str(tmp_path / 'imported')!r}, 'a').write('x')\n"
        f"check_stage(Mine, 'ranks')\n"
    )
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, check=False)
    assert 'if __name__ == "__main__":' in done.stderr
    assert len((tmp_path / "imported").read_text()) <= 3


def test_a_class_that_stands_in_no_file_has_no_ranks_to_compare(monkeypatch) -> None:
    typed = types.ModuleType("typed")
    monkeypatch.setitem(sys.modules, "typed", typed)
    (found,) = outcomes(type("Typed", (broken.Sound,), {"__module__": "typed"}), "ranks")
    assert (found.verdict, "in no file" in found.message) == (Verdict.SKIPPED, True)


@pytest.mark.parametrize(
    ("better_at", "ran", "needs"),
    [
        (1, [BRIEF], ()),
        (1, [BRIEF // 4], ("generation",)),
        pytest.param(BRIEF + 1, [BRIEF, BRIEF + 20], (), marks=pytest.mark.slow),
        (BRIEF + 21, [], ()),
    ],
)
def test_a_long_demo_is_tried_in_brief_and_is_judged_by_all_of_it(
    better_at: int, ran: list[int], needs: tuple[str, ...]
) -> None:
    seen: list[int] = []

    class Long(broken.Sound):
        def demo(self):
            def measure(run) -> float:
                seen.append(run.step)
                return float(run.step >= better_at)

            train = {"max_steps": BRIEF + 20, "per_device_train_batch_size": 1}
            return replace(super().demo(), config={"train": train}, measure=measure, higher_is_better=True)

    Long.needs = frozenset(needs)
    (found,) = outcomes(Long, "demo")
    assert found.verdict is (Verdict.PASSED if ran else Verdict.FAILED), found.message
    assert [step for step in seen if step] == (ran or [BRIEF, BRIEF + 20])


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_safetensors_file_whose_header_is_as_long_as_a_pickle_begins_is_none(tmp_path: Path, length: int) -> None:
    file = tmp_path / "model.safetensors"
    for filler in range(length):
        save_file({"x": torch.ones(1)}, file, metadata={"filler": "x" * filler})
        if int.from_bytes(file.read_bytes()[:8], "little") == length:
            break
    assert file.read_bytes()[0] == 0x80
    assert not _is_pickle(file)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_known_whatever_it_is_called(tmp_path: Path, protocol: int) -> None:
    file = tmp_path / "data"
    file.write_bytes(pickle.dumps({"x": [1.0, "a"], "path": tmp_path}, protocol))
    assert _is_pickle(file)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"2.", b"0000.", b"I am a note.\n", b'{"N": 1}', b"\x8e\0\0\0\0\0\0\0{", b"N.\nmore"]
)
def test_what_is_no_pickle_is_taken_for_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.bin").write_bytes(content)
    assert not _is_pickle(tmp_path / "data.bin")


def test_arrays_of_objects_are_pickles(tmp_path: Path) -> None:
    np.save(tmp_path / "plain.npy", np.ones(3))
    np.savez(tmp_path / "plain.npz", one=np.ones(3))
    np.save(tmp_path / "objects.npy", np.array({"weight": 1}))
    np.savez(tmp_path / "objects.npz", one=np.array([{}, "a"], dtype=object))
    torch.save({"x": torch.ones(1)}, tmp_path / "weights")
    torch.save({"x": torch.ones(1)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    assert [file.name for file in sorted(tmp_path.iterdir()) if _is_pickle(file)] == [
        "objects.npy", "objects.npz", "old", "weights",
    ]  # fmt: skip


def test_another_process_finds_a_class_by_its_module_or_its_file(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "kit_package").mkdir()
    (tmp_path / "kit_package" / "__init__.py").write_text("")
    (tmp_path / "kit_package" / "parts.py").write_text("class Part: pass\n")
    file = tmp_path / "kit_package" / "stage.py"
    file.write_text("from .parts import Part\n\nclass Outer:\n    class Inner(Part): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find(str(file), "kit_package.stage", "Outer.Inner").__module__ == "kit_package.stage"
    plain = tmp_path / "kit_package" / "parts.py"
    assert find(str(plain), "not_there.parts", "Part").__name__ == "Part"


def test_a_rank_that_hangs_is_told_and_ended(monkeypatch) -> None:
    monkeypatch.setattr(two_ranks, "LIMIT", 0.0)
    found = outcomes(broken.Sound, ["declared", "ranks"])
    next(found)
    beside = psutil.Process().children(recursive=True)
    for process in beside:
        process.suspend()  # it heeds no signal but the one that kills
    monkeypatch.setattr(two_ranks, "ENDING", 0.1)
    assert "hang" in next(found).message
    found.close()
    assert beside
    assert not any(process.is_running() for process in beside)


def test_processes_beside_end_with_the_checks() -> None:
    found = outcomes(broken.Sound, ["declared", "ranks"])
    next(found)
    beside = psutil.Process().children(recursive=True)
    assert beside, "two ranks are under way"
    found.close()
    assert not any(process.is_running() for process in beside)


class FromScratch(broken.Sound):
    """Its demo names a model of its own."""

    def demo(self):
        fields = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        model = {"from_config": fields | {"num_attention_heads": 2}, "tokenizer": {"kind": "byte"}}
        demo = super().demo()
        return replace(demo, config={**demo.config, "model": model})


def test_a_demo_may_name_a_model_of_its_own(tmp_path: Path) -> None:
    assert [one.verdict for one in outcomes(FromScratch, ["loss", "packed"])] == [Verdict.PASSED] * 2
    run = Run(FromScratch, output_dir=str(tmp_path / "run"))
    assert run.config.model.name_or_path is None
    assert Run(broken.Sound, output_dir=str(tmp_path / "other")).config.model.name_or_path == "builtin"


def test_rows_that_no_other_process_can_read_are_told() -> None:
    (found,) = outcomes(broken.Sound, "ranks", rows=[row | {"seen": {1, 2}} for row in broken.ROWS])
    assert "these cannot be written: Object of type set is not JSON serializable" in found.message
    assert found.mend == "Give rows and options of texts, numbers, lists and mappings."


def test_the_mend_of_ranks_says_how_to_draw() -> None:
    assert "pass seeds to run.generate" in CHECKS["ranks"].mend


def test_an_unknown_check_suggests_the_near_one() -> None:
    with pytest.raises(ConfigurationError, match=r"There is no check 'cuts'\. Did you mean 'cut'"):
        check_stage(broken.Sound, "cuts")


def test_the_fixture_is_the_function(check_stage) -> None:
    assert [one.check for one in check_stage(broken.Sound, "declared")] == ["declared"]


def test_the_documents_list_every_check_by_its_title() -> None:
    text = (Path(__file__).parents[3] / "docs" / "writing-a-stage.md").read_text().partition("| check |")[2]
    assert [line for line in text.splitlines() if line.startswith("| ")] == [
        f"| {name} | {one.title} |" for name, one in CHECKS.items()
    ]
