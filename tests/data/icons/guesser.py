"""Answers without seeing: what can be learned from the question, the options and their order alone."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence

Shown = tuple[str, tuple[str, ...], int]  # question, options, index of the right one

EPOCHS = 3
RATE = 0.3


def accuracy(learn: Sequence[Shown], fresh: Sequence[Shown]) -> float:
    """The best share of fresh questions that any of the guessers below gets right after learning from others."""
    return max(_by_counting(learn, fresh), _by_place(learn, fresh), _by_weights(learn, fresh))


def chance(fresh: Sequence[Shown]) -> float:
    """The expected share of a blind draw among the options."""
    return sum(1 / len(options) for _, options, _ in fresh) / len(fresh)


def _by_counting(learn: Sequence[Shown], fresh: Sequence[Shown]) -> float:
    """To every wording the option that was right most often when it was offered."""
    right: Counter[tuple[str, str]] = Counter()
    offered: Counter[tuple[str, str]] = Counter()
    for question, options, index in learn:
        for where in (question, ""):
            offered.update((where, option) for option in options)
            right[where, options[index]] += 1

    def liking(question: str, option: str) -> float:
        prior = (right["", option] + 1) / (offered["", option] + 2)
        return (right[question, option] + 2 * prior) / (offered[question, option] + 2)

    hits = sum(max(range(len(o)), key=lambda i: liking(q, o[i])) == index for q, o, index in fresh)
    return hits / len(fresh)


def _by_place(learn: Sequence[Shown], fresh: Sequence[Shown]) -> float:
    """Always the place that was right most often among so many options."""
    places = defaultdict(Counter)
    for _, options, index in learn:
        places[len(options)][index] += 1
    return sum(places[len(o)].most_common(1)[0][0] == index for _, o, index in fresh) / len(fresh)


def _by_weights(learn: Sequence[Shown], fresh: Sequence[Shown]) -> float:
    """A softmax over options with one weight a clue, by stochastic gradients (Adagrad)."""
    weight: defaultdict[str, float] = defaultdict(float)
    power: defaultdict[str, float] = defaultdict(lambda: 1e-8)
    for question, options, index in itertools.chain.from_iterable([learn] * EPOCHS):
        clues = [_clues(question, options, i) for i in range(len(options))]
        scores = [math.exp(min(30.0, sum(weight[clue] for clue in its))) for its in clues]
        for i, its in enumerate(clues):
            slope = scores[i] / sum(scores) - (i == index)
            for clue in its:
                power[clue] += slope * slope
                weight[clue] -= RATE * slope / math.sqrt(power[clue]) / len(its)
    hits = 0
    for question, options, index in fresh:
        scores = [sum(weight[clue] for clue in _clues(question, options, i)) for i in range(len(options))]
        hits += scores.index(max(scores)) == index
    return hits / len(fresh)


def _clues(question: str, options: tuple[str, ...], i: int) -> list[str]:
    """What a text-only reader might hold for an option: itself, its place, its company, the question's words."""
    option, words = options[i], question.lower().strip("?.").split()
    inside = option.lower().split()
    number = sorted(options).index(option)
    mention = next((n for n, word in enumerate(words) if word in inside), -1)
    clues = [f"is {option}", f"place {i}/{len(options)}", f"rank {number}/{len(options)}", f"said {mention}"]
    clues += [f"{question}|{option}", f"{question}|{number}/{len(options)}", f"length {len(inside)}"]
    clues += [f"{word}>{option}" for word in words]
    clues += [f"not {other} but {option}" for other in options if other != option]
    clues += [f"word {word}" for word in inside]
    return clues + [f"pair {a} {b}" for a, b in itertools.pairwise(inside)]
