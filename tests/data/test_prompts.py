"""The exact text of every prompt; a change of one character would change published results."""

from pathlib import Path

import pytest

from blipfit.data.prompts import PROMPTS, clean_prompt, format_choices, get_prompt
from blipfit.data.question import Question
from blipfit.errors import UserError


def question(**fields) -> Question:
    defaults = {"id": "1", "image": Path("x.png"), "question": "Which is it?", "answer": "Y"}
    choices = {"choices": ("X", "Y"), "answer_index": 1}
    return Question(**(defaults | choices | fields))


def test_scienceqa_prompt_letter_by_letter():
    texts = get_prompt("scienceqa-v1")(question(context="A hint. A lecture.\nIts second line."))
    assert texts.prompt == (
        "Context: {A hint. A lecture.\nIts second line.} Question: {Which is it?} Options: {(a) X\n(b) Y\n} Answer:"
    )
    assert texts.target == "(b) Y"
    assert texts.candidates == ("(a) X", "(b) Y")


def test_scienceqa_prompt_without_hint_keeps_the_space_before_the_lecture():
    # hint + " " + lecture with an empty hint; if both are empty, only the space remains.
    assert get_prompt("scienceqa-v1")(question(context=" L")).prompt.startswith("Context: { L} Question: {")
    assert get_prompt("scienceqa-v1")(question(context=" ")).prompt.startswith("Context: { } Question: {")


def test_iconqa_prompt_letter_by_letter():
    texts = get_prompt("iconqa-v1")(question(question="What time is it?", choices=("6:00 A.M.", "6:00 P.M.")))
    assert texts.prompt == ("<Image> Question: What time is it? Options: (a) 6:00 A.M. (b) 6:00 P.M.. Short answer:")
    assert texts.target == "(b) 6:00 P.M."


def test_four_characters_are_removed_from_the_prompt_but_not_from_the_answers():
    texts = get_prompt("iconqa-v1")(question(question="Wow! * # ; ok?", choices=("a*b", "c#;!"), answer="c#;!"))
    assert texts.prompt == "<Image> Question: Wow    ok? Options: (a) ab (b) c. Short answer:"
    assert texts.target == "(b) c#;!"
    assert texts.candidates == ("(a) a*b", "(b) c#;!")


def test_clean_prompt_strips_spaces_at_the_end_only():
    assert clean_prompt("  a; b !  ") == "  a b"
    assert clean_prompt("a\n ") == "a\n"


def test_own_prompt_has_only_the_parts_the_question_has():
    write_prompt = get_prompt("vqa-v1")
    open_question = question(choices=(), answer_index=None, answer="a red kite")
    assert write_prompt(open_question).prompt == "Question: Which is it? Short answer:"
    assert write_prompt(open_question).target == "a red kite"
    assert write_prompt(open_question).candidates == ()
    assert write_prompt(question(context=" In town. ")).prompt == (
        "Context: In town. Question: Which is it? Options: (a) X (b) Y. Short answer:"
    )


def test_caption_prompt():
    texts = get_prompt("caption-v1")(question(choices=(), answer_index=None, answer="A kite in the sky."))
    assert (texts.prompt, texts.target) == ("<Image> A short image description:", "A kite in the sky.")


def test_instruction_is_the_question_itself():
    texts = get_prompt("instruction-v1")(
        question(question="Describe #1!  ", choices=(), answer_index=None, answer="A! ")
    )
    assert (texts.prompt, texts.target, texts.candidates) == ("Describe 1", "A! ", ())


def test_options_are_lettered_to_the_end_of_the_alphabet():
    assert format_choices([str(n) for n in range(26)])[25] == "(z) 25"


def test_more_choices_than_letters_are_refused_by_every_prompt():
    with pytest.raises(UserError, match=r"27 choices: at most 26 can be lettered \(a to z\)"):
        format_choices([str(n) for n in range(27)])
    for write_prompt in PROMPTS.values():
        with pytest.raises(UserError, match="100 choices: at most 26"):
            write_prompt(question(choices=tuple(map(str, range(100))), answer="1"))


def test_every_prompt_has_a_version():
    assert all(name.rpartition("-v")[2].isdigit() for name in PROMPTS)


def test_an_unknown_prompt_suggests_the_most_similar_name():
    with pytest.raises(UserError, match=r"unknown prompt 'sciencqa-v1'; did you mean 'scienceqa-v1'\?"):
        get_prompt("sciencqa-v1")
    with pytest.raises(UserError, match="known: scienceqa-v1, iconqa-v1"):
        get_prompt("zzz")
