"""Recipes from hostile YAML and `--set` arguments: a recipe that can be written and read again, or a UserError."""

import json
from itertools import pairwise

import pytest
import yaml
from hypothesis import strategies as st

from blipfit import grid
from blipfit import recipe as recipes
from blipfit.errors import UserError
from hostile_inputs import changed, changed_bytes, is_user_error, texts, values

VALID = grid.recipe("iconqa", 31, "tiny").override(["adapter.method=adalora", "distillation.teacher=tiny-t5"])
FIELDS = [path for path, _ in recipes._leaves(VALID)]
YAML_VALUES = (
    *(
        "&a [*a]",
        "*a",
        "!!python/object:os.system {}",
        "!!binary zz",
        "!!timestamp x",
        "!!bool maybe",
        "!!int ''",
        "!!set {}",
    ),
    *("2001-99-99", "0x" + "f" * 5000, "9" * 5000, "1:99:99:99", ".nan", "-.inf", "1e5", "'", "{a", "? [a]", "<<: 1"),
    *(
        "[" * 400,
        "- " * 400,
        '"\\ud800"',
        '"\\UFFFFFFFF"',
        '"\\0"',
        "|\n x",
        "%YAML 9.9",
        "---\n---",
        "{[a]: b}",
        "\x85",
    ),
    *("[" + "1," * 2_000 + "]", "&a " * 3, "a: b: c", "@", "`", "!<x> y", "!!omap [1]", "!!pairs [a]", "!!null x"),
)


def check_recipe(recipe: recipes.Recipe) -> None:
    """A recipe can be written, and read as the same recipe."""
    assert recipes.from_mapping(yaml.safe_load(recipe.to_yaml())) == recipe
    json.dumps(recipe.model_dump(mode="json"), allow_nan=False, ensure_ascii=False).encode()


@st.composite
def yaml_files(draw: st.DrawFn) -> bytes:
    """A valid recipe with faults in its values, its YAML or its bytes."""
    value = draw(changed(VALID.model_dump(mode="json")))
    text = yaml.safe_dump(value) if draw(st.booleans()) else json.dumps(value, indent=1)
    if draw(st.booleans()):
        lines = text.split("\n")
        row = draw(st.integers(0, len(lines) - 1))
        lines[row] = lines[row].partition(":")[0] + ": " + draw(st.sampled_from(YAML_VALUES) | texts())
        text = "\n".join(lines)
    data = text.encode("utf-8", "surrogatepass")
    return draw(changed_bytes(data) if draw(st.booleans()) else st.just(data))


BOMB = "a: &a [l, l]\n" + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in pairwise("abcdefghi"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB + "experiment: *i", "aliases"),
        ("model: &a {name: *a}", "aliases"),
        ("[" * 90_000, "nested too deeply"),
        ("- " * 400, "nested too deeply"),
        (" " * 200_000, "characters"),
        ("model: !!bool maybe", "not a readable YAML file"),
        ("model: 2001-99-99", "not a readable YAML file"),
        ("training: {max_epochs: 0x" + "f" * 5000 + "}", "too many digits"),
        ("model: '\0'", "not a readable YAML file"),
    ],
)
def test_hostile_yaml_is_refused(tmp_path, text, reason):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=reason) as refusal:
        recipes.load(file)
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize(
    ("assignment", "reason"),
    [
        ('model.name="\\ud800"', "half a character"),
        ("experiment=" + "a" * 300, "too many for the name of a folder"),
        ("adapter.method=" + "x" * 90_000, "unknown method"),
        ("x" * 90_000 + "=1", "unknown key"),
        ("x" * 90_000, "section.field=value"),
        ("training.max_epochs=0x" + "f" * 5000, "too many digits"),
    ],
)
def test_hostile_assignments_are_refused_in_few_words(assignment, reason):
    with pytest.raises(UserError, match=reason) as refusal:
        VALID.override([assignment])
    assert len(str(refusal.value)) < 1000


def test_a_file_is_a_recipe_or_an_error(for_all, tmp_path):
    file = tmp_path / "recipe.yaml"

    def check(content: bytes) -> None:
        file.write_bytes(content)
        if not is_user_error(lambda: recipes.load(file)):
            check_recipe(recipes.load(file))

    for_all(150, check, yaml_files() | st.binary(max_size=60))


def test_a_set_argument_gives_a_recipe_or_an_error(for_all):
    paths = st.sampled_from(FIELDS) | st.sampled_from(["adapter", "model.name.x", "", ".", "judging.method"]) | texts()
    yaml_texts = st.sampled_from(YAML_VALUES) | texts() | values().map(repr)
    assignments = st.builds("{}={}".format, paths, yaml_texts)

    def check(arguments: list[str]) -> None:
        if not is_user_error(lambda: VALID.override(arguments)):
            check_recipe(VALID.override(arguments))

    for_all(400, check, st.lists(assignments | texts(), max_size=2))


def test_a_value_of_python_gives_a_recipe_or_an_error(for_all):
    def check(value: object) -> None:
        if not is_user_error(lambda: recipes.from_mapping(value)):
            check_recipe(recipes.from_mapping(value))

    for_all(150, check, changed(VALID.model_dump(mode="json")))
