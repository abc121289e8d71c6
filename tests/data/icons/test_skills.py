"""Questions: answerable by looking, and only by looking."""

import itertools
import re
from collections import Counter

import guesser
import pytest
import solver

from blipfit.data import icons

HELD_OUT_WORDS = r"\b(more|fewer|less|most|next|pattern|first|second|third|fourth|last|different|odd|others)\b"


def asked(seed, count, *skills):
    return list(itertools.islice(icons.asked(seed, skills or None), count))


@pytest.mark.parametrize("skill", icons.SKILLS)
def test_looking_at_the_picture_gives_the_answer(skill):
    wrong = [
        (of.seed, of.index, ask.question)
        for of, ask in asked(31, 60, skill)
        if solver.answer(ask.question, icons.draw(of)) != ask.answer
    ]
    assert wrong == []


@pytest.mark.parametrize("skill", icons.SKILLS)
def test_the_text_alone_does_not_tell_the_answer(skill):
    learn, fresh = (
        [(ask.question, ask.choices, ask.answer_index) for _, ask in asked(seed, 900, skill)] for seed in (1, 2)
    )
    assert guesser.accuracy(learn, fresh) < guesser.chance(fresh) + 0.05


def test_the_guesser_finds_a_leak_where_there_is_one():
    leak = [(f"Is there a {name}?", ("yes", "no"), int(name == "moon")) for name in ("star", "moon") * 200]
    assert guesser.accuracy(leak, leak) == 1
    first = [("Which?", pair, 0) for pair in (("a", "b"), ("b", "a")) * 200]
    assert guesser.accuracy(first, first) == 1
    middle = [("How many?", tuple("123"[at:] + "123"[:at]), (1 - at) % 3) for at in (0, 1, 2) * 100]
    assert guesser.accuracy(middle, middle) == 1


def test_the_text_of_the_questions_of_a_scene_does_not_tell_the_answers():
    learn, fresh = (
        [
            (ask.question, ask.choices, ask.answer_index)
            for index in range(500)
            for ask in icons.questions(icons.scene(seed, index))
        ]
        for seed in (1, 2)
    )
    assert guesser.accuracy(learn, fresh) < guesser.chance(fresh) + 0.05


def test_options_differ_and_the_right_one_stands_anywhere():
    places: Counter[tuple[int, int]] = Counter()
    for _, ask in asked(3, 6000):
        assert 2 <= len(ask.choices) <= 5
        assert len(set(ask.choices)) == len(ask.choices)
        places[len(ask.choices), ask.answer_index] += 1
    for size in (2, 3, 4, 5):
        seen = [places[size, place] for place in range(size)]
        expected = sum(seen) / size
        assert sum((number - expected) ** 2 / expected for number in seen) < 18  # p < 0.001 at 4 degrees


def test_yes_and_no_are_as_frequent():
    answers = Counter(ask.answer for _, ask in asked(4, 1000, "exists"))
    assert abs(answers["yes"] - 500) < 65


def test_a_question_does_not_depend_on_the_other_skills_asked_for():
    for index in range(200):
        of = icons.scene(1, index)
        everything = {ask.skill: ask for ask in icons.questions(of)}
        assert icons.questions(of) == list(everything.values())
        for skill in ("color", "exists", "ordinal"):
            assert icons.questions(of, [skill]) == [ask for ask in everything.values() if ask.skill == skill]


def test_skills_take_turns_and_every_plan_of_a_skill_can_ask_it():
    turns = Counter(ask.skill for _, ask in asked(1, len(icons.SKILLS) * 5))
    assert set(turns.values()) == {5}
    for name, skill in icons.SKILLS.items():
        for plan in skill.plans:
            assert any(icons.questions(icons.scene(2, i, plan=plan), [name]) for i in range(200)), (name, plan)


def test_unknown_skills_are_refused():
    with pytest.raises(ValueError, match=r"no skill .*juggling"):
        icons.questions(icons.scene(1, 1), ["juggling"])
    with pytest.raises(ValueError, match="there are count_all"):
        next(icons.asked(1, []))


def test_held_out_skills_never_show_in_what_is_learned_before():
    assert set(icons.HELD_OUT) == {"compare", "pattern", "ordinal", "odd"}
    assert set(icons.HELD_OUT).isdisjoint(icons.PRETRAINED)
    for index in range(1500):
        of = icons.scene(5, index)
        told = [text for ask in icons.questions(of, icons.PRETRAINED) for text in (ask.question, *ask.choices)]
        told += icons.captions(of)
        told += [text for pair in icons.yes_no(of) for text in (pair.yes, pair.no)]
        pair = icons.preference(of)
        told += [pair.query, pair.good, pair.bad] if pair else []
        assert [text for text in told if re.search(HELD_OUT_WORDS, text)] == []


def test_answers_of_held_out_skills_are_words_known_before():
    known = {choice for _, ask in asked(6, 3000, *icons.PRETRAINED) for choice in ask.choices}
    assert {choice for _, ask in asked(6, 1000, *icons.HELD_OUT) for choice in ask.choices} <= known


def test_wrong_options_of_held_out_skills_are_in_the_picture():
    """Otherwise a model that sees what is there, but has not learned the skill, would be far above chance."""
    for of, ask in asked(7, 800, *icons.HELD_OUT):
        there = {word for icon in of.icons for word in (icon.shape, icon.color, icon.shape + "s", "crosses")}
        assert set(ask.choices) <= there
