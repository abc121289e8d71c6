"""Compare texts with references: ROUGE and exact match, one value from 0 to 1 per sample."""

import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from blipfit.evaluation import bootstrap
from blipfit.evaluation.bootstrap import Values

ROUGE = ("rouge1", "rouge2", "rougeL")

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = frozenset(("a", "an", "the"))


def rouge(predictions: Sequence[str], references: Sequence[str], stemmer: bool = False) -> dict[str, Values]:
    """Return the F1 of ROUGE-1, ROUGE-2 and ROUGE-L by Google's `rouge-score`, `N` values each.

    `stemmer` turns on Porter's stemmer for English. It is off by default, as in `rouge-score` and Hugging Face's
    `evaluate`; published numbers differ in it, so report it with the result. `rouge-score` lower-cases texts and keeps
    only `a`–`z` and `0`–`9`, so texts in other scripts score 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), use_stemmer=stemmer)
    scores = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
    return {name: np.array([sample[name].fmeasure for sample in scores], dtype=np.float64) for name in ROUGE}


def count_unread(texts: Sequence[str]) -> dict[str, int]:
    """Count the texts that ROUGE's tokenizer cannot read: it keeps only `a`–`z` and `0`–`9` of a lower-cased text.

    `unread` texts have letters or digits, but none of these, so ROUGE is 0 for them; `partly_read` ones have both
    kinds, and `empty` ones no letter or digit at all. The texts in the three counts are different ones.
    """
    counts = Counter(map(_readability, texts))
    return {"texts": len(texts), **{name: counts[name] for name in ("unread", "partly_read", "empty")}}


def _readability(text: str) -> str:
    letters = [letter for letter in text.lower() if letter.isalnum() or unicodedata.category(letter)[0] == "M"]
    read = sum(letter.isascii() for letter in letters)
    if not letters:
        return "empty"
    return "unread" if read == 0 else "partly_read" if read < len(letters) else "read"


def describe_unread(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return a sentence for each kind of texts that ROUGE cannot read, e.g. `ROUGE cannot read 3 of 4 references …`.

    `counts` has the results of `count_unread` by kind (`references`, `predictions`).
    """
    sentences = []
    for kind, numbers in counts.items():
        if count := numbers["unread"]:
            sentences.append(
                f"ROUGE cannot read {count} of {numbers['texts']} {kind}: its tokenizer keeps only a–z and 0–9, so "
                "their ROUGE is 0 whatever was answered"
            )
        if count := numbers["partly_read"]:
            sentences.append(
                f"ROUGE cannot read letters other than a–z and 0–9 in {count} of {numbers['texts']} {kind}"
            )
    return sentences


def exact_match(predictions: Sequence[str], references: Sequence[str], strict: bool = False) -> Values:
    """Return 1 where a prediction equals its reference and 0 elsewhere; both are normalized first unless `strict`."""
    convert: Callable[[str], str] = str if strict else normalize
    return np.array([convert(p) == convert(r) for p, r in zip(predictions, references, strict=True)], dtype=np.float64)


def normalize(text: str) -> str:
    """Lower-case a text and remove ASCII punctuation, English articles and extra blanks (SQuAD's rule)."""
    return " ".join(word for word in text.lower().translate(_PUNCTUATION).split() if word not in _ARTICLES)


def score_texts(
    predictions: Sequence[str], references: Sequence[str], stemmer: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Compute ROUGE and exact match: means with intervals under `metrics`, values per sample under `samples`.

    `rouge_unread` counts the references and predictions that ROUGE cannot read (`count_unread`).
    """
    values = rouge(predictions, references, stemmer)
    values["exact"] = exact_match(predictions, references)
    values["exact_strict"] = exact_match(predictions, references, strict=True)
    return {
        "stemmer": stemmer,
        "rouge_unread": {"references": count_unread(references), "predictions": count_unread(predictions)},
        "metrics": {name: bootstrap.mean(metric_values, seed=seed) for name, metric_values in values.items()},
        "samples": {name: metric_values.tolist() for name, metric_values in values.items()},
    }
