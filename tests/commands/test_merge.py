"""`blipfit merge`: train, merge, and use the result in transformers and blipfit as any other checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, pipeline

import reference
from blipfit import inference
from blipfit.adapters import merge as merging
from blipfit.adapters import open_model
from blipfit.commands import evaluate, merge
from blipfit.commands.evaluate import OnOptions
from blipfit.errors import UserError
from blipfit.evaluation.generation import Decoding
from saved_adapters import ADAPTERS, save_trained


@pytest.fixture
def merged(finished_run, iconqa, tmp_path) -> Path:
    """The checkpoint of a finished run."""
    merge.run(finished_run.folder, tmp_path / "merged", "fp32", iconqa, "cpu")
    return tmp_path / "merged"


def test_transformers_computes_and_answers_as_the_run(finished_run, merged, iconqa):
    model = open_model.open_model(finished_run.folder, "cpu")
    encoded, pixels = reference.ask(model.backbone), reference.pictures(model.backbone, 4)
    batch = model.backbone.text.targets(encoded)
    with torch.no_grad(), model.adapter() as backbone:
        logits = backbone.target_logits(backbone.query(backbone.see(pixels), batch), batch)[0]
    hf = AutoModelForImageTextToText.from_pretrained(merged)
    rows = [(e.qformer, e.training_prompt, e.target) for e in encoded]
    with torch.no_grad():
        hf_logits = torch.cat(reference.forward(hf, model.backbone, pixels, rows)[1])
    torch.testing.assert_close(hf_logits, logits, atol=1e-5, rtol=1e-5)
    assert type(hf).__name__ == "InstructBlipForConditionalGeneration"

    run_model = inference.load(adapter=finished_run.folder, device="cpu")
    answer_with = pipeline("image-text-to-text", model=str(merged))
    decoding = Decoding(beams=1, max_tokens=6, min_tokens=1, repetition_penalty=1)
    for image in sorted(iconqa.glob("val/*/*/image.png"))[:3]:
        options = {"max_new_tokens": 6, "min_new_tokens": 1}
        (record,) = answer_with(
            images=Image.open(image), text="Which number is 3?", generate_kwargs=options, return_full_text=False
        )
        expected = run_model.ask(image, "Which number is 3?", prompt="instruction-v1", decoding=decoding)
        assert record["generated_text"].strip() == expected
        assert expected


@pytest.mark.parametrize("family", ["t5"])
def test_blipfit_takes_the_folder_as_a_model(finished_run, merged, iconqa, tmp_path):
    options = OnOptions(iconqa, results=tmp_path / "other")
    (record,) = evaluate.run_on(str(merged), "iconqa", torch.device("cpu"), options)
    (adapter_record,) = evaluate.run_on(str(finished_run.adapter), "iconqa", torch.device("cpu"), options)
    assert record["base"] == adapter_record["tuned"]
    saved = json.loads((merged / "merge.json").read_text())
    assert saved["adapter_sha256"] == finished_run.result()["adapter_sha256"]
    assert (saved["questions"], saved["same_answers"]) == (6, 6)
    assert saved["max_difference"] < saved["tolerance"] == merge.MAX_DIFFERENCE


@pytest.fixture
def adapter_folder(small, tmp_path) -> Path:
    return save_trained(tmp_path / "adapter", small["t5"], ADAPTERS["lora"])


def test_an_adapter_folder_in_16_bit_is_compared_on_drawn_questions(adapter_folder, tmp_path):
    record = merge.run(adapter_folder, tmp_path / "merged", "bf16", None, "cpu")
    assert (record["questions"], record["questions_from"]) == (merge.QUESTIONS, "drawn icons")
    assert 1e-3 < record["relative_difference"] < merge.MAX_ROUNDING
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
    assert len(merge.render(record)) == 3


def test_a_wrong_merge_is_refused_and_leaves_nothing(adapter_folder, tmp_path, monkeypatch):
    merge_adapter = merging.merge_adapter

    def forget_a_layer(hf, folder) -> None:
        bias = hf.language_projection.bias.detach().clone()
        merge_adapter(hf, folder)
        hf.language_projection.bias.data.copy_(bias)

    monkeypatch.setattr(merging, "merge_adapter", forget_a_layer)
    with pytest.raises(UserError, match="the merged model does not compute what the adapter does: on drawn icons"):
        merge.run(adapter_folder, tmp_path / "merged", "fp32", None, "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_too_coarse_rounding_is_refused(adapter_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "MAX_ROUNDING", 1e-4)
    with pytest.raises(
        UserError, match=r"rounding to fp16 changes the scores .*; nothing was written: merge with .*fp32"
    ):
        merge.run(adapter_folder, tmp_path / "merged", "fp16", None, "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_unusable_arguments_are_refused(adapter_folder, tmp_path):
    with pytest.raises(UserError, match="dtype 'int8' does not exist; known: fp32, bf16, fp16"):
        merge.run(adapter_folder, tmp_path / "merged", "int8", None, "cpu")
    with pytest.raises(UserError, match="adapter exists already; give a new folder with --to"):
        merge.run(adapter_folder, adapter_folder, "fp32", None, "cpu")
    with pytest.raises(UserError, match="nowhere is not an adapter folder of blipfit"):
        merge.run(tmp_path / "nowhere", tmp_path / "merged", "fp32", None, "cpu")


def test_a_run_on_quantized_weights_has_a_warning(capsys):
    warnings = merge._announce_warnings(["a"], "4bit")["warnings"]
    assert warnings[0] == "a"
    assert "trained on 4bit weights; the adapter was merged into the same weights without quantization" in warnings[1]
    assert capsys.readouterr().err.count("warning: ") == 2
