"""The one way to open a model, a run or an adapter: `open_model("results/scienceqa/15", device)`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from blipfit.adapters import peft_format
from blipfit.adapters.bank import Bank
from blipfit.adapters.peft_format import BaseModel, SavedAdapter
from blipfit.errors import UserError
from blipfit.model import loading, shapes
from blipfit.model.backbone import Backbone
from blipfit.recipe import ModelConfig, Recipe, TrainingConfig
from blipfit.run_folder import Run


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
    trained_on: BaseModel | None = None
    """The base model that the adapter was trained on."""
    is_base_given: bool = False
    """Whether the user gave the model with `--model`, instead of the one that the adapter was trained on."""
    saved: SavedAdapter | None = field(default=None, repr=False, compare=False)
    """The adapter itself, so that what is installed is what was checked."""
    warnings: tuple[str, ...] = ()
    """Sentences for the user and for every record of results: the adapter was trained on other base weights."""

    def __post_init__(self) -> None:
        assert (self.adapter is None) == (self.saved is None), "a source with an adapter must hold it"


def warning_fields(warnings: Sequence[str]) -> dict[str, list[str]]:
    """The part of a record that holds a source's warnings; empty if there are none."""
    return {"warnings": list(warnings)} if warnings else {}


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A loaded model without its adapter; `adapter()` or `install_adapter()` puts the adapter in."""

    backbone: Backbone
    source: Source

    def install_adapter(self) -> Bank | None:
        """Put the adapter into the backbone; None where the source has no adapter.

        Raises UserError if the adapter was trained on another model.
        """
        if self.source.saved is None:
            return None
        bank, _ = peft_format.install(self.backbone, self.source.saved)
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

    `precision`: see `TrainingConfig.precision`; if absent, a run's own, else `auto`. `base`: see `locate_model`.
    The source's `warnings` are for the user. Raises UserError if the model cannot be loaded, and for the reasons of
    `locate_model`.
    """
    return load(locate_model(name_or_run, base), device, precision)


def load(source: Source, device: torch.device | str, precision: str | None = None) -> OpenedModel:
    """Load the base model of a source.

    Raises UserError if it cannot be loaded, or if its weights are not those that the adapter was trained on (see
    `locate_model`), which is known only now if they had to be downloaded.
    """
    training = source.recipe.training if source.recipe is not None else TrainingConfig()
    backbone = loading.load(
        source.model, precision or training.precision, device, training.max_text_tokens, training.max_target_tokens
    )
    if source.trained_on is not None and not source.warnings:
        source = _compare_weights(source, backbone.base_sha256)
    return OpenedModel(backbone, source)


def locate_model(name_or_run: str | Path | ModelConfig, base: ModelConfig | None = None) -> Source:
    """Find out what a name stands for, and check it without loading the model.

    A folder with a `recipe.yaml` is a run, a folder with adapter files an adapter; everything else is a model. `base`
    replaces the model that the adapter was trained on, which may have moved; if it has other weights, the source's
    `warnings` say so. Raises UserError if the run is not finished, if its adapter is not the one that its result was
    made with or belongs to another model, if the model cannot be found, has another family, or, without `base`, has
    other weights than those that the adapter was trained on.
    """
    if not isinstance(name_or_run, ModelConfig):
        folder = Path(name_or_run)
        if Run(folder).recipe_file.exists() or (folder / peft_format.TRAINED_FILE).is_file():
            return locate_adapter(folder, base)
        name_or_run = ModelConfig(name=str(name_or_run))
    model = base or name_or_run
    loading.locate_checkpoint(model)
    return Source(model.name, model)


def locate_adapter(folder: Path, base: ModelConfig | None = None) -> Source:
    """Like `locate_model`, for a folder that must be a finished run or an adapter folder.

    Raises UserError if it is neither.
    """
    run = Run(folder)
    source = _locate_run(str(folder), run) if run.recipe_file.exists() else _locate_folder(folder)
    trained_on = source.trained_on
    assert trained_on is not None
    if base is not None:
        name = f"tiny-{trained_on.family}" if base.name == "tiny" else base.name
        model = source.model.model_copy(update={"name": name, "revision": base.revision})
        loading.locate_checkpoint(model)
        source = replace(source, model=model, is_base_given=True)
    else:
        source = replace(source, model=_find_base(source, trained_on))
    _refuse_other_family(source, trained_on)
    digest = loading.base_sha256(source.model) if trained_on.sha256 else None
    return _compare_weights(source, digest)


def _locate_folder(folder: Path) -> Source:
    saved = peft_format.read_saved(folder)
    model = ModelConfig(name=saved.base.name)
    return Source(str(folder), model, folder, saved.sha256, trained_on=saved.base, saved=saved)


def _locate_run(name: str, run: Run) -> Source:
    recipe = run.recipe()
    if run.state() != "finished":
        raise UserError(f"{name} is not finished; run the same `blipfit train` again to continue it")
    run.tidy()
    saved = read_adapter(run)
    base = saved.base
    if base.name != recipe.model.name:
        raise UserError(
            f"{run.adapter} was trained on {base.name}, but {run.recipe_file} names {recipe.model.name}; "
            "copy the run folder again or train it again"
        )
    return Source(name, recipe.model, run.adapter, saved.sha256, run, recipe, base, saved=saved)


def read_adapter(run: Run) -> SavedAdapter:
    """Read the adapter of a finished run.

    Raises UserError if it is missing or damaged, or if it is not the one that the run's result was made with.
    """
    if not (run.adapter / peft_format.TRAINED_FILE).is_file():
        raise UserError(f"{run.adapter} is missing; copy the run folder again, or delete it and train again")
    saved = peft_format.read_saved(run.adapter)
    if saved.sha256 != run.result()["adapter_sha256"]:
        raise UserError(
            f"{run.adapter} is not the adapter that {run.result_file} was made with; copy the run folder again, or "
            "delete it and train again"
        )
    return saved


def describe_adapter_problem(run: Run) -> str | None:
    """Return a sentence if a finished run's adapter is missing, damaged or exchanged, else None."""
    try:
        read_adapter(run)
    except UserError as error:
        return str(error)
    return None


def _find_base(source: Source, base: BaseModel) -> ModelConfig:
    """Return the model that an adapter was trained on: at the recorded absolute path, else where its name leads.

    A relative path is relative to the folder in which the run was trained, not to that of the next command.
    """
    model = source.model
    if base.folder is not None and Path(base.folder, "config.json").is_file():
        is_here = Path(model.name).expanduser().resolve() == Path(base.folder)
        return model if is_here else model.model_copy(update={"name": base.folder})
    try:
        loading.locate_checkpoint(model)
    except UserError as error:
        location = f"at {base.folder} " if base.folder is not None else ""
        recorded_in = source.run.recipe_file if source.run is not None else source.name
        raise UserError(
            f"the base model {model.name} of {recorded_in} is not {location or 'there '}any more ({error}); "
            "give its new place with --model"
        ) from None
    return model


def _refuse_other_family(source: Source, base: BaseModel) -> None:
    """Raise UserError if a model that the user gave has another kind of language model than the adapter's base."""
    if not source.is_base_given:
        return
    family = base.family
    if family is None and (base.name in shapes.PUBLISHED or base.name in loading.MINIATURES):
        family = shapes.family(base.name)
    if family is not None and family != (given := shapes.family(source.model.name)):
        raise UserError(
            f"{source.name} was trained on {base.name} ({family}), and {source.model.name} has a language model of "
            f"another family ({given}); give a copy of {base.name} with --model"
        )


def _compare_weights(source: Source, digest: str | None) -> Source:
    """Compare the digest of the model's weights with the recorded one; nothing if either is not known.

    Returns the source, with a warning if the user gave another model. Raises UserError if the model is the adapter's
    own and has changed.
    """
    base = source.trained_on
    if base is None or base.sha256 is None or digest is None or digest == base.sha256:
        return source
    difference = f"(sha256 {digest[:12]} instead of {base.sha256[:12]})"
    if source.is_base_given:
        warning = (
            f"{source.name} was not trained on {source.model.name}, whose weights are not those of {base.name} then "
            f"{difference}; the results are those of another base model"
        )
        return replace(source, warnings=(*source.warnings, warning))
    raise UserError(
        f"{source.name} was trained on other weights of its base model than {source.model.name} has now {difference}; "
        f"restore them, or use these knowingly with --model {source.model.name}"
    )
