"""The published models on the meta device have the published sizes."""

import pytest
import torch

from blipfit.adapters import parameter_counts
from blipfit.model import shapes

VIT, QFORMER = 985_952_256, 185_660_160
T5, VICUNA = 2_849_757_184, 6_738_423_808


def _size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "family", "language", "projection"),
    [
        ("Salesforce/instructblip-flan-t5-xl", "t5", T5, 1_574_912),
        ("Salesforce/instructblip-vicuna-7b", "vicuna", VICUNA, 3_149_824),
    ],
)
def test_sizes(name, family, language, projection):
    model = shapes.on_meta(name)
    assert shapes.family(name) == family
    assert all(p.is_meta for p in model.parameters())
    sizes = [_size(p) for p in (model.vision_model, model.qformer, model.language_projection, model.language_model)]
    assert sizes == [VIT, QFORMER, projection, language]
    assert model.query_tokens.shape == (1, 32, 768)
    total = parameter_counts.all_parameters(model)
    assert sum(total.values()) == sum(sizes) + 32 * 768
    assert total["vision"] + total["vision layer norm"] == VIT
    assert sum(n for part, n in total.items() if part.startswith("qformer")) == QFORMER
    assert sum(n for part, n in total.items() if part.startswith("llm")) == language


def test_t5_head_is_a_separate_matrix():
    language = shapes.on_meta("Salesforce/instructblip-flan-t5-xl").language_model
    assert language.lm_head.weight is not language.shared.weight


@pytest.mark.parametrize(
    ("name", "width"), [("Salesforce/instructblip-flan-t5-xxl", 4096), ("Salesforce/instructblip-vicuna-13b", 5120)]
)
def test_the_larger_models_are_published(name, width):
    assert shapes.on_meta(name).language_projection.out_features == width


def test_a_local_folder_has_its_own_shape(small):
    model = shapes.on_meta(str(small["vicuna"]))
    assert model.query_tokens.is_meta
    assert model.language_projection.out_features == 32
