"""A module, a row in the table and its import are all that a new data set takes."""

from types import SimpleNamespace

from blipfit import data, data_sets, grid


def test_every_row_of_the_table_has_a_module():
    assert list(data.MODULES) == list(data_sets.DATA_SETS)
    for name, import_module in data.MODULES.items():
        module = import_module()
        assert callable(module.prepare), name
        assert callable(module.load), name


def test_a_new_data_set_needs_a_row_and_a_module(tmp_path, monkeypatch):
    module = SimpleNamespace(load=lambda folder, split: [(folder.name, split)], prepare=lambda source, to: (source, to))
    monkeypatch.setitem(data_sets.DATA_SETS, "mine", data_sets.DataSet("mine", "vqa-v1", open=True))
    monkeypatch.setitem(data.MODULES, "mine", lambda: module)
    assert data.load("mine", tmp_path, "val") == [(tmp_path.name, "val")]
    assert data.prepare("mine", 1, 2) == (1, 2)
    recipe = grid.recipe("mine", 28)
    assert recipe.data.prompt == "vqa-v1"
    assert recipe.data.images == "shared"
    assert recipe.evaluation.method == "generation"
