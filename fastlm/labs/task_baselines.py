"""What a model has to beat: always the commonest answer, counts of letters, copying, a word list."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlm.labs.workbench import Workbench
from fastlm.training import TokenDataset


def unigram_bits_per_byte(dataset: TokenDataset) -> float:
    """Bits a byte of a model that knows how frequent each token is in the training split, and nothing else."""
    counts = np.bincount(dataset.train.read(0, len(dataset.train)), minlength=dataset.tokenizer.vocab_size) + 1
    bits = -np.log2(counts / counts.sum())
    ids = dataset.valid.read(0, len(dataset.valid))
    ids = ids[ids != dataset.eos_token_id]
    return float(bits[ids].sum() / dataset.valid.num_bytes)


def letter_ngrams(lab: Workbench, train: Sequence[tuple[str, str]], asked: Sequence[str]) -> list[str]:
    """Labels by logistic regression on TF-IDF of 1 to 3 letters, by scikit-learn. Raises MissingError without it."""
    linear_model: Any = lab.package("sklearn.linear_model", "scikit-learn")
    text: Any = lab.package("sklearn.feature_extraction.text", "scikit-learn")
    vectorizer = text.TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True)
    model = linear_model.LogisticRegression(C=4.0, max_iter=500)
    model.fit(vectorizer.fit_transform([x for x, _ in train]), [y for _, y in train])
    predicted: list[str] = model.predict(vectorizer.transform(list(asked))).tolist()
    return predicted


class WordList:
    """A dictionary out of sentence pairs: for each Korean word the English one that most often comes with it and not
    without it (the largest Dice coefficient). Unknown words are left out."""

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        korean: Counter[str] = Counter()
        english: Counter[str] = Counter()
        together: Counter[tuple[str, str]] = Counter()
        for source, target in pairs:
            left, right = set(source.split()), set(target.lower().strip(".?!").split())
            korean.update(left)
            english.update(right)
            together.update((a, b) for a in left for b in right)
        best: dict[str, tuple[float, str]] = {}
        for (a, b), count in together.items():
            dice = 2 * count / (korean[a] + english[b])
            best[a] = max(best.get(a, (-math.inf, "")), (dice, b))
        self.english_of = {a: b for a, (_, b) in best.items()}

    def translate(self, source: str) -> str:
        return " ".join(self.english_of[word] for word in source.split() if word in self.english_of)
