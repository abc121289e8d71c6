"""Guessers that answer without the picture: they learn from the question, the choices and their order alone."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence

Example = tuple[str, tuple[str, ...], int]  # question, choices, index of the right choice

EPOCHS = 3
LEARNING_RATE = 0.3


def best_accuracy(train: Sequence[Example], test: Sequence[Example]) -> float:
    """Return the highest accuracy on `test` of the three guessers below after learning from `train`."""
    return max(_score_counting(train, test), _score_position(train, test), _score_linear(train, test))


def chance(test: Sequence[Example]) -> float:
    """Return the expected accuracy of a uniformly random choice."""
    return sum(1 / len(choices) for _, choices, _ in test) / len(test)


def _score_counting(train: Sequence[Example], test: Sequence[Example]) -> float:
    """For every wording, choose the answer that was right most often when it was among the choices."""
    right: Counter[tuple[str, str]] = Counter()
    total: Counter[tuple[str, str]] = Counter()
    for question, choices, index in train:
        for wording in (question, ""):
            total.update((wording, choice) for choice in choices)
            right[wording, choices[index]] += 1

    def estimate(question: str, choice: str) -> float:
        prior = (right["", choice] + 1) / (total["", choice] + 2)
        return (right[question, choice] + 2 * prior) / (total[question, choice] + 2)

    hits = sum(
        max(range(len(choices)), key=lambda i: estimate(question, choices[i])) == index
        for question, choices, index in test
    )
    return hits / len(test)


def _score_position(train: Sequence[Example], test: Sequence[Example]) -> float:
    """Choose the position that was right most often for that number of choices."""
    positions = defaultdict(Counter)
    for _, choices, index in train:
        positions[len(choices)][index] += 1
    return sum(positions[len(choices)].most_common(1)[0][0] == index for _, choices, index in test) / len(test)


def _score_linear(train: Sequence[Example], test: Sequence[Example]) -> float:
    """Train a softmax over the choices with one weight per text feature by stochastic gradient descent (Adagrad)."""
    weight: defaultdict[str, float] = defaultdict(float)
    squares: defaultdict[str, float] = defaultdict(lambda: 1e-8)
    for question, choices, index in itertools.chain.from_iterable([train] * EPOCHS):
        features = [_extract_features(question, choices, i) for i in range(len(choices))]
        scores = [math.exp(min(30.0, sum(weight[name] for name in names))) for names in features]
        for i, names in enumerate(features):
            gradient = scores[i] / sum(scores) - (i == index)
            for name in names:
                squares[name] += gradient * gradient
                weight[name] -= LEARNING_RATE * gradient / math.sqrt(squares[name]) / len(names)
    hits = 0
    for question, choices, index in test:
        scores = [sum(weight[name] for name in _extract_features(question, choices, i)) for i in range(len(choices))]
        hits += scores.index(max(scores)) == index
    return hits / len(test)


def _extract_features(question: str, choices: tuple[str, ...], i: int) -> list[str]:
    """Return the text features of choice `i`: its words, its position, the other choices, the question's words."""
    choice, question_words = choices[i], question.lower().strip("?.").split()
    words = choice.lower().split()
    rank = sorted(choices).index(choice)
    mention = next((n for n, word in enumerate(question_words) if word in words), -1)
    features = [
        f"is {choice}",
        f"position {i}/{len(choices)}",
        f"rank {rank}/{len(choices)}",
        f"mention {mention}",
        f"{question}|{choice}",
        f"{question}|{rank}/{len(choices)}",
        f"length {len(words)}",
    ]
    features += [f"{word}>{choice}" for word in question_words]
    features += [f"not {other} but {choice}" for other in choices if other != choice]
    features += [f"word {word}" for word in words]
    return features + [f"pair {first} {second}" for first, second in itertools.pairwise(words)]
