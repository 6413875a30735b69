"""Metrics of text: BLEU and chrF by sacrebleu, ROUGE by rouge-score, exact match, and BERTScore by a local model.

Words are parted by spaces in some languages and not in others. Where they are not, characters stand for words, in BLEU
and ROUGE alike: otherwise a Chinese sentence would be one word, or, for rouge-score's own tokenizer, none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtk import ConfigurationError

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer
    from torch import Tensor

_HAN = r"\p{Han}"
_OTHER_UNSPACED = r"\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_WORD = rf"[{_HAN}{_OTHER_UNSPACED}]\p{{M}}*|(?:(?![{_HAN}{_OTHER_UNSPACED}])[\p{{L}}\p{{M}}\p{{N}}])+"
"""A character of a script without spaces with its marks, or a word of letters, marks and digits."""


def bleu(
    predictions: Sequence[str], references: Sequence[str], *, tokenize: str | None = None, lowercase: bool = False
) -> float:
    """Return sacrebleu's corpus BLEU, from 0 to 100 (arXiv 1804.08771).

    `tokenize` is one of sacrebleu's tokenizers. By default `zh` where the references hold Chinese characters, `char`
    where another script without spaces is over a tenth of their letters (Japanese, Thai, ...), else `13a`.
    """
    from sacrebleu.metrics import BLEU

    name = tokenize or tokenizer_for(references)
    if name not in BLEU.TOKENIZERS:
        known = ", ".join(sorted(BLEU.TOKENIZERS))
        raise ConfigurationError(f"bleu: sacrebleu has no tokenizer {name!r}; it has {known}")
    return float(BLEU(tokenize=name, lowercase=lowercase).corpus_score(list(predictions), [list(references)]).score)


def chrf(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    char_order: int = 6,
    word_order: int = 0,
    beta: int = 2,
    lowercase: bool = False,
) -> float:
    """Return sacrebleu's chrF, from 0 to 100 (Popović 2015); with `word_order` 2, chrF++ (Popović 2017)."""
    from sacrebleu.metrics import CHRF

    metric = CHRF(char_order=char_order, word_order=word_order, beta=beta, lowercase=lowercase)
    return float(metric.corpus_score(list(predictions), [list(references)]).score)


def rouge(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    rouge_types: Sequence[str] = ("rouge1", "rouge2", "rougeL"),
) -> dict[str, float]:
    """Return rouge-score's F1, from 0 to 1, the mean over rows (Lin 2004), of words in lower case without stemming."""
    scorer = _scorer(rouge_types)
    scores = [
        scorer.score(reference, prediction) for prediction, reference in zip(predictions, references, strict=True)
    ]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in rouge_types}


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of predictions, from 0 to 1, that are their reference but for white space around them."""
    same = [
        prediction.strip() == reference.strip() for prediction, reference in zip(predictions, references, strict=True)
    ]
    return sum(same) / len(same)


def bertscore(
    predictions: Sequence[str], references: Sequence[str], *, model: str, layer: int = -1, batch_size: int = 32
) -> dict[str, float]:
    """Return BERTScore, the mean over rows: `bertscore_precision`, `bertscore_recall`, `bertscore_f1`.

    Each token of the one text is matched with the token of the other whose embedding is most alike (arXiv 1904.09675,
    section 3; without idf weights and rescaling). `model` is the folder of an encoder; `layer` is the one whose output
    is compared (0: embeddings, -1: the last), and which agrees best with people differs from model to model. Special
    tokens are matched with, and do not count. A text without tokens scores 0.
    """
    encode = _Encoder(model, layer)
    sums = [0.0, 0.0, 0.0]
    for begin in range(0, len(predictions), batch_size):
        part = slice(begin, begin + batch_size)
        for said, right in zip(encode(predictions[part]), encode(references[part]), strict=True):
            sums = [total + value for total, value in zip(sums, _matched(*said, *right), strict=True)]
    names = ("bertscore_precision", "bertscore_recall", "bertscore_f1")
    return {name: total / len(predictions) for name, total in zip(names, sums, strict=True)}


def tokenizer_for(texts: Iterable[str]) -> str:
    """Return which of sacrebleu's tokenizers parts these texts into words, or characters where they have no spaces."""
    import regex

    letters = han = others = 0
    for text in texts:
        letters += len(regex.findall(r"\p{L}", text))
        han += len(regex.findall(_HAN, text))
        others += len(regex.findall(rf"[{_OTHER_UNSPACED}]", text))
    if others > letters / 10:
        return "char"
    return "zh" if han else "13a"


class Words:
    """Parts text into words in lower case, or into characters where a script has no spaces."""

    def __init__(self) -> None:
        import regex

        self._word = regex.compile(_WORD)

    def tokenize(self, text: str) -> list[str]:
        """Return the words."""
        return [str(word) for word in self._word.findall(text.lower())]


def _scorer(rouge_types: Sequence[str]) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    known = ("rougeL", "rougeLsum", *(f"rouge{n}" for n in range(1, 10)))
    if (
        isinstance(rouge_types, str)
        or not rouge_types
        or (unknown := [each for each in rouge_types if each not in known])
    ):
        wrong = rouge_types if isinstance(rouge_types, str) or not rouge_types else unknown
        raise ConfigurationError(f"rouge: rouge_types is a list of {', '.join(known)}; got {wrong!r}")
    return RougeScorer(list(rouge_types), tokenizer=Words())


class _Encoder:
    """A local encoder, as what gives each text's embeddings (tokens, width), of length 1, and which tokens count."""

    def __init__(self, model: str, layer: int) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        from llmtk.models.checks import check_folder
        from llmtk.models.errors import loading, quietly

        folder = Path(model).expanduser()
        if not folder.is_dir():
            raise ConfigurationError(f"bertscore: there is no folder {model}. Give that of an encoder, such as BERT's")
        check_folder(folder)
        with loading(f"bertscore: the model {model}"), quietly():
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            found: Any = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
        layers = found.config.num_hidden_layers
        if not -layers - 1 <= layer <= layers:
            raise ConfigurationError(f"bertscore: {model} has layers 0 to {layers}; layer is {layer}")
        self._model = found.eval().to(torch.accelerator.current_accelerator() or "cpu")
        self._layer = layer
        # Models such as RoBERTa have more positions than they can use; their tokenizers know.
        self._longest = min(self._tokenizer.model_max_length, found.config.max_position_embeddings)

    def __call__(self, texts: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
        import torch
        import torch.nn.functional as F

        tokens = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._longest,
            return_special_tokens_mask=True,
            return_tensors="pt",
        ).to(self._model.device)
        special = tokens.pop("special_tokens_mask").bool()
        with torch.no_grad():
            hidden = self._model(**tokens, output_hidden_states=True).hidden_states[self._layer]
        for row, is_there, is_special in zip(
            F.normalize(hidden, dim=-1), tokens["attention_mask"].bool(), special, strict=True
        ):
            yield row[is_there], ~is_special[is_there]


def _matched(said: Tensor, counts: Tensor, right: Tensor, counts_right: Tensor) -> tuple[float, float, float]:
    """Return precision, recall and F1 of two texts' embeddings (tokens, width); `counts` (tokens,) leaves some out."""
    if not (counts.any() and counts_right.any()):
        return 0.0, 0.0, 0.0
    alike = said @ right.T
    precision = float(alike.amax(1)[counts].mean())
    recall = float(alike.amax(0)[counts_right].mean())
    both = precision + recall
    return precision, recall, 2 * precision * recall / both if both else 0.0
