"""The one way to open a model, a run or an adapter: `open_model("results/scienceqa/15", device)`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from blipfit.adapters import peft_format
from blipfit.adapters.bank import Bank
from blipfit.errors import UserError
from blipfit.model import loading
from blipfit.model.backbone import Backbone
from blipfit.recipe import ModelConfig, Recipe, TrainingConfig
from blipfit.run import Run


@dataclass(frozen=True, slots=True)
class Source:
    """What a name stands for: a base model, and the adapter and recipe that belong to it, if any."""

    name: str
    model: ModelConfig
    adapter: Path | None = None
    """Adapter folder."""
    adapter_sha256: str | None = None
    """The hash of the adapter's tensors; equal to the one in the run's result, where there is a run."""
    run: Run | None = None
    recipe: Recipe | None = None


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A loaded model without its adapter; `adapter()` or `install_adapter()` puts the adapter in."""

    backbone: Backbone
    source: Source

    def install_adapter(self) -> Bank | None:
        """Put the adapter into the backbone; None where the source has no adapter.

        Raises UserError if the adapter was trained on another model.
        """
        if self.source.adapter is None:
            return None
        bank, _ = peft_format.install(self.backbone, self.source.adapter)
        return bank

    @contextmanager
    def adapter(self) -> Iterator[Backbone]:
        """The backbone with its adapter installed; on leaving the adapter is removed again.

        Raises UserError if the adapter was trained on another model.
        """
        bank = self.install_adapter()
        try:
            yield self.backbone
        finally:
            if bank is not None:
                bank.remove()


def open_model(
    name_or_run: str | Path | ModelConfig,
    device: torch.device | str,
    precision: str | None = None,
    base: ModelConfig | None = None,
) -> OpenedModel:
    """Load a model by its name or folder, or the base model of a run or adapter folder together with its adapter.

    `precision`: see `TrainingConfig.precision`; if absent, a run's own, else `auto`. `base`: see `locate`. Raises
    UserError if the model cannot be loaded, and for the reasons of `locate`.
    """
    return load(locate(name_or_run, base), device, precision)


def load(source: Source, device: torch.device | str, precision: str | None = None) -> OpenedModel:
    """Load the base model of a source. Raises UserError if it cannot be loaded."""
    training = source.recipe.training if source.recipe is not None else TrainingConfig()
    backbone = loading.load(
        source.model, precision or training.precision, device, training.max_text_tokens, training.max_target_tokens
    )
    return OpenedModel(backbone, source)


def locate(name_or_run: str | Path | ModelConfig, base: ModelConfig | None = None) -> Source:
    """Find out what a name stands for, and check it without loading the model.

    A folder with a `recipe.yaml` is a run, a folder with adapter files an adapter; everything else is a model. `base`
    is another copy of the model that the adapter was trained on. Raises UserError if the run is not finished, if its
    adapter is not the one that its result was made with or belongs to another model, or if the model cannot be found.
    """
    if not isinstance(name_or_run, ModelConfig):
        folder = Path(name_or_run)
        if Run(folder).recipe_file.exists() or (folder / peft_format.TRAINED_FILE).is_file():
            return locate_adapter(folder, base)
        name_or_run = ModelConfig(name=str(name_or_run))
    model = base or name_or_run
    loading.locate(model)
    return Source(model.name, model)


def locate_adapter(folder: Path, base: ModelConfig | None = None) -> Source:
    """`locate` for a folder that must be a finished run or an adapter folder. Raises UserError if it is neither."""
    run = Run(folder)
    if run.recipe_file.exists():
        source = _locate_run(str(folder), run)
    else:
        digest = peft_format.digest(peft_format.read(folder)[1])
        source = Source(str(folder), ModelConfig(name=peft_format.base(folder)), folder, digest)
    source = source if base is None else replace(source, model=base)
    loading.locate(source.model)
    return source


def _locate_run(name: str, run: Run) -> Source:
    recipe = run.recipe()
    if run.state() != "finished":
        raise UserError(f"{name} is not finished; run the same `blipfit train` again to continue it")
    digest = peft_format.digest(peft_format.read(run.adapter)[1])
    if digest != run.result()["adapter_sha256"]:
        raise UserError(f"{run.adapter} is not the adapter that {run.result_file} was made with; train it again")
    base = peft_format.base(run.adapter)
    if base != recipe.model.name:
        raise UserError(
            f"{run.adapter} was trained on {base}, but {run.recipe_file} names {recipe.model.name}; "
            "copy the run folder again or train it again"
        )
    return Source(name, recipe.model, run.adapter, digest, run, recipe)
