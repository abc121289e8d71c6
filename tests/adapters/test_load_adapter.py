"""The loader in every adapter folder: with transformers and peft alone, the model computes what blipfit does."""

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoints
import reference
from blipfit.adapters import peft_format
from saved_adapters import ADAPTERS, save_trained


def import_loader(folder: Path) -> Any:
    """Import `load_adapter.py` of a folder."""
    spec = importlib.util.spec_from_file_location("loader_of_a_folder", folder / "load_adapter.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft reads it in transformers
@pytest.mark.parametrize("name", ["lora", "pissa", "full Q-Former"])  # test_merge.py loads all methods in this way
def test_the_loader_computes_what_blipfit_does(small, family, tmp_path, name):
    folder = save_trained(tmp_path / "adapter", small[family], ADAPTERS[name])
    backbone = checkpoints.load(small[family])
    encoded, pixels = reference.ask(backbone), reference.pictures(backbone, 4)
    batch = backbone.text.targets(encoded)
    rows = [(e.qformer, e.training_prompt, e.target) for e in encoded]
    bank, _ = peft_format.install(backbone, folder)
    with torch.no_grad():
        logits = backbone.target_logits(backbone.query(backbone.see(pixels), batch), batch)[0]
        bank.remove()
        base_logits = torch.cat(reference.forward(backbone.hf, backbone, pixels, rows)[1])
        model = import_loader(folder).load()  # on the base model that the folder names
        loader_logits = torch.cat(reference.forward(model, backbone, pixels, rows)[1])
    torch.testing.assert_close(loader_logits, logits, atol=1e-5, rtol=1e-5)
    assert (base_logits - logits).abs().max() > 1e-2
    assert not model.training


def test_the_loader_imports_no_blipfit_and_the_folder_explains_it(small, tmp_path):
    folder = save_trained(tmp_path / "adapter", small["t5"], ADAPTERS["lora"])
    tree = ast.parse((folder / "load_adapter.py").read_text(encoding="utf-8"))
    imports = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imports |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imports == {"json", "pathlib", "typing", "torch", "peft", "safetensors", "safetensors.torch", "transformers"}
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "`PeftModel.from_pretrained` alone is not enough" in text
    assert str(small["t5"]) in text
