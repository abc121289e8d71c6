"""Questions can be answered from the picture, and only from the picture."""

import itertools
import re
from collections import Counter

import guesser
import pytest
import solver

from blipfit.data import icons

HELD_OUT_WORDS = r"\b(more|fewer|less|most|next|pattern|first|second|third|fourth|last|different|odd|others)\b"


def make_pairs(seed, count, *skills):
    """The first `count` pairs of scene and question."""
    return list(itertools.islice(icons.iterate_questions(seed, skills or None), count))


def to_example(question):
    return question.question, question.choices, question.answer_index


@pytest.mark.parametrize("skill", icons.SKILLS)
def test_the_solver_finds_the_answer_in_the_picture(skill):
    wrong = [
        (scene.seed, scene.index, question.question)
        for scene, question in make_pairs(31, 60, skill)
        if solver.answer(question.question, icons.draw(scene)) != question.answer
    ]
    assert wrong == []


@pytest.mark.parametrize("skill", icons.SKILLS)
def test_the_text_alone_does_not_reveal_the_answer(skill):
    train, test = ([to_example(question) for _, question in make_pairs(seed, 900, skill)] for seed in (1, 2))
    assert guesser.best_accuracy(train, test) < guesser.chance(test) + 0.05


def test_the_guessers_learn_to_answer_questions_that_reveal_the_answer():
    by_wording = [(f"Is there a {name}?", ("yes", "no"), int(name == "moon")) for name in ("star", "moon") * 200]
    assert guesser.best_accuracy(by_wording, by_wording) == 1
    by_position = [("Which?", choices, 0) for choices in (("a", "b"), ("b", "a")) * 200]
    assert guesser.best_accuracy(by_position, by_position) == 1
    by_rank = [("How many?", tuple("123"[shift:] + "123"[:shift]), (1 - shift) % 3) for shift in (0, 1, 2) * 100]
    assert guesser.best_accuracy(by_rank, by_rank) == 1


def test_the_text_of_all_questions_about_scenes_does_not_reveal_the_answers():
    train, test = (
        [
            to_example(question)
            for index in range(500)
            for question in icons.make_questions(icons.make_scene(seed, index))
        ]
        for seed in (1, 2)
    )
    assert guesser.best_accuracy(train, test) < guesser.chance(test) + 0.05


def test_choices_differ_and_the_right_one_is_equally_likely_at_every_position():
    positions: Counter[tuple[int, int]] = Counter()
    for _, question in make_pairs(3, 6000):
        assert 2 <= len(question.choices) <= 5
        assert len(set(question.choices)) == len(question.choices)
        positions[len(question.choices), question.answer_index] += 1
    for size in (2, 3, 4, 5):
        counts = [positions[size, position] for position in range(size)]
        expected = sum(counts) / size
        assert sum((count - expected) ** 2 / expected for count in counts) < 18  # p < 0.001 at 4 degrees of freedom


def test_yes_and_no_are_equally_frequent():
    answers = Counter(question.answer for _, question in make_pairs(4, 1000, "exists"))
    assert abs(answers["yes"] - 500) < 65


def test_a_question_does_not_depend_on_the_other_skills():
    for index in range(200):
        scene = icons.make_scene(1, index)
        by_skill = {question.skill: question for question in icons.make_questions(scene)}
        assert icons.make_questions(scene) == list(by_skill.values())
        for skill in ("color", "exists", "ordinal"):
            expected = [question for question in by_skill.values() if question.skill == skill]
            assert icons.make_questions(scene, [skill]) == expected


def test_skills_take_turns_and_can_ask_about_all_their_plans():
    counts = Counter(question.skill for _, question in make_pairs(1, len(icons.SKILLS) * 5))
    assert set(counts.values()) == {5}
    for name, skill in icons.SKILLS.items():
        for plan in skill.plans:
            scenes = (icons.make_scene(2, index, plan=plan) for index in range(200))
            assert any(icons.make_questions(scene, [name]) for scene in scenes), (name, plan)


def test_unknown_skills_are_refused():
    with pytest.raises(ValueError, match="unknown skill 'juggling'; expected one of count_all, "):
        icons.make_questions(icons.make_scene(1, 1), ["juggling"])
    with pytest.raises(ValueError, match="no skills given; name at least one of count_all, "):
        next(icons.iterate_questions(1, []))


def test_no_text_of_pretraining_uses_the_words_of_held_out_skills():
    assert set(icons.HELD_OUT) == {"compare", "pattern", "ordinal", "odd"}
    assert set(icons.HELD_OUT).isdisjoint(icons.PRETRAINED)
    for index in range(1500):
        scene = icons.make_scene(5, index)
        questions = icons.make_questions(scene, icons.PRETRAINED)
        texts = [text for question in questions for text in (question.question, *question.choices)]
        texts += icons.make_captions(scene)
        texts += [text for pair in icons.make_yes_no_pairs(scene) for text in (pair.yes, pair.no)]
        preference = icons.make_preference(scene)
        texts += [preference.query, preference.good, preference.bad] if preference else []
        assert [text for text in texts if re.search(HELD_OUT_WORDS, text)] == []


def test_choices_of_held_out_skills_occur_in_pretraining():
    known = {choice for _, question in make_pairs(6, 3000, *icons.PRETRAINED) for choice in question.choices}
    assert {choice for _, question in make_pairs(6, 1000, *icons.HELD_OUT) for choice in question.choices} <= known


def test_wrong_choices_of_held_out_skills_are_in_the_picture():
    """Otherwise a model that recognizes icons, but has not learned the skill, would be far above chance."""
    for scene, question in make_pairs(7, 800, *icons.HELD_OUT):
        names = {word for icon in scene.icons for word in (icon.shape, icon.color, icon.shape + "s", "crosses")}
        assert set(question.choices) <= names
