"""Which questions become examples."""

from collections import Counter

from blipfit.report.examples import Example, select_examples


def example(number: int, right: int, experiments: int = 10) -> Example:
    names = [str(name) for name in range(experiments)]
    return Example(str(number), "a", {}, names[:right], names[right:])


def kinds(examples) -> Counter:
    return Counter("disputed" if e.is_disputed else "right" if e.right else "wrong" for e in examples)


def test_two_thirds_are_disputed_first_those_with_most_disagreement():
    examples = [example(number, right=number % 11) for number in range(400)]
    selected = select_examples(examples)
    assert kinds(selected) == {"disputed": 40, "wrong": 10, "right": 10}
    distances = [abs(e.agreement - 0.5) for e in selected if e.is_disputed]
    assert distances == sorted(distances)
    assert distances[0] == 0
    assert len({e.id for e in selected}) == 60


def test_what_is_missing_of_a_kind_is_filled_with_the_others():
    assert kinds(select_examples([example(n, right=10 * (n % 2)) for n in range(200)])) == {"right": 30, "wrong": 30}
    assert kinds(select_examples([example(n, right=10) for n in range(200)])) == {"right": 60}
    assert kinds(select_examples([example(n, right=4) for n in range(200)])) == {"disputed": 60}
    few = [example(n, right=[0, 5, 10][n]) for n in range(3)]
    assert len(select_examples(few)) == 3
    assert select_examples([]) == []
