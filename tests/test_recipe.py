"""A recipe is a frozen value, to and from YAML, whose mistakes are told in one sentence."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from blipfit import grid, recipe
from blipfit.errors import UserError
from blipfit.recipe import AdapterConfig, DataConfig, ModelConfig, PerformanceConfig, Recipe, TrainingConfig

MINE = Recipe(
    experiment="mine",
    model=ModelConfig(name="tiny-t5", revision="0123abc"),
    data=DataConfig(name="own", prompt="vqa-v1", limit=5, images="stored"),
    adapter=AdapterConfig(qformer=("ffn", "self_attn"), llm=("attn",), rank=3, alpha=16),
    training=TrainingConfig(learning_rate=3e-4, betas=(0.8, 0.99), max_epochs=7, precision="bf16", dropout=False),
)


@pytest.mark.parametrize("value", [MINE, grid.recipe("scienceqa", 9), grid.recipe("iconqa", 64)], ids=lambda r: r.title)
def test_yaml_round_trip(value: Recipe, tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    file.write_text(value.to_yaml())
    assert recipe.load(file) == value
    assert recipe.load(file).to_yaml() == value.to_yaml()


def test_yaml_is_plain_and_ordered():
    text = MINE.to_yaml()
    assert list(yaml.safe_load(text)) == [
        "experiment",
        "model",
        "data",
        "adapter",
        "training",
        "evaluation",
        "distillation",
        "performance",
    ]
    assert "!!" not in text


def test_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        MINE.experiment = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        MINE.training.seed = 1  # type: ignore[misc]


def test_a_placement_has_one_spelling():
    one = AdapterConfig(qformer=("ffn", "self_attn", "ffn"), llm=("ffn", "attn"))
    assert one == AdapterConfig(qformer=("self_attn", "ffn"), llm=("attn", "ffn"))
    assert one.llm == recipe.LANGUAGE_SUBLAYERS
    assert MINE.override(["adapter.qformer=ffn"]) == MINE.override(["adapter.qformer=[ffn]"])


def _file(tmp_path: Path, **changes) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(MINE.model_dump(mode="json") | changes))
    return file


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"trainig": {}}, "unknown key 'trainig'; did you mean 'training'?"),
        ({"training": {"learning_rte": 1}}, "unknown key 'learning_rte' in training; did you mean 'learning_rate'?"),
        ({"data": {"name": "own", "prompt": "vqa-v1", "zzz": 1}}, "in data; known: name, prompt, images, limit"),
        ({"training": {"max_epochs": 0}}, r"training.max_epochs: input should be greater than or equal to 1 \(got 0\)"),
        ({"training": {"learning_rate": float("inf")}}, "training.learning_rate: input should be a finite number"),
        ({"training": {"betas": [0.9, 1.0]}}, "training.betas.1: input should be less than 1"),
        ({"adapter": {"qformer": ["fn"]}}, "adapter.qformer.0: input should be 'self_attn', 'cross_attn' or 'ffn'"),
        ({"model": "tiny"}, r"model: input should be a valid dictionary .*\(got 'tiny'\)"),
        ({"experiment": "a/b"}, "'a/b' cannot name a folder"),
        ({"experiment": ".."}, "cannot name a folder"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence(tmp_path: Path, changes, told):
    file = _file(tmp_path, **changes)
    with pytest.raises(UserError, match=told) as error:
        recipe.load(file)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)
    assert "[" not in str(error.value).split(": ")[1]  # no type of pydantic's in the field's name


def test_a_missing_field_is_named(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("experiment: x\ndata: {name: own}\n")
    with pytest.raises(UserError, match=r"model: field required .* data.prompt: field required"):
        recipe.load(file)


def test_a_number_may_name_an_experiment(tmp_path: Path):
    assert recipe.load(_file(tmp_path, experiment=15)).experiment == "15"


@pytest.mark.parametrize(
    ("content", "told"),
    [("a: [1", "not a readable YAML file"), ("- 1\n", "holds no recipe"), ("", "holds no recipe")],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content, told):
    file = tmp_path / "x.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=told) as error:
        recipe.load(file)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match=r"does not exist; `blipfit show"):
        recipe.load(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="not a readable YAML file"):
        recipe.load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"experiment: caf\xe9")
    with pytest.raises(UserError, match="not a readable YAML file"):
        recipe.load(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("training.learning_rate=1e-4", 1e-4),
        ("training.learning_rate=2.5E-5", 2.5e-5),
        ("training.max_epochs=2", 2),
        ("training.dropout=true", True),
        ("training.betas=[0.5, 0.6]", (0.5, 0.6)),
        ("data.limit=null", None),
        ("adapter.llm=[ffn, attn]", ("attn", "ffn")),
        ("adapter.qformer=full", "full"),
        ("model.name=../folder", "../folder"),
        ("data.images=off", "off"),
        ("performance.compile=true", True),
        ("performance.cuda_graphs=on", True),
        ("performance.pad_to_multiple_of=64", 64),
        ("performance.checkpointing=answer", ("answer",)),
        ("performance.checkpointing=[query, answer]", ("query", "answer")),
    ],
)
def test_overrides_reach_every_kind_of_field(assignment, value):
    section, field = assignment.partition("=")[0].split(".")
    changed = MINE.override([assignment])
    assert getattr(getattr(changed, section), field) == value
    assert list(MINE.differences(changed)) == [f"{section}.{field}"]
    assert changed.override([]) == changed


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("training.max_epoch=2", "unknown key 'max_epoch' in training; did you mean 'max_epochs'?"),
        ("trainng.seed=1", "unknown key 'trainng'; did you mean 'training'?"),
        ("training=3", "training is a section; set one of its fields: batch_size"),
        ("model.name.x=1", "model.name has no fields"),
        ("training.seed", "write it as section.field=value"),
        ("training.seed=[", "is not a YAML value"),
        ("training.seed=abc", "training.seed: input should be a valid integer"),
        ("training.learning_rate=-1", "training.learning_rate: input should be greater than 0"),
    ],
)
def test_a_wrong_override_is_one_sentence(assignment, told):
    with pytest.raises(UserError, match=told) as error:
        MINE.override([assignment])
    assert "\n" not in str(error.value)


def test_later_overrides_win_and_differences_tell_both_sides():
    changed = MINE.override(["training.seed=1", "training.seed=2", "experiment=other"])
    assert MINE.differences(changed) == {"experiment": ("mine", "other"), "training.seed": (42, 2)}
    assert MINE.differences(MINE) == {}


def test_layers_need_sublayers():
    assert AdapterConfig(llm=("attn",), llm_layers=(5, 0, 5)).llm_layers == (0, 5)
    for values in ({"llm_layers": (0,)}, {"llm": ("attn",), "llm_layers": ()}):
        with pytest.raises(ValueError, match="give both, or neither"):
            AdapterConfig(**values)
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        AdapterConfig(llm=("attn",), llm_layers=(-1,))


def test_adalora_takes_its_budget_from_the_rank():
    mine = MINE.override(["adapter.method=adalora"]).adapter
    assert (mine.rank, mine.mean_rank, mine.start_rank) == (3, 3, 5)
    assert (MINE.adapter.mean_rank, MINE.adapter.start_rank) == (3, 3)
    mine = MINE.override(["adapter.method=adalora", "adapter.adalora.target_rank=1.5"]).adapter
    assert (mine.mean_rank, mine.start_rank) == (1.5, 3)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["adapter.method=adalora", "adapter.adalora.init_rank=3"], "starts at rank 3 and must end lower, not at 3"),
        (["adapter.method=adalora", "adapter.adalora.target_rank=9", "adapter.adalora.init_rank=4"], "must end lower"),
        (["adapter.method=adalora", "adapter.qformer=full", "adapter.llm=[]"], "no layer to distribute ranks over"),
        (["adapter.adalora.tinit=5"], "adapter.adalora is set and would not be read"),
    ],
)
def test_an_adalora_that_cannot_be_is_told(changes, told):
    with pytest.raises(UserError, match=told):
        MINE.override(changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["adapter.method=dorra"], r"adapter.method: unknown method; did you mean 'dora'\? \(got 'dorra'\)"),
        (["adapter.method=prefix"], "unknown method; known: lora, adalora, dora, rslora, pissa, ia3"),
        (["adapter.method=ia3"], r"ia3 has no rank, so adapter.rank 3 would not be read; leave it at 8 .*rank=8"),
        (["adapter.method=ia3", "adapter.rank=8", "adapter.alpha=4"], "ia3 has no alpha, so adapter.alpha 4 would not"),
        (["adapter.method=dora", "adapter.qformer=full", "adapter.llm=[]"], "dora has no layer to adapt; choose"),
        (["adapter.method=pissa", "adapter.adalora.tinit=5"], "adapter.adalora is set and would not be read"),
        (
            ["adapter.method=pissa", "adapter.llm=attn", "model.quantization=8bit"],
            "pissa does not work on a language model in 8bit; set model.quantization to none, or leave",
        ),
    ],
)
def test_a_method_that_cannot_be_is_told(changes, told):
    with pytest.raises(UserError, match=told) as error:
        MINE.override(changes)
    assert "\n" not in str(error.value)


def test_methods_read_what_is_theirs():
    dora = MINE.override(["adapter.method=dora"]).adapter
    assert (dora.start_rank, dora.mean_rank) == (3, 3)
    MINE.override(["adapter.method=ia3", "adapter.rank=8", f"adapter.alpha={AdapterConfig().alpha}"])
    MINE.override(["adapter.method=pissa", "model.quantization=8bit", "adapter.llm=[]", "adapter.qformer=ffn"])
    MINE.override(["adapter.method=dora", "model.quantization=4bit", "adapter.llm=attn"])


# ---------------------------------------------------------------- performance


def test_a_recipe_of_version_0_1_has_the_defaults(tmp_path: Path):
    """Its file has no section for performance, and says the same as one with the section untouched."""
    values = MINE.model_dump(mode="json")
    del values["performance"]
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump(values))
    old_recipe = recipe.load(file)
    assert old_recipe == MINE
    assert old_recipe.differences(MINE) == {}
    assert old_recipe.to_yaml() == MINE.to_yaml()
    performance = old_recipe.performance
    assert (performance.compile, performance.cuda_graphs, performance.checkpointing) == (False, False, ())
    assert performance.pad_to_multiple_of == 1


def test_performance_goes_through_yaml(tmp_path: Path):
    changed = MINE.override(
        ["performance.compile=true", "performance.pad_to_multiple_of=16", "performance.checkpointing=[query, answer]"]
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(changed.to_yaml())
    assert recipe.load(file) == changed
    assert changed.performance == PerformanceConfig(
        compile=True, pad_to_multiple_of=16, checkpointing=("query", "answer")
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            ["performance.checkpointing=vision"],
            r"recipe: performance.checkpointing.0: input should be 'query' or 'answer' \(got 'vision'\)",
        ),
        (
            ["performance.checkpointing=[query, llm]"],
            "performance.checkpointing.1: input should be 'query' or 'answer'",
        ),
        (["performance.checkpointing=true"], r"performance.checkpointing: input should be .* \(got True\)"),
        (
            ["performance.cuda_graphs=true", "performance.checkpointing=query"],
            "performance: cuda_graphs and checkpointing exclude each other .*; choose one$",
        ),
        (["performance.pad_to_multiple_of=0"], "performance.pad_to_multiple_of: input should be greater than or equal"),
        (["performance.pad_to_multiple_of=8.5"], "performance.pad_to_multiple_of: input should be a valid integer"),
        (["performance.compile=fast"], "performance.compile: input should be a valid boolean"),
        (["performance.compiled=true"], "unknown key 'compiled' in performance; did you mean 'compile'?"),
        (["performance=fast"], "performance is a section; set one of its fields: compile, cuda_graphs"),
    ],
)
def test_a_performance_that_cannot_be_is_one_sentence(changes, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        MINE.override(changes)
    assert "\n" not in str(error.value)


def test_each_of_what_excludes_each_other_is_fine_alone():
    assert MINE.override(["performance.cuda_graphs=true", "performance.compile=true"]).performance.cuda_graphs
    assert MINE.override(["performance.checkpointing=query", "performance.compile=true"]).performance.compile


def test_recipes_of_version_0_1_are_read(tmp_path):
    """Their section `judging` is `evaluation` now, in files and assignments; what is written says `evaluation`."""
    older = MINE.to_yaml().replace("\nevaluation:", "\njudging:")
    assert "judging:" in older
    (tmp_path / "older.yaml").write_text(older)
    assert recipe.load(tmp_path / "older.yaml") == MINE
    changed = MINE.override(["judging.method=generation"])
    assert changed == MINE.override(["evaluation.method=generation"])
    assert "judging" not in changed.to_yaml()


@pytest.mark.parametrize(
    ("assignment", "name"), [('experiment="28"', "28"), ("experiment=28", "28"), ('experiment="1e3"', "1e3")]
)
def test_a_quoted_value_stays_text(assignment, name):
    assert grid.recipe("icons", 13, "tiny").override([assignment]).experiment == name


@pytest.mark.parametrize("value", ["1e-4", "1E-4", "1.e-4", "0.0001", "+1e-4"])
def test_a_number_with_an_exponent_is_a_number(value):
    assert grid.recipe("icons", 13, "tiny").override([f"training.learning_rate={value}"]).training.learning_rate == 1e-4
