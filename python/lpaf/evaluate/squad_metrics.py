"""Exact match and F1 of one answer by the rule of SQuAD 2.0's official script, for SQuAD 1.1 too.

The script of 1.1 differs where normalisation leaves nothing of a true answer ("the"): 2.0 leaves such answers out.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def gold_answers(texts: Sequence[str]) -> list[str]:
    """The normalised true answers: [""] where a question has none, or none that normalisation leaves anything of."""
    return [text for text in map(normalized, texts) if text] or [""]


def exact_match(prediction: str, truth: Sequence[str]) -> float:
    """1 if a true answer is the prediction after normalisation, else 0."""
    return float(normalized(prediction) in gold_answers(truth))


def f1(prediction: str, truth: Sequence[str]) -> float:
    """F1 of the words of the prediction and the best true answer; 0 or 1 where one side has no words."""
    words = normalized(prediction).split()
    return max(_overlap(words, text.split()) for text in gold_answers(truth))


def _overlap(words: list[str], truth: list[str]) -> float:
    if not words or not truth:
        return float(words == truth)
    common = (Counter(words) & Counter(truth)).total()
    return 2 * common / (len(words) + len(truth))
