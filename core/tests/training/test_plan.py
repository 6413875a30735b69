"""`llmtk plan`: what a run would do, against what it does; nothing trained, nothing written."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from llmtk import ConfigurationError, LossOutput, Term
from llmtk.cli import call
from llmtk.training.memory import estimate, in_words, state_bytes
from llmtk.training.planning import first_micro_batches

from .kit import EVAL, LLAMA, ROWS, Lm, make
from .test_optimizers import Bowl


class Counting(Lm):
    """Counts the micro-batches of each step, and the tokens of the largest."""

    def __init__(self, options=None):
        super().__init__(options)
        self.micro_batches, self.largest = {}, 0

    def compute_loss(self, run, batch):
        if run.model.training:
            self.micro_batches[run.step] = self.micro_batches.get(run.step, 0) + 1
            self.largest = max(self.largest, len(batch.tokens))
        return super().compute_loss(run, batch)


CUTS = {
    "rows": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    "tokens": {"per_device_train_batch_size": 6, "micro_batch_tokens": 60},
    "one": {"per_device_train_batch_size": 12},
    "by length": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "group_by_length": True},
}


@pytest.mark.parametrize("cut", CUTS)
def test_the_plan_is_what_the_run_does(tmp_path, cut):
    settings = {"num_train_epochs": 1, "max_steps": -1, "warmup_ratio": 0.4} | CUTS[cut]
    plan = make(tmp_path / "run", Counting, **settings).prepare()
    assert not (tmp_path / "run").exists()
    run = make(tmp_path / "run", Counting, **settings)
    assert run.train().steps == plan.max_steps == len(run.stage.micro_batches)
    assert max(run.stage.micro_batches.values()) == plan.micro_batches
    assert plan.global_batch == run.global_rows
    assert plan.warmup_steps == -(-plan.max_steps * 4 // 10)
    assert first_micro_batches(run)[1] == run.stage.largest


def test_weights_gradients_and_state_are_as_they_are_after_a_step(tmp_path):
    run = make(tmp_path / "run", max_steps=1)
    run.train()
    parameters, found = list(run.model.parameters()), estimate(run)
    assert found.weights == found.gradients == sum(p.nbytes for p in parameters) == 4 * run.plan.total_parameters
    state = [v for s in run.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert found.optimizer == pytest.approx(sum(v.nbytes for v in state), rel=1e-2)
    assert found.total == found.weights + found.gradients + found.optimizer + found.activations


def test_an_adapter_has_gradients_and_state_of_its_own_alone(tmp_path, folder):
    run = make(tmp_path / "run", model=folder, sections={"peft": {"r": 2}})
    plan, found = run.prepare(), estimate(run)
    assert found.gradients == 4 * plan.trainable_parameters < found.weights / 5
    assert found.optimizer == pytest.approx(8 * plan.trainable_parameters, rel=1e-2)


@pytest.mark.parametrize(
    ("make_optimizer", "size"),
    [
        (lambda p: torch.optim.AdamW(p), 8),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), 12),
        (lambda p: torch.optim.SGD(p), 0),
        (lambda p: torch.optim.SGD(p, momentum=0.9), 4),
        (lambda p: torch.optim.Adafactor(p), 0.03),
        (lambda p: torch.optim.LBFGS(p), 0),  # it wants a closure: not measured
    ],
)
def test_state_is_measured(make_optimizer, size):
    weight = torch.nn.Parameter(torch.zeros(3))
    assert state_bytes(make_optimizer([weight]), weight) == pytest.approx(size, abs=0.01)


def kept_by_a_plain_forward(model, tokens):
    """Return the bytes that transformers' own forward of one row keeps for its backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def keep(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model.eval()(torch.zeros(1, tokens, dtype=torch.int64)).logits
        logps = logits.float().log_softmax(-1).sum()  # alive, so that no storage is given out again
    assert logps.requires_grad
    return sum(size for place, size in seen.items() if place not in weights)


@pytest.mark.parametrize("scoring", ["padded", "auto"])
def test_activations_are_about_what_a_forward_keeps(tmp_path, scoring):
    rows = [{"text": "x" * 57}] * 4
    run = make(tmp_path / "run", rows=rows, per_device_train_batch_size=1, scoring=scoring)
    run.prepare()
    tokens = len(run.train_rows[0]["input_ids"])
    kept = kept_by_a_plain_forward(run.model, tokens - 1)
    found = estimate(run).activations
    # The packed way makes its logits again, tile by tile.
    assert (0.8 if scoring == "padded" else 0.4) * kept < found < 1.2 * kept


def test_activations_are_fewer_with_checkpointing_and_grow_with_micro_batches(tmp_path):
    found = {}
    for name, more in {
        "one": {"per_device_train_batch_size": 1},
        "six": {},
        "checkpointing": {"gradient_checkpointing": True},
    }.items():
        run = make(tmp_path / name, **{"per_device_train_batch_size": 6} | more)
        run.prepare()
        found[name] = estimate(run).activations
    assert found["one"] * 2 < found["six"]
    assert found["checkpointing"] < found["six"]


def test_of_a_model_that_is_no_language_model_the_rest_is_told(tmp_path):
    run = make(tmp_path / "run", Bowl)
    run.prepare()
    assert estimate(run).activations == 0
    assert estimate(run).weights == 8 * 4


@pytest.mark.parametrize(
    ("size", "words"), [(12, "12 bytes"), (2048, "2.0 KiB"), (5 * 2**20, "5.0 MiB"), (3 * 2**40, "3,072.0 GiB")]
)
def test_bytes_in_words(size, words):
    assert in_words(size) == words


@pytest.fixture
def words(tmp_path):
    """The words of a run of `pt` from scratch."""
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ROWS))
    model = [f"model.from_config={json.dumps(LLAMA)}", "model.tokenizer={kind: byte}"]
    train = ["train.per_device_train_batch_size=2", "train.warmup_steps=1", "train.max_steps=3", "train.bf16=false"]
    return ["pt", f"data.train={file}", "data.max_length=16", *model, *train, f"output_dir={tmp_path / 'run'}"]


def test_the_command_prints_the_plan_and_trains_nothing(tmp_path, words, capsys):
    assert call(["plan", *words]) == 0
    out = capsys.readouterr().out
    assert "steps      3, each of 2 rows in 1 micro-batch on each rank" in out
    assert "schedule   adamw_torch_fused, cosine from 0.0005, after 1 step of warm-up" in out
    assert "memory     about " in out
    assert out.splitlines()[-1].startswith("Nothing was trained")
    assert not (tmp_path / "run").exists()


def test_the_command_gives_json(words, capsys):
    assert call(["plan", *words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["stage"], plan["max_steps"], plan["global_batch"], plan["warmup_steps"]) == ("pt", 3, 2, 1)
    assert plan["memory"]["total"] == sum(size for name, size in plan["memory"].items() if name != "total")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Two distributions, of a plugin each."""
    site = tmp_path / "site"
    for name in ("early", "late"):
        folder = site / f"acme_{name}-2.{len(name)}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: acme-{name}\nVersion: 2.{len(name)}\n")
        (folder / "entry_points.txt").write_text(f"[llmtk.plugins]\n{name} = acme_{name}:Plugin\n")
        (site / f"acme_{name}.py").write_text(
            "from llmtk import hookimpl\nclass Plugin:\n    @hookimpl\n    def run_started(self, run): ...\n"
        )
    monkeypatch.syspath_prepend(site)


def test_who_acts_and_from_where_stands_in_the_plan_and_in_the_runs_facts(tmp_path, words, installed, capsys):
    words += ["plugins.late={}", "plugins.early={}"]
    assert call(["plan", *words, "--json"]) == 0
    acting = [tuple(entry) for entry in json.loads(capsys.readouterr().out)["plugins"]]
    assert acting == [("pt", "llmtk-stage-pt 0.1.0"), ("late", "acme-late 2.4"), ("early", "acme-early 2.5")]

    assert call(["run", *words]) == 0
    out = capsys.readouterr().out
    assert "stage      pt (llmtk-stage-pt 0.1.0): " in out
    assert "plugins    late (acme-late 2.4), early (acme-early 2.5); after the stage, in this order; the last " in out
    assert [tuple(entry) for entry in json.loads((tmp_path / "run" / "run.json").read_text())["plugins"]] == acting


def test_the_command_refuses_what_a_run_would(words, capsys):
    assert call(["plan", *words, "train.optim=lomo"]) == 2
    assert "train.optim: lomo cannot be used" in capsys.readouterr().err
    assert call(["plan"]) == 2


def test_a_plan_precomputes_nothing_and_the_run_does(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("llmtk.run.precompute", lambda run: asked.append(run))

    class Referring(Lm):
        honours = frozenset({"precompute_reference"})
        needs = frozenset({"reference"})

        def compute_loss(self, run, batch):
            logps = run.score(batch).logps
            return LossOutput({"loss": Term(-logps.sum(), "tokens")})

    run = make(tmp_path / "run", Referring, precompute_reference=True, max_steps=1)
    run.prepare()
    assert not asked
    run.train()
    assert asked


def test_a_plan_is_of_a_free_folder(tmp_path):
    make(tmp_path / "run", max_steps=1, eval=EVAL).train()
    with pytest.raises(ConfigurationError, match="holds a run of stage lm"):
        make(tmp_path / "run").prepare()


def test_a_run_that_goes_on_is_planned(tmp_path, words, capsys):
    assert call(["run", *words]) == 0
    written = sorted((file, file.stat().st_mtime_ns) for file in (tmp_path / "run").rglob("*"))
    capsys.readouterr()
    longer = [f"output_dir={tmp_path / 'run'}", "train.max_steps=5"]
    assert call(["plan", "pt", *longer, "--resume"]) == 0
    out = capsys.readouterr().out
    assert "steps      5, each of 2 rows" in out
    assert "going on from checkpoint-000003" in out
    assert call(["plan", "pt", *longer, "train.learning_rate=1", "--resume"]) == 2
    assert "cannot go on with other settings:\n  train.learning_rate: 0.0005 -> 1.0\n" in capsys.readouterr().err
    assert sorted((file, file.stat().st_mtime_ns) for file in (tmp_path / "run").rglob("*")) == written


def test_a_run_that_an_older_version_began_goes_on_without_a_key_that_it_did_not_know(tmp_path, words, capsys):
    assert call(["run", *words]) == 0
    config = tmp_path / "run" / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    assert settings["train"].pop("max_grad_norm") == 1.0
    config.write_text(yaml.safe_dump(settings))
    longer = ["plan", "pt", f"output_dir={tmp_path / 'run'}", "train.max_steps=5", "--resume"]
    assert call(longer) == 0
    assert call([*longer, "train.max_grad_norm=0.5"]) == 2
    assert "train.max_grad_norm: None -> 0.5" in capsys.readouterr().err
