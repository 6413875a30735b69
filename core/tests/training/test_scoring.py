"""Both ways of scoring, against the model's own logits for one sequence at a time, and transformers' own loss."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from llmtk import Batch, Group, Models, Round, Sequence
from llmtk.scoring import Scorer, choose, kept

from .kit import GPT2, Lm, assert_same_run, group_of, make

ALSO = ("entropy", "vocab_mean", "top1", "logsumexp")


@pytest.fixture
def plain(either):
    """The model as transformers made it: packed scoring patches the other one."""
    return copy.deepcopy(either)


def alone(value):
    return [value]


def scorer_of(way, model) -> Scorer:
    scorer = choose(model, alone) if way == "packed" else Scorer(packed=False)
    assert scorer.packed == (way == "packed"), scorer.why_padded
    return scorer


@pytest.fixture(params=["padded", "packed"])
def scorer(request, either, plain):
    return scorer_of(request.param, either)


def tokens(length: int, seed: int) -> list[int]:
    return torch.randint(4, 260, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def after_first(length: int) -> list[bool]:
    return [False] + [True] * (length - 1)


@pytest.fixture
def batch() -> Batch:
    """Plain sequences of unequal length, a pair behind one prefix, and sequences without targets."""
    some = [False, False, True, False, True, True, False]
    return Batch.collate(
        [
            Group([Sequence(tokens(9, 0), after_first(9))], {}),
            Group(
                [Sequence(tokens(4, 1), [True] * 4, 0), Sequence(tokens(2, 2), [False, True], 0)], {}, [tokens(5, 3)]
            ),
            Group([Sequence(tokens(3, 4), [False] * 3), Sequence([7], [False])], {}),
            Group([Sequence([], [], 0), Sequence([8], [True], 0)], {}, [tokens(3, 8)]),
            Group([Sequence(tokens(7, 5), some), Sequence([9], [True], 1)], {}, [tokens(2, 6), tokens(1, 7)]),
        ]
    )


def flat(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Return each sequence with its prefix in front, and the positions of its targets."""
    segments = torch.split(batch.tokens, batch.segment_lengths.tolist())
    marks = torch.split(batch.targets, batch.segment_lengths.tolist())
    found = []
    for segment, mark, prefix in zip(segments, marks, batch.segment_prefix.tolist(), strict=True):
        if prefix != -2:
            before = segments[prefix].tolist() if prefix >= 0 else []
            found.append((before + segment.tolist(), [len(before) + i for i in mark.nonzero().flatten().tolist()]))
    return found


def naive_logits(model, batch: Batch) -> torch.Tensor:
    """Return the logits at targets in float64, of one sequence at a time and whole."""
    exact = copy.deepcopy(model).double().eval()
    rows = [exact(input_ids=torch.tensor([ids])).logits[0, [t - 1 for t in at]] for ids, at in flat(batch) if at]
    return torch.cat(rows)


def test_scores_are_those_of_each_sequence_alone_in_float64(scorer, either, plain, batch):
    logits = naive_logits(plain, batch)
    logps = logits.log_softmax(-1)
    scores = scorer.score(either, batch, ALSO)
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(scores.logps.double(), logps.gather(1, batch.target_tokens[:, None])[:, 0], **close)
    torch.testing.assert_close(scores.entropy.double(), -(logps.exp() * logps).sum(-1), **close)
    torch.testing.assert_close(scores.vocab_mean.double(), logps.mean(-1), **close)
    torch.testing.assert_close(scores.logsumexp.double(), logits.logsumexp(-1), **close)
    assert torch.equal(scores.top1, logps.argmax(-1) == batch.target_tokens)
    alone = scorer.score(either, batch).logps  # without the table of all log-probs
    torch.testing.assert_close(alone, scores.logps, rtol=0, atol=1e-6)


def test_top1_is_true_where_the_target_is_the_likeliest(scorer, either, plain):
    """With untrained models hardly any target is the likeliest; here each second one is."""
    prompt = tokens(6, 0)
    best = int(plain(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())
    rows = [[*prompt, best], [*prompt, (best + 1) % 260]]
    groups = [Group([Sequence(row, [False] * 6 + [True])], {}) for row in rows]
    assert scorer.score(either, Batch.collate(groups), ["top1"]).top1.tolist() == [True, False]


def test_a_shared_prefix_scores_like_its_copies(scorer, either, batch):
    copies = [Group([Sequence(ids, [i in at for i in range(len(ids))])], {}) for ids, at in flat(batch)]
    torch.testing.assert_close(scorer.score(either, batch).logps, scorer.score(either, Batch.collate(copies)).logps)


def test_a_uniform_model_gives_the_logarithm_of_the_vocabulary(scorer, either, batch):
    either.get_output_embeddings().weight.data.zero_()
    scores = scorer.score(either, batch, ALSO)
    vocabulary = either.config.vocab_size
    for value, wanted in ((scores.logps, -1), (scores.entropy, 1), (scores.vocab_mean, -1)):
        torch.testing.assert_close(value, torch.full_like(value, wanted * math.log(vocabulary)), rtol=1e-6, atol=0)


def test_sums_and_means_are_by_sequence(scorer, either, batch):
    scores = scorer.score(either, batch)
    sums, means, at = [], [], 0
    for _, targets in flat(batch):
        part = scores.logps[at : at + len(targets)].double()
        at += len(targets)
        sums.append(part.sum())
        means.append(part.mean() if len(targets) else torch.tensor(0.0))
    torch.testing.assert_close(scores.sum().double(), torch.stack(sums).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(scores.mean().double(), torch.stack(means).double(), rtol=1e-6, atol=0)


def test_gradients_are_those_of_the_models_own_loss(scorer, either, plain):
    rows = [tokens(length, length) for length in (12, 5, 9)]
    batch = Batch.collate([Group([Sequence(row, after_first(len(row)))], {}) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True)

    def gradients(model, loss):
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    theirs = plain(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    ours = -scorer.score(either, batch).logps.sum() / len(batch.target_tokens)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    wanted, found = gradients(plain, theirs), gradients(either, ours)
    assert wanted.keys() == found.keys()
    for name in wanted:
        scale = float(wanted[name].abs().max())
        assert scale > 0
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("way", ["padded", "packed"])
def test_a_sequence_may_have_one_token_more_than_the_model_has_positions(build, way):
    either = build(GPT2, n_positions=16)
    model = copy.deepcopy(either)
    scorer = scorer_of(way, either)
    fits = Batch.collate([Group([Sequence(tokens(17, 0), after_first(17))], {})])
    torch.testing.assert_close(
        scorer.score(either, fits).logps,
        model(input_ids=fits.tokens[None, :-1]).logits[0].log_softmax(-1).gather(1, fits.tokens[1:, None])[:, 0],
    )
    with pytest.raises(IndexError):
        scorer.score(either, Batch.collate([Group([Sequence(tokens(18, 0), after_first(18))], {})]))


def test_sequences_too_short_to_predict_anything_score_nothing(scorer, either):
    scores = scorer.score(either, Batch.collate([Group([Sequence([5], [False])], {})]), ALSO)
    assert scores.logps.shape == scores.entropy.shape == (0,)
    assert scores.sum().tolist() == scores.mean().tolist() == [0.0]
    scores.logps.sum().backward()  # a rank with such a row alone still takes part in the backward pass
    assert all(p.grad is not None and not p.grad.any() for p in either.parameters())


def test_map_logits_has_the_gradient_of_score(scorer, either, batch):
    def pick(logits, targets, weight):
        return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0] * weight

    weight = torch.linspace(0.5, 2, len(batch.target_tokens))
    gradients = []
    mapped = scorer.map_logits(either, batch, pick, [batch.target_tokens, weight])
    for values in (mapped, scorer.score(either, batch).logps * weight):
        either.zero_grad()
        values.sum().backward()
        gradients.append([p.grad.clone() for p in either.parameters()])
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))


def test_map_logits_may_return_more_than_one_number_a_target(scorer, either, plain, batch):
    found = scorer.map_logits(either, batch, lambda logits: logits.topk(3).values)
    torch.testing.assert_close(found.double(), naive_logits(plain, batch).topk(3).values, rtol=0, atol=1e-5)


def test_what_map_logits_is_given_must_answer_for_each_target(scorer, either, batch):
    with pytest.raises(ValueError, match=r"shape \(\) for \d+ targets"):
        scorer.map_logits(either, batch, lambda logits: logits.sum())


@pytest.mark.parametrize("wrong", [lambda column: column[:-1], lambda column: column.sum()])
def test_a_column_has_a_row_for_each_target(scorer, either, batch, wrong):
    whole = batch.target_tokens
    with pytest.raises(ValueError, match=rf"map_logits: column 1 has .* values for {len(whole)} targets"):
        scorer.map_logits(either, batch, lambda logits, *_: logits, [whole, wrong(whole)])


def test_a_copy_of_a_model_is_a_model_of_its_own(scorer, either, batch):
    """A reference, or an average of weights, is often made like this."""
    with torch.no_grad():
        before = scorer.score(either, batch).logps
        other = copy.deepcopy(either)
        for parameter in either.parameters():
            parameter.mul_(1.5)
        assert not torch.allclose(scorer.score(either, batch).logps, before, atol=1e-3)
        torch.testing.assert_close(scorer.score(other, batch).logps, before)
        ids = batch.tokens[None, :9]
        assert not torch.equal(other(input_ids=ids).logits, either(input_ids=ids).logits)


def test_an_unknown_name_beside_the_log_probs_is_refused(scorer, either, batch):
    with pytest.raises(ValueError, match="not 'entropi'"):
        scorer.score(either, batch, ["entropi"])


# Windows, through a run


class InWindows(Lm):
    """Scores its windows beforehand, as stages with a reference do; its evaluation checks them."""

    dropout = True

    def build_models(self, run):
        models = super().build_models(run)
        return Models(models.root, {"reference": copy.deepcopy(models.root)})

    def prepare_batch(self, run, rows):
        window = Round.of([group_of(row) for row in rows]).windows[0]
        assert run.model.training == self.trains
        before = torch.get_rng_state()
        self.found = [run.score_window(window, model=model, also=["entropy"]) for model in (None, "reference")]
        assert torch.equal(torch.get_rng_state(), before)
        assert run.model.training == self.trains
        self.window = window
        return Round([window])

    trains = True


@pytest.mark.parametrize("cut", [{"per_device_train_batch_size": 1}, {"micro_batch_tokens": 25}])
def test_a_window_is_scored_without_dropout_or_gradient_in_micro_batches(tmp_path, cut):
    stage = InWindows()
    model = {"from_config": GPT2 | {"resid_pdrop": 0.5}, "tokenizer": {"kind": "byte"}}
    settings = {"gradient_accumulation_steps": 4, "max_steps": 2, "per_device_train_batch_size": 2} | cut
    run = make(tmp_path / "run", stage, model=model, **settings)
    run._set_up()
    start = copy.deepcopy(run.model).eval()
    stage.prepare_batch(run, run.next_rows())
    for found in stage.found:
        assert not found.logps.requires_grad
        with torch.no_grad():
            whole = Scorer(packed=False).score(start, stage.window, ["entropy"])
        torch.testing.assert_close(found.logps, whole.logps, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.entropy, whole.entropy, rtol=0, atol=1e-5)
        assert torch.equal(found.sum(), stage.window.sum_by_sequence(found.logps))

    for _ in range(2):  # the policy learns, the reference stays what the policy was
        run.backend.optimizer.zero_grad()
        (-run.score(stage.window).logps.mean()).backward()
        run.optimizer.step()
    stage.prepare_batch(run, run.next_rows())
    with torch.no_grad():
        whole = Scorer(packed=False).score(start, stage.window)
    torch.testing.assert_close(stage.found[1].logps, whole.logps, rtol=0, atol=1e-5)
    assert not torch.allclose(stage.found[0].logps, whole.logps, atol=1e-3)


def test_a_window_without_rows_has_scores_without_values(tmp_path):
    stage = InWindows()
    run = make(tmp_path / "run", stage)
    run._set_up()
    stage.prepare_batch(run, [])
    for found in stage.found:
        assert found.logps.shape == found.entropy.shape == (0,)
        assert found.vocab_mean is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_that_keeps_less_is_the_same_to_the_bit(tmp_path, monkeypatch, checkpointing):
    def trained(name):
        run = make(tmp_path / name, bf16=True, gradient_checkpointing=checkpointing)
        run.train()
        return run

    usual = trained("usual")
    asked = []
    made_again = kept._made_again
    monkeypatch.setattr(kept, "SMALL", 0)
    monkeypatch.setattr(kept, "_made_again", lambda *given: asked.append(made_again(*given)) or asked[-1])
    assert_same_run(trained("less"), usual)
    assert any(asked)


def test_a_plugin_may_ask_for_more_of_the_policys_scores_than_the_stage_does(tmp_path):
    run = make(tmp_path / "run")
    run.prepare()
    batch = run.hooks.prepare_batch([run.train_rows[0]]).windows[0]
    with run.scoring_also("entropy"):
        with run.scoring_also("logsumexp"):
            both = run.hooks.compute_loss(batch).scores
        one = run.hooks.compute_loss(batch).scores
    none = run.hooks.compute_loss(batch).scores
    given = [[scores.entropy is not None, scores.logsumexp is not None] for scores in (both, one, none)]
    assert given == [[True, True], [True, False], [False, False]]
    assert torch.equal(both.logps, none.logps)
