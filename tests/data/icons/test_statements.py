"""Captions, yes/no pairs and descriptions are true or false as intended."""

from collections import Counter

import guesser
import pytest
import solver

from blipfit.data import icons

SCENES = [icons.make_scene(9, index) for index in range(160)]


def test_captions_are_true_and_ordered_from_short_to_detailed():
    for scene in SCENES:
        captions, image = icons.make_captions(scene), icons.draw(scene)
        assert [text for text in captions if not solver.is_true(text, image)] == []
        assert len(set(captions)) == len(captions)
        assert all(text == text.lower() for text in captions)
        assert len(captions[0]) <= min(len(text) for text in captions[-2:])


def test_the_last_caption_names_the_shape_and_color_of_every_icon():
    for scene in SCENES:
        if scene.icons:
            caption = icons.make_captions(scene)[-1]
            assert all(f"{icon.color} {icon.shape}" in caption for icon in scene.icons)


def test_one_question_of_a_yes_no_pair_is_true_and_the_other_false():
    for scene in SCENES:
        image = icons.draw(scene)
        for pair in icons.make_yes_no_pairs(scene):
            assert solver.is_true(pair.yes, image)
            assert not solver.is_true(pair.no, image)
            assert pair.yes.endswith("? Please answer yes or no.")


def test_every_subtask_of_mme_occurs_often():
    counts = Counter(pair.subtask for scene in SCENES for pair in icons.make_yes_no_pairs(scene))
    assert tuple(sorted(counts)) == tuple(sorted(icons.SUBTASKS))
    assert min(counts.values()) > len(SCENES) / 4


def test_the_good_description_is_true_and_the_bad_one_false():
    errors: Counter[str] = Counter()
    for scene in SCENES:
        if preference := icons.make_preference(scene):
            image = icons.draw(scene)
            assert solver.is_true(preference.good, image)
            assert not solver.is_true(preference.bad, image)
            errors[preference.error] += 1
    assert set(errors) == {"color", "shape", "position", "count", "value"}


def make_yes_no_examples(seed, subtask):
    """The yes/no questions of a seed with the choices yes and no; both answers occur equally often."""
    pairs = [
        pair
        for index in range(1500)
        for pair in icons.make_yes_no_pairs(icons.make_scene(seed, index))
        if pair.subtask == subtask
    ]
    choices = ("yes", "no")
    return [example for pair in pairs for example in ((pair.yes, choices, 0), (pair.no, choices, 1))][:1500]


@pytest.mark.parametrize("subtask", icons.SUBTASKS)
def test_the_text_of_a_yes_no_question_does_not_reveal_its_answer(subtask):
    train, test = make_yes_no_examples(1, subtask), make_yes_no_examples(2, subtask)
    assert guesser.best_accuracy(train, test) < 0.55


def make_description_examples(seed):
    """The pairs of descriptions of a seed with the good one first or second in turn."""
    examples = []
    for index in range(1800):
        if preference := icons.make_preference(icons.make_scene(seed, index)):
            choices = (preference.good, preference.bad)
            examples.append((preference.query, choices, 0) if index % 2 else (preference.query, choices[::-1], 1))
    return examples


def test_the_text_of_two_descriptions_does_not_reveal_the_true_one():
    assert guesser.best_accuracy(make_description_examples(1), make_description_examples(2)) < 0.55
