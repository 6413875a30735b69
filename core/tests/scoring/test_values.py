"""Values of a head of one label: packed against padded, and both against the model's own forward."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from llmtk import Batch, Group, Sequence
from llmtk.errors import ModelLoadError, PluginError
from llmtk.scoring import Scorer, choose, value_head, values
from llmtk.scoring.proof import VALUES, why_not_packed

from .kit import PACKED, TINY, Source, adapted, alone, assert_near, build, enlarge, gradients, shared, weigh

KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2", "mixtral")


def judge(kind, fields=None, seed=0, auto=AutoModelForSequenceClassification, **more):
    """Make a model with a head of one label, its weights enlarged by noise."""
    config = AutoConfig.for_model(kind, **((PACKED[kind] if fields is None else fields) | {"num_labels": 1} | more))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config).float().eval()
        enlarge(model)
    return model


def lora(model):
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        root = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear"))
        for name, parameter in root.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return root.eval()


def measure(give, root):
    """Return values, under the name that the kit compares by, and gradients of their weighted sum."""
    root.zero_grad(set_to_none=True)
    given, batch = give
    found = given(root, batch)
    (found * weigh(batch)).sum().backward()
    answer = {"logps": found.detach()} | gradients(root)
    root.zero_grad(set_to_none=True)
    return answer


def alone_choice(root, why=""):
    return choose(root, lambda reason: [reason], why)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_padded(kind, tuning):
    root = judge(kind) if tuning == "full" else lora(judge(kind))
    plain = alone_choice(root, "to compare")
    assert (plain.packed, plain.has_logits, plain.has_values) == (False, False, True)
    expected = [measure((values.padded, batch()), root) for batch in (alone, shared)]
    scorer = alone_choice(root)
    assert scorer == Scorer(True, "", has_logits=False, has_values=True)
    for batch, wanted in zip((alone, shared), expected, strict=True):
        assert_near(measure((values.packed, batch()), root), wanted)
        assert_near(measure((values.padded, batch()), root), wanted, relative=0)


def judged(source):
    """Return answers behind shared prompts, each judged as a whole, and the rows that transformers is to pool."""
    groups, rows = [], []
    for prompt_length, lengths in ((9, (4, 7)), (5, (1, 11)), (14, (3,))):
        prompt, answers = source.tokens(prompt_length), [source.tokens(length) for length in lengths]
        groups.append(Group([Sequence.ended(answer, 0) for answer in answers], {}, [prompt]))
        rows += [torch.cat([prompt, answer]) for answer in answers]
    rows.append(source.tokens(6))
    groups.append(Group([Sequence.ended(rows[-1].tolist())], {}))
    return Batch.collate(groups), rows


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2"])
def test_the_value_before_the_end_is_what_transformers_pools_from_a_padded_batch(kind):
    root = judge(kind)
    batch, rows = judged(Source(3))
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    weights = torch.linspace(-1, 1, len(rows))
    pooled = copy.deepcopy(root)(input_ids=ids, attention_mask=(ids != 0).long()).logits.squeeze(-1)
    plain = copy.deepcopy(root)
    (plain(input_ids=ids, attention_mask=(ids != 0).long()).logits.squeeze(-1) * weights).sum().backward()

    assert alone_choice(root).packed
    found = values.packed(root, batch)
    (found * weights).sum().backward()
    assert_near({"logps": found.detach(), **gradients(root)}, {"logps": pooled.detach(), **gradients(plain)})
    torch.testing.assert_close(root(input_ids=ids, attention_mask=(ids != 0).long()).logits.squeeze(-1), pooled)


def test_a_token_classifier_gives_the_values_of_all_tokens():
    root = judge("llama", auto=AutoModelForTokenClassification)
    tokens = Source(4).tokens(12)
    expected = root(input_ids=tokens[None]).logits[0, :-1, 0]
    assert alone_choice(root).packed
    batch = Batch.collate([Group([Sequence(tokens, [False] + [True] * 11)], {})])
    torch.testing.assert_close(values.packed(root, batch), expected, rtol=1e-5, atol=1e-6)


def test_a_model_that_cannot_be_packed_gives_its_values_padded():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    root = judge("llama", TINY | {"rope_parameters": rope})
    scorer = alone_choice(root)
    assert not scorer.packed
    assert "dynamic rotary embedding" in scorer.why_padded
    batch, rows = judged(Source(3))
    expected = torch.cat([root(input_ids=row[None]).logits[0] for row in rows])
    torch.testing.assert_close(scorer.values(root, batch), expected, rtol=1e-5, atol=1e-6)


def test_neighbours_that_look_at_each_other_are_caught(monkeypatch):
    from dataclasses import replace

    from llmtk.scoring import attention

    attend = attention.packed_attention

    def contaminated(module, q, k, v, layout, **kwargs):
        return attend(module, q, k, v, replace(layout, lengths=[sum(layout.lengths)], prefixes=[-1]), **kwargs)

    monkeypatch.setattr(attention, "packed_attention", contaminated)
    assert "packed values of a tiny twin of it are off" in alone_choice(judge("llama")).why_padded


def test_a_label_that_does_not_stand_at_the_last_token_is_refused():
    root = judge("bert", {k: v for k, v in TINY.items() if k != "num_key_value_heads"})
    with pytest.raises(ModelLoadError, match="BertForSequenceClassification does not read its label off"):
        alone_choice(root)


def test_each_kind_of_head_refuses_what_only_the_other_gives():
    reward, language = judge("llama"), build("llama")
    with pytest.raises(PluginError, match=r"run\.score needs a language model"):
        alone_choice(reward).score(reward, alone())
    with pytest.raises(PluginError, match=r"run\.map_logits needs a language model"):
        alone_choice(reward).map_logits(reward, alone(), lambda z: z.sum(-1))
    with pytest.raises(PluginError, match=r"run\.values needs a model with a head of one value"):
        alone_choice(language).values(language, alone())
    assert alone_choice(adapted(build("llama"))).has_logits


def test_what_was_measured_can_be_had():
    root, measured = judge("llama"), {}
    alone_choice(root, "first the plain way")
    assert why_not_packed(root, measured, VALUES) is None
    assert list(measured) == [
        f"{what} of {of}" for of in ("a tiny twin of it", "the model") for what in ("values", "gradients")
    ]


# A language model with a value head beside its own


def actor_critic(kind, tuning="full"):
    """Make a language model with a value head that is not 0."""
    root = build(kind) if tuning == "full" else adapted(build(kind))
    value_head.add_head(root)
    head = value_head.head_of(value_head.find(root))
    assert not head.weight.any()
    assert not head.bias.any()
    torch.nn.init.normal_(head.weight, std=0.1, generator=torch.Generator().manual_seed(2))
    torch.nn.init.constant_(head.bias, 0.3)
    return root.eval()


def both(scorer, root, batch):
    """Return log-probs, entropy and values of one call, and gradients of a sum of all."""
    root.zero_grad(set_to_none=True)
    scores = scorer.score(root, batch, ["entropy", "values"], 0.7)
    (weigh(batch) * (scores.logps + scores.values.square() + 0.1 * scores.entropy)).sum().backward()
    found = {"logps": scores.logps.detach(), "values": scores.values.detach()} | gradients(root)
    root.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_and_values_come_of_one_trunk(kind, tuning):
    root = actor_critic(kind, tuning)
    plain = alone_choice(root, "to compare")
    assert (plain.packed, plain.has_logits, plain.has_values) == (False, True, True)
    expected = [both(plain, root, batch()) for batch in (alone, shared)]
    assert any("value_head" in name for name in expected[0])
    scorer = alone_choice(root)
    assert scorer == Scorer(True, "", has_logits=True, has_values=True)
    for batch, wanted in zip((alone, shared), expected, strict=True):
        assert_near(both(scorer, root, batch()), wanted)
        torch.testing.assert_close(scorer.values(root, batch()), wanted["values"], rtol=1e-5, atol=1e-5)
        assert_near(both(plain, root, batch()), wanted, relative=0)


def test_a_value_head_is_asked_the_states_that_the_language_head_sees():
    root = actor_critic("llama")
    tokens = Source(4).tokens(12)
    head = root.value_head
    hidden = root.model(input_ids=tokens[None]).last_hidden_state
    expected = head(hidden)[0, :-1, 0]
    batch = Batch.collate([Group([Sequence(tokens, [False] + [True] * 11)], {})])
    assert alone_choice(root).packed
    torch.testing.assert_close(alone_choice(root).score(root, batch, ["values"]).values, expected, rtol=1e-5, atol=1e-6)


def test_one_packed_forward_gives_both():
    root = actor_critic("llama")
    scorer, forwards = alone_choice(root), []
    root.model.register_forward_hook(lambda *_: forwards.append(1))
    scorer.score(root, shared(), ["values"])
    assert len(forwards) == 1


def test_a_value_head_changes_nothing_else(tmp_path):
    from llmtk.generation import Sampling, generate

    root, alike = actor_critic("llama"), build("llama")
    rows = torch.stack([Source(4).tokens(12)])
    assert alone_choice(root).packed
    assert alone_choice(alike).packed
    assert torch.equal(root(input_ids=rows).logits, alike(input_ids=rows).logits)
    prompts, sampling = [[5, 6, 7], [8]], Sampling(n=2, max_new_tokens=6)
    for packed in (True, False):
        assert generate(root, prompts, sampling, packed=packed) == generate(alike, prompts, sampling, packed=packed)
    with value_head.without_head(root):
        assert root.state_dict().keys() == alike.state_dict().keys()
    assert root.state_dict().keys() - alike.state_dict().keys() == {"value_head.weight", "value_head.bias"}


def test_a_value_head_in_float32_stands_on_a_trunk_in_bfloat16():
    root = actor_critic("llama").to(torch.bfloat16)
    root.value_head.float()
    scorer = alone_choice(root)
    assert scorer.packed, scorer.why_padded
    assert scorer.score(root, shared(), ["values"]).values.dtype == torch.float32


def test_values_without_a_value_head_are_refused():
    language = build("llama")
    with pytest.raises(PluginError, match=r"run\.values needs a model with a head of one value"):
        alone_choice(language).score(language, alone(), ["values"])
    with pytest.raises(ModelLoadError, match="can have no value head: it holds 0 causal language models"):
        value_head.add_head(judge("llama"))
