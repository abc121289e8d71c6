"""Shrinking: identity at the original size, inherited weights, the repair, the checkpoint folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import InstructBlipForConditionalGeneration, InstructBlipProcessor

import checkpoints
import reference
from blipfit import grid
from blipfit.compression import checkpoint_writer, importance
from blipfit.compression.calibration import Calibration, sample_questions
from blipfit.compression.qformer_size import Size, reduce_size
from blipfit.compression.repair import lost_variance
from blipfit.compression.selection import Selection, cut_model, select_parts
from blipfit.compression.shrink import make_backbone, shrink, shrink_by_scores, write_checkpoint
from blipfit.errors import UserError
from blipfit.model import checkpoint_files, loading

SMALLER = {"hidden": 24, "heads": 3, "intermediate": 40, "queries": 3}


@pytest.fixture
def questions(backbone):
    """Calibration questions of different lengths, with random pictures."""
    encoded = reference.ask(backbone, count=24)
    features = backbone.see(reference.pictures(backbone, 24))
    return Calibration.from_encoded(backbone, encoded, lambda indices: features[indices])


def size_of(backbone, **sizes) -> Size:
    return reduce_size(backbone.hf.config, **sizes)


@torch.no_grad()
def logits(backbone, questions) -> torch.Tensor:
    return torch.cat([backbone.target_logits(backbone.query(f, b), b)[0] for f, b in questions])


@pytest.mark.parametrize("method", importance.METHODS)
def test_the_same_size_is_the_identity(backbone, questions, method):
    small, record = shrink(backbone, size_of(backbone), method, questions)
    torch.testing.assert_close(
        logits(make_backbone(backbone, small), questions), logits(backbone, questions), atol=1e-6, rtol=0
    )
    assert record["lost"] == {"before": pytest.approx(0, abs=1e-9), "after": pytest.approx(0, abs=1e-9)}


@pytest.mark.parametrize(
    "sizes", [SMALLER, {"layers": 1}, {"heads": 2, "hidden": 16}, {"cross_every": 3, "queries": 1}]
)
def test_the_smaller_model_has_the_requested_size(backbone, questions, sizes):
    size = size_of(backbone, **sizes)
    small, _ = shrink(backbone, size, "taylor", questions)
    assert Size.from_config(small.config) == size
    smaller = make_backbone(backbone, small)
    features, batch = questions.batches[0]
    assert smaller.query(features, batch).shape == (len(features), size.queries, small.config.text_config.hidden_size)
    assert not any(parameter.requires_grad for parameter in small.parameters())


def test_the_original_stays_as_it_is(backbone, questions):
    def hooks() -> list:
        return [(m, [*m._forward_hooks.values()], [*m._forward_pre_hooks.values()]) for m in backbone.hf.modules()]

    before, hooks_before = logits(backbone, questions), hooks()
    shrink(backbone, size_of(backbone, **SMALLER), "taylor", questions)
    assert logits(backbone, questions).equal(before)
    assert not backbone.hf.qformer._forward_hooks
    assert hooks() == hooks_before


def test_dead_channels_are_cut_first_without_any_change(backbone, questions):
    """Units and heads whose outputs nothing reads are the ones that are cut, and the logits do not change."""
    for name, linear in (
        importance.find_attention_outputs(backbone.hf) | importance.find_feed_forward_outputs(backbone.hf)
    ).items():
        dead = slice(0, 8) if "attention" in name else slice(10, 40)  # a head of 4, and 30 of 64 units
        linear.weight.data[:, dead] = 0
    expected = logits(backbone, questions)
    for method in ("taylor", "activation", "magnitude"):
        scores = importance.measure(backbone, method, questions)
        selection = select_parts(backbone.hf, size_of(backbone, intermediate=34), scores)
        for name in importance.find_feed_forward_outputs(backbone.hf):
            if "layer.1.output.dense" not in name or method != "taylor":  # the last text branch is not read at all
                assert selection.inner[name].tolist() == [*range(10), *range(40, 64)], (method, name)
        for name in importance.find_attention_outputs(backbone.hf):
            assert scores.heads[name].argmin() == 0, (method, name)
        small = cut_model(backbone.hf, selection)
        torch.testing.assert_close(logits(make_backbone(backbone, small), questions), expected, atol=1e-4, rtol=0)


def test_narrower_heads_keep_the_scale_of_attention(backbone, questions):
    """Half of every head is dead: cutting it changes nothing, although attention divides by another head width."""
    layers = backbone.hf.qformer.encoder.layer
    for layer in layers:
        for attention in [layer.attention, *([layer.crossattention] if layer.has_cross_attention else [])]:
            for name in ("query", "key", "value"):
                linear = getattr(attention.attention, name)
                linear.weight.data.unflatten(0, (4, 8))[:, 4:] = 0
                linear.bias.data.unflatten(0, (4, 8))[:, 4:] = 0
    scores = importance.measure(backbone, "activation", questions)
    channels = {name: torch.cat([8 * h + torch.arange(4) for h in range(4)]) for name in scores.heads}
    units = {name: torch.arange(64) for name in importance.find_feed_forward_outputs(backbone.hf)}
    size = Size(hidden=16, heads=4, intermediate=64, layers=2, queries=4, cross_every=2)
    half = Selection(size, torch.arange(16), torch.arange(4), (0, 1), {**channels, **units})
    small = cut_model(backbone.hf, half)
    old, new = layers[0].attention.attention, small.qformer.encoder.layer[0].attention.attention
    hidden = torch.randn(2, 5, 32)
    hidden[:, :, 16:] = 0
    context = old(hidden)[0].unflatten(2, (4, 8))[..., :4].flatten(2)
    torch.testing.assert_close(new(hidden[:, :, :16])[0], context, atol=1e-5, rtol=0)


def test_repair_beats_slicing(backbone, questions):
    size = size_of(backbone, **SMALLER)
    _, record = shrink(backbone, size, "activation", questions)
    assert record["lost"]["after"] < 0.5 * record["lost"]["before"]
    # Also on questions to which it was not fitted.
    encoded = reference.ask(backbone, count=20, options=4)
    fresh = backbone.see(reference.pictures(backbone, 20, seed=9))
    unseen = Calibration.from_encoded(backbone, encoded, lambda indices: fresh[indices])
    scores = importance.measure(backbone, "activation", questions)
    selection = select_parts(backbone.hf, size, scores)
    target = [backbone.query(f, b)[:, selection.queries] for f, b in unseen]

    def lost(repair_questions):
        small, _ = shrink_by_scores(backbone, size, scores, repair_questions, "activation")
        smaller = make_backbone(backbone, small)
        return lost_variance([smaller.query(f, b) for f, b in unseen], target)

    assert lost(questions) < lost(None)


def test_importance_by_taylor_needs_questions(backbone):
    with pytest.raises(UserError, match="measured on questions"):
        shrink(backbone, size_of(backbone), "taylor", None)


def test_importance_by_magnitude_needs_no_questions(backbone):
    _, record = shrink(backbone, size_of(backbone, **SMALLER), "magnitude", None)
    assert record["lost"] is None
    assert record["questions"] == 0


def test_the_folder_is_an_ordinary_checkpoint(backbone, small, family, questions, tmp_path):
    size = size_of(backbone, **SMALLER)
    hf, record = shrink(backbone, size, "taylor", questions)
    write_checkpoint(small[family], tmp_path / "smaller", hf, record)
    loaded = checkpoints.load(tmp_path / "smaller")
    assert Size.from_config(loaded.hf.config) == size
    assert logits(loaded, questions).equal(logits(make_backbone(backbone, hf), questions))
    with loading.quiet():
        plain = InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "smaller")
    assert plain.query_tokens.equal(hf.query_tokens)
    processor = InstructBlipProcessor.from_pretrained(tmp_path / "smaller", backend="pil")
    assert processor.num_query_tokens == size.queries
    written = json.loads((tmp_path / "smaller" / grid.SHRINK_RECORD).read_text())
    assert written["kept"]["channels"] == sorted(written["kept"]["channels"])
    assert len(written["kept"]["channels"]) == 24


def test_other_tensors_are_copied_byte_for_byte(backbone, small, family, questions, tmp_path):
    hf, record = shrink(backbone, size_of(backbone, **SMALLER), "magnitude", None)
    write_checkpoint(small[family], tmp_path / "smaller", hf, record)
    before, after = (load_file(folder / "model.safetensors") for folder in (small[family], tmp_path / "smaller"))
    same = [name for name in before if name.startswith(("vision_model.", "language_model."))]
    assert len(same) > 20
    assert all(after[name].dtype == torch.float16 and after[name].equal(before[name]) for name in same)


def test_shards_stay_shards(backbone, small, family, tmp_path):
    """A checkpoint in several files, as the published ones are."""
    source = tmp_path / "sharded"
    source.mkdir()
    for file in small[family].rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            (source / file.relative_to(small[family])).parent.mkdir(exist_ok=True, parents=True)
            (source / file.relative_to(small[family])).write_bytes(file.read_bytes())
    weights = load_file(small[family] / "model.safetensors")
    names = sorted(weights)
    where = {name: f"model-{1 + (i % 2):05}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(where.values()):
        save_file({n: weights[n] for n in names if where[n] == shard}, source / shard, {"format": "pt"})
    (source / checkpoint_files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    # With cross-attention in every layer, some tensor names are in no shard of the original.
    hf, record = shrink(backbone, size_of(backbone, layers=1, cross_every=1), "magnitude", None)
    write_checkpoint(source, tmp_path / "smaller", hf, record)
    loaded = checkpoints.load(tmp_path / "smaller")
    assert loaded.hf.language_projection.weight.equal(hf.language_projection.weight)
    index = json.loads((tmp_path / "smaller" / checkpoint_files.INDEX).read_text())
    for shard in set(index["weight_map"].values()):
        with safe_open(tmp_path / "smaller" / shard, "pt") as file:
            assert {n for n, s in index["weight_map"].items() if s == shard} == set(file.keys())


def test_nothing_is_overwritten_or_written_partly(backbone, small, family, tmp_path, monkeypatch):
    hf, record = shrink(backbone, size_of(backbone, **SMALLER), "magnitude", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("text")
    with pytest.raises(UserError, match="exists already; give a new folder"):
        write_checkpoint(small[family], tmp_path / "full", hf, record)
    monkeypatch.setattr(checkpoint_writer, "save_file", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(small[family], tmp_path / "new", hf, record)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_calibration_questions_are_sampled_by_seed():
    questions = list(range(100))
    sample = sample_questions(questions, 10, seed=3)
    assert sample == sample_questions(questions, 10, seed=3) == sorted(sample)
    assert sample != sample_questions(questions, 10, seed=4)
    assert sample_questions(questions, 1000) == questions


def test_a_local_model_is_located_in_its_folder(small):
    from blipfit.recipe import ModelConfig

    assert checkpoint_writer.checkpoint_folder(ModelConfig(name=str(small["t5"]))) == Path(small["t5"])
