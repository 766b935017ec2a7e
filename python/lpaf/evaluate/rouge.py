"""ROUGE (Lin, 2004) through the ``rouge-score`` library: how many words and word pairs two texts share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rouge_score.rouge_scorer import RougeScorer


def rouge(texts: Sequence[str], truth: Sequence[str], names: Sequence[str]) -> dict[str, np.ndarray]:
    """F-measures of every text against its true one, float64 [B] for each name.

    Words are lower-cased and stemmed (Porter), as the papers on summarisation have it.

    Args:
        texts: B texts that were written.
        truth: the B true ones.
        names: out of "rouge1", "rouge2" (words, pairs of words) and "rougeL" (longest common subsequence of the whole
            texts).
    """
    scorer = RougeScorer(list(names), use_stemmer=True)
    scores = [scorer.score(true, text) for text, true in zip(texts, truth, strict=True)]
    return {name: np.array([score[name].fmeasure for score in scores], dtype=np.float64) for name in names}
