"""Metrics of text: against numbers worked out by hand and against the libraries' own, in several languages."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from llmtk_text_metrics import Words, bertscore, bleu, chrf, exact_match, rouge, tokenizer_for
from rouge_score.rouge_scorer import RougeScorer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

import llmtk
from llmtk import ConfigurationError
from llmtk.metrics import resolve

SAID = ["The cat sat on the mat.", "There is a dog, isn't there?"]
RIGHT = ["The cat lay on the mat.", "There's a dog there, isn't it?"]


def test_bleu_is_what_sacrebleu_gives_and_what_the_formula_gives() -> None:
    assert bleu(SAID, RIGHT) == pytest.approx(sacrebleu.corpus_bleu(SAID, [RIGHT]).score, abs=1e-9)
    # Of "a b c d e" in "a b c d f": 4/5 words, 3/4 pairs, 2/3 triples, 1/2 quadruples, equally long.
    by_hand = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)
    assert bleu(["a b c d e"], ["a b c d f"]) == pytest.approx(by_hand)
    assert bleu(["a b c d"], ["a b c d e"]) == pytest.approx(100 * math.exp(1 - 5 / 4)), "shorter than the reference"
    assert bleu(["A b c d"], ["a b c d"]) < 100 == pytest.approx(bleu(["A b c d"], ["a b c d"], lowercase=True))


def test_bleu_of_chinese_counts_characters() -> None:
    said, right = ["我们今天去公园"], ["我们昨天去公园"]
    # Characters: 6 of 7; pairs (我们 天去 去公 公园): 4 of 6; triples (天去公 去公园): 2 of 5; quadruples: 1 of 4.
    by_hand = 100 * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** (1 / 4)
    assert bleu(said, right) == pytest.approx(by_hand)
    assert bleu(said, right, tokenize="13a") == 0, "one word, and another"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("The cat sat.", "13a"),
        ("Кошка сидит на ковре.", "13a"),
        ("고양이가 앉았다", "13a"),
        ("猫坐在垫子上。", "zh"),
        ("用 Python 写的 program", "zh"),
        ("猫がマットの上に座った", "char"),
        ("แมวนั่งบนเสื่อ", "char"),
        ("He said の once, in a sentence of English words", "13a"),
    ],
)
def test_the_tokenizer_follows_from_the_script(text: str, name: str) -> None:
    assert tokenizer_for([text]) == name


def test_chrf_is_what_sacrebleu_gives() -> None:
    assert chrf(SAID, RIGHT) == pytest.approx(sacrebleu.corpus_chrf(SAID, [RIGHT]).score, abs=1e-9)
    assert chrf(SAID, RIGHT, word_order=2) == pytest.approx(sacrebleu.corpus_chrf(SAID, [RIGHT], word_order=2).score)
    assert chrf(["猫坐着"], ["猫坐着"]) == pytest.approx(100)
    assert 0 < chrf(["猫坐着"], ["猫站着"]) < 100


def test_rouge_of_english_is_what_rouge_score_gives_by_itself() -> None:
    own = RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [own.score(right, said) for said, right in zip(SAID, RIGHT, strict=True)]
    expected = {name: sum(score[name].fmeasure for score in scores) / 2 for name in ("rouge1", "rouge2", "rougeL")}
    assert rouge(SAID, RIGHT) == pytest.approx(expected)


def test_rouge_of_chinese_by_hand() -> None:
    """Of seven characters six are there, four of six pairs, and the longest common subsequence has six."""
    found = rouge(["我们今天去公园"], ["我们昨天去公园"])
    assert found == pytest.approx({"rouge1": 6 / 7, "rouge2": 4 / 6, "rougeL": 6 / 7})
    assert rouge(["今天"], ["今天好吗"], rouge_types=["rouge1"]) == pytest.approx({"rouge1": 2 * 1 * 0.5 / 1.5})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The cat's 2 hats", ["the", "cat", "s", "2", "hats"]),
        ("用Python写", ["用", "python", "写"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("นั่ง", ["นั่", "ง"]),
        ("snake_case, Ünïcode!", ["snake", "case", "ünïcode"]),
        ("…", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert Words().tokenize(text) == words


def test_exact_match_leaves_white_space_around_out() -> None:
    assert exact_match([" 85\n", "85 ", "8 5", "猫"], ["85", "86", "85", "猫"]) == 0.5


@pytest.mark.parametrize(
    ("metric", "options", "said"),
    [(bleu, {"tokenize": "klingon"}, "has no tokenizer 'klingon'"), (rouge, {"rouge_types": ["rougeX"]}, "rougeX")],
)
def test_what_is_refused(metric, options, said) -> None:
    with pytest.raises(ConfigurationError, match=said):
        metric(["a"], ["a"], **options)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny encoder of three layers, with a tokenizer of characters and the special tokens [CLS] and [SEP]."""
    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = {token: n for n, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh "])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    named = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=12, **named).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), initializer_range=0.5, **sizes)).save_pretrained(folder)
    return str(folder)


def by_definition(said: str, right: str, folder: str, layer: int) -> list[float]:
    """Return BERTScore of two texts, token by token, each text computed by itself."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    both = []
    for text in (said, right):
        ids = tokenizer(text, return_tensors="pt")
        both.append(model(**ids, output_hidden_states=True).hidden_states[layer][0].detach())

    def share(first: torch.Tensor, second: torch.Tensor) -> float:
        inner = range(1, len(first) - 1)
        return sum(max(float(torch.cosine_similarity(first[i], b, dim=0)) for b in second) for i in inner) / len(inner)

    precision, recall = share(both[0], both[1]), share(both[1], both[0])
    return [precision, recall, 2 * precision * recall / (precision + recall)]


@pytest.mark.parametrize("layer", [-1, 0, 2])
def test_bertscore_is_what_its_definition_says(encoder: str, layer: int) -> None:
    said, right = ["abc", "hgfe", "a"], ["abd", "efg hag", "bbbbb"]
    each = [by_definition(*pair, encoder, layer) for pair in zip(said, right, strict=True)]
    found = bertscore(said, right, model=encoder, layer=layer, batch_size=2)
    assert list(found) == ["bertscore_precision", "bertscore_recall", "bertscore_f1"]
    assert list(found.values()) == pytest.approx([sum(column) / 3 for column in zip(*each, strict=True)], abs=1e-5)


def test_bertscore_of_the_same_is_1_of_nothing_0_and_long_texts_are_cut(encoder: str) -> None:
    assert bertscore(["abc"], ["abc"], model=encoder)["bertscore_f1"] == pytest.approx(1, abs=1e-6)
    assert bertscore([""], ["abc"], model=encoder)["bertscore_f1"] == 0
    assert bertscore(["abcdefghab" + "c" * 99], ["abcdefghab"], model=encoder)["bertscore_f1"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "said"), [({"model": "nowhere"}, "there is no folder nowhere"), ({"layer": 4}, "has layers 0 to 3")]
)
def test_what_bertscore_refuses(encoder: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        bertscore(["a"], ["a"], **({"model": encoder} | options))


@pytest.fixture
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the distribution in front of the path, by the entry points that it states."""
    project = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text())["project"]
    entry_points = project["entry-points"]["llmtk.metrics"]
    folder = tmp_path / "llmtk_plugin_text_metrics-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in entry_points.items())
    (folder / "entry_points.txt").write_text(f"[llmtk.metrics]\n{lines}")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("_installed")
def test_options_of_a_wrong_type_are_refused_before_anything_is_measured() -> None:
    with pytest.raises(ConfigurationError, match=r'chrf\.char_order: expected a whole number, got "six"'):
        resolve({"chrf": {"char_order": "six"}})
    with pytest.raises(ConfigurationError, match=r"bertscore\.layer: expected a whole number"):
        resolve({"bertscore": {"model": "folder", "layer": "last"}})
    assert resolve({"rouge": {"rouge_types": ["rouge1"]}})["rouge"][1] == {"rouge_types": ["rouge1"]}


@pytest.mark.usefixtures("_installed")
def test_all_are_computed_by_default_and_named_ones_with_their_options() -> None:
    found = llmtk.compute_metrics(SAID, RIGHT)
    assert not any(name.startswith("bertscore") for name in found)
    assert found.keys() >= {"bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact_match"}
    assert llmtk.compute_metrics(SAID, RIGHT, ["exact_match"]) == {"exact_match": 0.0}
    char = llmtk.compute_metrics(SAID, RIGHT, {"bleu": {"tokenize": "char"}})
    assert char == {"bleu": pytest.approx(sacrebleu.corpus_bleu(SAID, [RIGHT], tokenize="char").score)}
