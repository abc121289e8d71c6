"""The published grid, number by number, against a table of its own."""

import pytest

from blipfit import grid
from blipfit.adapters import parameter_counts, placement
from blipfit.errors import UserError
from blipfit.model import shapes

# ids (T5), LoRA in the language model, Q-Former; the Vicuna ids are 32 higher, the ranks are 1, 2, 4, 8.
TABLE = [
    (range(1, 5), {"ffn"}, "full"),
    (range(5, 9), {"attn"}, "full"),
    (range(9, 13), {"attn", "ffn"}, "full"),
    (range(13, 17), set(), {"ffn"}),
    (range(17, 21), set(), {"self_attn"}),
    (range(21, 25), set(), {"cross_attn"}),
    (range(25, 29), set(), {"self_attn", "cross_attn", "ffn"}),
    (range(29, 33), {"attn", "ffn"}, {"self_attn", "cross_attn", "ffn"}),
]
SLOWER = {
    "scienceqa": {1e-4: {19, 22, 29, 31, 32, 61}},
    "iconqa": {1e-4: {15, 26, 31, 61, 62, 63}, 1e-5: {5, 8, 9, 12, 33, 40, 42}},
    "icons": {},
}
# Trainable parameters a rank, and what is trained beside it.
QFORMER = {"self_attn": 36_864, "ffn": 184_320, "cross_attn": 44_544}
LANGUAGE = {"t5": {"attn": 589_824, "ffn": 1_032_192}, "vicuna": {"attn": 524_288, "ffn": 1_449_984}}
PROJECTION = {"t5": 1_574_912, "vicuna": 3_149_824}
QFORMER_FULL = {"t5": 187_262_464, "vicuna": 188_837_376}
ALWAYS = 27_392


def _row(experiment: int):
    base = 32 if experiment > 32 else 0
    ids, llm, qformer = next(row for row in TABLE if experiment - base in row[0])
    return "vicuna" if base else "t5", llm, qformer, 2 ** (experiment - base - ids[0])


@pytest.mark.parametrize("dataset", ["scienceqa", "iconqa", "icons"])
def test_all_64_recipes(dataset):
    recipes = list(grid.recipes(dataset))
    assert [r.experiment for r in recipes] == [str(n) for n in range(1, 65)]
    for number, r in enumerate(recipes, start=1):
        family, llm, qformer, rank = _row(number)
        assert (set(r.adapter.llm), r.adapter.rank, r.adapter.alpha) == (llm, rank, 8), number
        assert r.adapter.qformer == qformer if qformer == "full" else set(r.adapter.qformer) == qformer, number
        rule = 2e-5 if qformer == "full" else 5e-4
        rate = next((rate for rate, ids in SLOWER[dataset].items() if number in ids), rule)
        epochs = 10 if dataset == "iconqa" and number in (6, 38) else 15
        t = r.training
        assert (t.learning_rate, t.max_epochs, t.patience, t.seed) == (rate, epochs, 3, 42), number
        assert (t.batch_size, t.accumulation) == ((16, 1) if family == "t5" else (8, 2)), number
        assert (t.weight_decay, t.betas, t.max_text_tokens, t.max_target_tokens) == (0.05, (0.9, 0.999), 128, 256)
        assert r.model.name == f"Salesforce/instructblip-{'flan-t5-xl' if family == 't5' else 'vicuna-7b'}"
        assert (r.data.name, r.data.prompt) == (dataset, "scienceqa-v1" if dataset == "scienceqa" else "iconqa-v1")
        assert r.data.images == ("stored" if dataset == "icons" else "shared")
        assert r.training.dropout
        assert r.evaluation.method == "ranking"


def test_miniatures_on_drawn_pictures_have_a_recipe_of_their_own():
    for number in grid.IDS:
        own = grid.recipe("icons", number, "tiny")
        differs = grid.recipe("icons", number).differences(own)
        rate = 5e-4 if own.adapter.qformer == "full" else 2e-3
        assert {"training.learning_rate", "training.max_epochs", "model.name"} == set(differs), number
        assert (own.training.learning_rate, own.training.max_epochs) == (rate, 3), number
    for dataset, model in (("icons", "./mine"), ("scienceqa", "tiny"), ("iconqa", "tiny")):
        other = grid.recipe(dataset, 28, model)
        assert other.training == grid.recipe(dataset, 28).training


@pytest.mark.parametrize(
    ("name", "family", "batch"), [("baseline", "t5", (16, 1)), ("baseline-vicuna", "vicuna", (8, 2))]
)
def test_baselines(name, family, batch):
    r = grid.recipe("scienceqa", name)
    assert (r.adapter.qformer, r.adapter.llm, r.training.learning_rate) == ("full", (), 2e-5)
    assert (r.training.batch_size, r.training.accumulation) == batch
    assert r.model.name == grid.MODELS[family]
    model = shapes.on_meta(r.model.name)
    assert sum(parameter_counts.trained_parameters(model, family, r.adapter).values()) == QFORMER_FULL[family]


def test_recovery_learns_from_what_the_folder_was_made_from(tmp_path):
    (tmp_path / grid.SHRINK_RECORD).write_text('{"from": "tiny-t5"}')
    r = grid.recipe("icons", "recover", str(tmp_path))
    assert (r.title, r.model.name, r.adapter.qformer) == ("icons/recover", str(tmp_path), "full")
    assert (r.distillation.teacher, r.distillation.labels, r.distillation.answers) == ("tiny-t5", 0, 0)
    assert r.distillation.visual > 0
    assert not r.training.dropout


@pytest.mark.parametrize("record", [None, "", "[]", "{}"])
def test_what_was_not_shrunk_cannot_recover(record, tmp_path):
    if record is not None:
        (tmp_path / grid.SHRINK_RECORD).write_text(record)
    with pytest.raises(UserError, match=r"recover needs a folder that `blipfit shrink` made"):
        grid.recipe("icons", "recover", str(tmp_path))


@pytest.mark.parametrize("model", [None, "tiny", "tiny-t5"])
def test_a_record_that_happens_to_be_near_is_not_taken(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "tiny", tmp_path / "tiny-t5"):
        folder.mkdir(exist_ok=True)
        (folder / grid.SHRINK_RECORD).write_text('{"from": "tiny-t5"}')
    with pytest.raises(UserError, match=r"recover needs a folder"):
        grid.recipe("icons", "recover", model)


@pytest.mark.parametrize("family", ["t5", "vicuna"])
def test_trained_parameters_of_the_modules_equal_the_published(family):
    model = shapes.on_meta(grid.MODELS[family])
    for number in range(1, 33) if family == "t5" else range(33, 65):
        _, llm, qformer, rank = _row(number)
        expected = rank * sum(LANGUAGE[family][part] for part in llm)
        if qformer == "full":
            expected += QFORMER_FULL[family]
        else:
            expected += rank * sum(QFORMER[part] for part in qformer) + ALWAYS + PROJECTION[family]
        assert (
            sum(parameter_counts.trained_parameters(model, family, grid.recipe("iconqa", number).adapter).values())
            == expected
        ), number


@pytest.mark.parametrize(
    ("number", "published"), [(28, 3_728_128), (64, 21_097_216), (15, 2_339_584), (9, 188_884_480)]
)
def test_published_examples(number, published):
    family, _, _ = grid.decode_id(number)
    r = grid.recipe("scienceqa", number)
    assert (
        sum(parameter_counts.trained_parameters(shapes.on_meta(r.model.name), family, r.adapter).values()) == published
    )


@pytest.mark.parametrize("wrong", [0, 65, -1, "x", "1.5", "baselin"])
def test_other_experiments_are_refused(wrong):
    with pytest.raises(UserError, match=rf"no experiment '?{wrong}'?; the grid has 1 to 64 and baseline"):
        grid.recipe("scienceqa", wrong)


def test_other_data_sets_are_refused():
    with pytest.raises(UserError, match=r"no data set 'vqa'; known: scienceqa, iconqa, icons"):
        grid.recipe("vqa", 1)


def test_another_model():
    assert grid.recipe("iconqa", 47, "tiny").model.name == "tiny-vicuna"
    assert grid.recipe("iconqa", 15, "tiny").model.name == "tiny-t5"
    assert grid.recipe("iconqa", 15, "./mine").model.name == "./mine"
    assert grid.recipe("iconqa", "15") == grid.recipe("iconqa", 15)


@pytest.mark.parametrize("name", list(grid.EXPLORATIONS))
def test_explorations(name):
    """LoRA in the whole Q-Former, and in a third of the language model's blocks, or none, or all."""
    r = grid.recipe("rewardbench", name)
    family, place = grid.EXPLORATIONS[name]
    assert r == grid.exploration_recipe(name)
    assert (r.experiment, r.model.name, r.data.prompt) == (name, grid.MODELS[family], "instruction-v1")
    assert (r.evaluation.method, r.data.images) == ("generation", "stored")
    counted = parameter_counts.trained_parameters(shapes.on_meta(r.model.name), family, r.adapter)
    language = sum(counted.get(f"llm {part}", 0) for part in LANGUAGE[family])
    whole = 8 * sum(LANGUAGE[family].values())
    share = language / whole
    assert (place == "qformer") == (language == 0)
    assert (place == "all") == (language == whole)
    if place not in ("qformer", "all"):
        assert share == pytest.approx(1 / 3, abs=0.02)
    assert sum(counted.get(f"qformer {part}", 0) for part in QFORMER) == 8 * sum(QFORMER.values())


def test_the_three_thirds_are_three_places():
    first, middle, last = (
        set(grid.exploration_recipe(f"explore-{p}").adapter.llm_layers) for p in ("first", "middle", "last")
    )
    assert first | middle | last == set(range(48))
    assert len(first) == len(middle) == len(last) == 16


@pytest.mark.parametrize("name", list(grid.BLOCKS))
def test_the_depths_are_the_models(name):
    family = shapes.family(name)
    names = [n for n, _ in shapes.on_meta(name).named_modules()]
    assert len(placement.list_blocks((f"{n}." for n in names), family)) == sum(grid.BLOCKS[name])


def test_an_unknown_exploration():
    with pytest.raises(UserError, match=r"no experiment 'explore-end'.* explore-last"):
        grid.recipe("rewardbench", "explore-end")
    with pytest.raises(UserError, match="no exploration 'last'; known: explore-qformer"):
        grid.exploration_recipe("last")
