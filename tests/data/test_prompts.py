"""Golden prompts, letter by letter: what a model reads decides every published number."""

from pathlib import Path

import pytest

from blipfit.data.prompts import PROMPTS, clean, options, prompt
from blipfit.data.question import Question
from blipfit.errors import UserError


def question(**fields) -> Question:
    given = {"id": "1", "image": Path("x.png"), "question": "Which is it?", "answer": "Y"}
    choices = {"choices": ("X", "Y"), "answer_index": 1}
    return Question(**(given | choices | fields))


def test_scienceqa_prompt_letter_by_letter():
    asked = prompt("scienceqa-v1")(question(context="A hint. A lecture.\nIts second line."))
    assert asked.prompt == (
        "Context: {A hint. A lecture.\nIts second line.} Question: {Which is it?} Options: {(a) X\n(b) Y\n} Answer:"
    )
    assert asked.target == "(b) Y"
    assert asked.candidates == ("(a) X", "(b) Y")


def test_scienceqa_prompt_without_hint_keeps_the_blank_before_the_lecture():
    # hint + " " + lecture with an empty hint; with both empty only the blank is left.
    assert prompt("scienceqa-v1")(question(context=" L")).prompt.startswith("Context: { L} Question: {")
    assert prompt("scienceqa-v1")(question(context=" ")).prompt.startswith("Context: { } Question: {")


def test_iconqa_prompt_letter_by_letter():
    asked = prompt("iconqa-v1")(question(question="What time is it?", choices=("6:00 A.M.", "6:00 P.M.")))
    assert asked.prompt == ("<Image> Question: What time is it? Options: (a) 6:00 A.M. (b) 6:00 P.M.. Short answer:")
    assert asked.target == "(b) 6:00 P.M."


def test_four_characters_leave_the_prompt_but_not_the_answers():
    asked = prompt("iconqa-v1")(question(question="Wow! * # ; ok?", choices=("a*b", "c#;!"), answer="c#;!"))
    assert asked.prompt == "<Image> Question: Wow    ok? Options: (a) ab (b) c. Short answer:"
    assert asked.target == "(b) c#;!"
    assert asked.candidates == ("(a) a*b", "(b) c#;!")


def test_clean_strips_blanks_at_the_end_only():
    assert clean("  a; b !  ") == "  a b"
    assert clean("a\n ") == "a\n"


def test_own_prompt_has_only_the_parts_the_question_has():
    ask = prompt("vqa-v1")
    open_question = question(choices=(), answer_index=None, answer="a red kite")
    assert ask(open_question).prompt == "Question: Which is it? Short answer:"
    assert ask(open_question).target == "a red kite"
    assert ask(open_question).candidates == ()
    assert ask(question(context=" In town. ")).prompt == (
        "Context: In town. Question: Which is it? Options: (a) X (b) Y. Short answer:"
    )


def test_caption_prompt():
    asked = prompt("caption-v1")(question(choices=(), answer_index=None, answer="A kite in the sky."))
    assert (asked.prompt, asked.target) == ("<Image> A short image description:", "A kite in the sky.")


def test_instruction_is_the_question_itself():
    asked = prompt("instruction-v1")(question(question="Describe #1!  ", choices=(), answer_index=None, answer="A! "))
    assert (asked.prompt, asked.target, asked.candidates) == ("Describe 1", "A! ", ())


def test_options_are_lettered_to_the_end_of_the_alphabet():
    assert options([str(n) for n in range(26)])[25] == "(z) 25"


def test_every_prompt_has_a_version():
    assert all(name.rpartition("-v")[2].isdigit() for name in PROMPTS)


def test_unknown_prompt_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown prompt 'sciencqa-v1'; did you mean 'scienceqa-v1'\?"):
        prompt("sciencqa-v1")
    with pytest.raises(UserError, match="known: scienceqa-v1, iconqa-v1"):
        prompt("zzz")
