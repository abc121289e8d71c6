"""What a result says about itself."""

from blipfit import grid
from blipfit.training import write_result


def test_differences_from_the_published_recipe():
    published = grid.recipe("scienceqa", 15)
    assert write_result.differences(published) == {}
    changed = published.override(["training.max_epochs=2", "model.name=tiny-t5", "adapter.llm=attn"])
    assert write_result.differences(changed) == {
        "model.name": ["Salesforce/instructblip-flan-t5-xl", "tiny-t5"],
        "adapter.llm": [(), ("attn",)],
        "training.max_epochs": [15, 2],
    }


def test_a_recipe_of_ones_own_differs_from_none():
    assert write_result.differences(grid.recipe("scienceqa", 15).override(["experiment=mine"])) is None


def test_what_follows_from_the_model_is_not_told():
    recipe = grid.recipe("icons", 15, "tiny")
    model = {"model.name": ["Salesforce/instructblip-flan-t5-xl", "tiny-t5"]}
    assert write_result.differences(recipe) == model
    changed = recipe.override(["training.max_epochs=4"])
    assert write_result.differences(changed) == {**model, "training.max_epochs": [3, 4]}
