"""Metrics of text: BLEU and chrF by sacrebleu, ROUGE by rouge-score, and exact match.

Words are parted by spaces in some languages and not in others. Where they are not, characters stand for words, in BLEU
and ROUGE alike: otherwise a Chinese sentence would be one word, or, for rouge-score's own tokenizer, none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from llmtk import ConfigurationError

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

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
