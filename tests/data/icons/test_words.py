"""Captions, yes/no pairs and descriptions: true where they should be, and only there."""

from collections import Counter

import guesser
import pytest
import solver

from blipfit.data import icons

SCENES = [icons.scene(9, index) for index in range(160)]


def test_captions_are_true_and_go_from_short_to_full():
    for of in SCENES:
        told, image = icons.captions(of), icons.draw(of)
        assert [text for text in told if not solver.holds(text, image)] == []
        assert len(set(told)) == len(told)
        assert all(text == text.lower() for text in told)
        assert len(told[0]) <= min(len(text) for text in told[-2:])


def test_a_full_caption_names_every_kind_of_icon():
    for of in SCENES:
        if of.icons:
            full = icons.captions(of)[-1]
            assert all(f"{icon.color} {icon.shape}" in full for icon in of.icons)


def test_of_a_yes_no_pair_one_is_true():
    for of in SCENES:
        image = icons.draw(of)
        for pair in icons.yes_no(of):
            assert solver.holds(pair.yes, image)
            assert not solver.holds(pair.no, image)
            assert pair.yes.endswith("? Please answer yes or no.")


def test_every_subtask_of_mme_is_asked_often():
    counts = Counter(pair.subtask for of in SCENES for pair in icons.yes_no(of))
    assert tuple(sorted(counts)) == tuple(sorted(icons.SUBTASKS))
    assert min(counts.values()) > len(SCENES) / 4


def test_of_two_descriptions_the_good_one_is_true():
    errors: Counter[str] = Counter()
    for of in SCENES:
        if pair := icons.preference(of):
            image = icons.draw(of)
            assert solver.holds(pair.good, image)
            assert not solver.holds(pair.bad, image)
            errors[pair.error] += 1
    assert set(errors) == {"color", "shape", "position", "count", "value"}


def pairs(seed, subtask):
    """The yes/no questions of a seed as options of one question, as often one way round as the other."""
    found = [
        pair for index in range(1500) for pair in icons.yes_no(icons.scene(seed, index)) if pair.subtask == subtask
    ]
    return [shown for pair in found for shown in ((pair.yes, ("yes", "no"), 0), (pair.no, ("yes", "no"), 1))][:1500]


@pytest.mark.parametrize("subtask", icons.SUBTASKS)
def test_the_text_of_a_yes_no_question_does_not_tell_its_answer(subtask):
    assert guesser.accuracy(pairs(1, subtask), pairs(2, subtask)) < 0.55


def descriptions(seed):
    shown = []
    for index in range(1800):
        if pair := icons.preference(icons.scene(seed, index)):
            both = (pair.good, pair.bad)
            shown.append((pair.query, both, 0) if index % 2 else (pair.query, both[::-1], 1))
    return shown


def test_the_text_of_two_descriptions_does_not_tell_the_true_one():
    assert guesser.accuracy(descriptions(1), descriptions(2)) < 0.55
