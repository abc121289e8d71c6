"""Recipe: the whole experiment as one frozen value, from and to YAML."""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from blipfit import methods, recipe_parsing, sublayers
from blipfit.errors import UserError

Family = Literal["t5", "vicuna"]
QFORMER_SUBLAYERS = tuple(sublayers.QFORMER)
LANGUAGE_SUBLAYERS = tuple(sublayers.LANGUAGE)
if TYPE_CHECKING:
    QFormerSublayer: TypeAlias = str
    LanguageSublayer: TypeAlias = str
else:
    QFormerSublayer, LanguageSublayer = Literal[QFORMER_SUBLAYERS], Literal[LANGUAGE_SUBLAYERS]
Beta = Annotated[float, Field(ge=0, lt=1)]
Smoothing = Annotated[float, Field(gt=0, lt=1)]


class Config(BaseModel):
    """A frozen section of the recipe; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ModelConfig(Config):
    name: str
    """Hub name (`Salesforce/instructblip-flan-t5-xl`), a local folder of that format, `tiny-t5` or `tiny-vicuna`."""
    revision: str | None = None
    """Hub revision (commit or tag); the default branch where absent."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Storage of the frozen language model, through bitsandbytes: `8bit` is LLM.int8(), `4bit` is NF4. LoRA is trained
    beside it as usual; vision tower, Q-Former and head are not quantized."""


class DataConfig(Config):
    name: str
    """Data set: `scienceqa`, `iconqa`, `icons`, `own` or `rewardbench`."""
    prompt: str
    """Name of the prompt with its version, e.g. `scienceqa-v1`."""
    images: Literal["stored", "shared", "off"] = "shared"
    """Where image features come from. `shared`: training images are augmented as published, so the ViT runs in every
    step, once for all experiments of a bank; validation and test features are read from the feature store. `stored`:
    images are only resized, and all features are read from the store. `off`: images are only resized, and the ViT runs
    in every step; nothing is stored."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first N questions of every split (for trials)."""

    @field_validator("images", mode="before")
    @classmethod
    def _read_off_as_text(cls, value: Any) -> Any:
        """YAML 1.1 reads a bare `off` as false."""
        return "off" if value is False else value


class AdaLoRAConfig(Config):
    """AdaLoRA's budget and schedule; only read if `method` is `adalora`. Steps are optimizer steps."""

    init_rank: int | None = Field(default=None, ge=2, le=methods.MAX_RANK)
    """Rank of every layer at the start. Default: 1.5 × `target_rank`, rounded up."""
    target_rank: float | None = Field(default=None, gt=0, le=methods.MAX_RANK / 2)
    """Mean rank of a layer at the end. Default: the adapter's `rank`."""
    tinit: int | None = Field(default=None, ge=0)
    """Steps before the budget starts to fall. Default: a tenth of all steps."""
    tfinal: int | None = Field(default=None, ge=0)
    """Steps at the end with fixed ranks. Default: half of all steps."""
    delta_t: int = Field(default=10, ge=1)
    """Steps from one allocation to the next."""
    beta1: Smoothing = 0.85
    """Decay of the exponential mean of the sensitivity."""
    beta2: Smoothing = 0.85
    """Decay of the exponential mean of the sensitivity's uncertainty."""
    orthogonal_weight: float = Field(default=0.5, ge=0)
    """Weight of the orthogonality penalty in the training loss; evaluation never includes it."""


def _read_text_as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) and value != "full" else value


class AdapterConfig(Config):
    method: str = "lora"
    """How the layers are adapted: `lora`; `adalora`, which distributes a budget of ranks over them by importance; or
    `dora`, `rslora`, `pissa`, `ia3`, through peft and one experiment at a time."""
    qformer: Literal["full"] | tuple[QFormerSublayer, ...] = ()
    """Sublayers of the Q-Former with LoRA, or `full` to train all of it."""
    llm: tuple[LanguageSublayer, ...] = ()
    """Sublayers of the language model with LoRA; empty: frozen."""
    llm_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Only these blocks of the language model, counted from 0; T5: the encoder's first, then the decoder's."""
    rank: int = Field(default=8, ge=1, le=methods.MAX_RANK)
    """LoRA rank r; `ia3` has none."""
    alpha: float = Field(default=8, gt=0)
    """LoRA alpha; the scaling is alpha / rank (AdaLoRA: alpha / init_rank; rsLoRA: alpha / √rank)."""
    adalora: AdaLoRAConfig = AdaLoRAConfig()

    @field_validator("method")
    @classmethod
    def _is_known_method(cls, value: str) -> str:
        known = (*methods.OWN, *methods.PEFT)
        if value not in known:
            near = difflib.get_close_matches(value, known, n=1)
            raise ValueError(
                "unknown method; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
            )
        return value

    _accepts_text = field_validator("qformer", "llm", mode="before")(_read_text_as_list)

    @field_validator("qformer", "llm")
    @classmethod
    def _in_canonical_order(cls, value: Any, info: ValidationInfo) -> Any:
        """Remove duplicates and fix the order, so that equal placements are equal values."""
        if value == "full":
            return value
        known = QFORMER_SUBLAYERS if info.field_name == "qformer" else LANGUAGE_SUBLAYERS
        return tuple(part for part in known if part in value)

    @field_validator("llm_layers")
    @classmethod
    def _sorted_layers(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return None if value is None else tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _blocks_need_sublayers(self) -> "AdapterConfig":
        if self.llm_layers is not None and not (self.llm and self.llm_layers):
            raise ValueError("llm_layers chooses blocks for the sublayers in llm; give both, or neither")
        return self

    @model_validator(mode="after")
    def _adalora_is_possible(self) -> "AdapterConfig":
        if self.method != "adalora":
            if self.adalora != AdaLoRAConfig():
                raise ValueError("adapter.adalora is set and would not be read; set adapter.method to adalora too")
        elif self.qformer in ("full", ()) and not self.llm:
            raise ValueError(
                "adalora has no layer to distribute ranks over; choose sublayers in adapter.qformer or llm"
            )
        elif self.start_rank <= self.mean_rank:
            raise ValueError(
                f"adalora starts at rank {self.start_rank} and must end lower, not at {self.mean_rank:g}; "
                "raise adapter.adalora.init_rank or lower target_rank"
            )
        return self

    @model_validator(mode="after")
    def _fits_peft_method(self) -> "AdapterConfig":
        if self.method not in methods.PEFT:
            return self
        if not self.has_lora:
            raise ValueError(f"{self.method} has no layer to adapt; choose sublayers in adapter.qformer or llm")
        for name in [name for name in methods.LORA_FIELDS if name not in methods.PEFT[self.method].rank_fields]:
            value, untouched = getattr(self, name), type(self).model_fields[name].default
            if value != untouched:
                raise ValueError(
                    f"{self.method} has no {name}, so adapter.{name} {value:g} would not be read; "
                    f"leave it at {untouched} (--set adapter.{name}={untouched})"
                )
        return self

    @property
    def has_lora(self) -> bool:
        """Whether a layer is adapted, by whichever method; a fully trained Q-Former alone has none."""
        return bool(self.llm) or self.qformer not in ("full", ())

    @property
    def mean_rank(self) -> float:
        """Mean rank of a layer when training ends."""
        adaptive = self.method == "adalora" and self.adalora.target_rank is not None
        return self.adalora.target_rank if adaptive else self.rank  # type: ignore[return-value]

    @property
    def start_rank(self) -> int:
        """Rank of a layer's tensors when training starts."""
        if self.method != "adalora":
            return self.rank
        return self.adalora.init_rank or math.ceil(1.5 * self.mean_rank)


class TrainingConfig(Config):
    batch_size: int = Field(default=16, ge=1)
    """Questions per forward pass."""
    accumulation: int = Field(default=1, ge=1)
    """Forward passes per optimizer step; the effective batch is batch_size × accumulation."""
    group_by_length: bool = False
    """Build each batch from questions of similar length, which saves padding. If the length depends on the kind of
    question, a batch then has only one kind, which makes training worse."""
    learning_rate: float = Field(default=5e-4, gt=0)
    """Initial value; it falls linearly per epoch: lr × (1 − epoch / max_epochs)."""
    weight_decay: float = Field(default=0.05, ge=0)
    """AdamW decay on matrices; biases, norms and vectors have none."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW betas."""
    max_epochs: int = Field(default=15, ge=1)
    """Maximum number of epochs, and length of the learning rate schedule."""
    patience: int = Field(default=3, ge=1)
    """Stop after this many epochs without a better validation score."""
    seed: int = 42
    """Seed of data order, augmentation, dropout and the initial LoRA A."""
    dropout: bool = True
    """Whether the model's own dropout is active in training, frozen parts included."""
    max_text_tokens: int = Field(default=128, ge=8)
    """Prompts are cut to this from the left in training (Q-Former: also in evaluation)."""
    max_target_tokens: int = Field(default=256, ge=2)
    """Answers are cut to this from the right."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the frozen parts and of autocast; `auto`: bf16 (or fp16) on a GPU, fp32 on a CPU."""


class EvaluationConfig(Config):
    method: Literal["ranking", "generation"] = "ranking"
    """`ranking`: the candidate with the highest summed log-likelihood is the answer; the best epoch has the highest
    validation accuracy. `generation`, for open questions: the model generates an answer, which is scored by ROUGE and
    exact match; the best epoch has the lowest validation loss."""
    decoding: str = "greedy"
    """Decoding of `generation`: `greedy`, `published`, `short-answer`, `caption` or `sampling`."""
    batch_size: int = Field(default=16, ge=1)
    """Questions per forward pass (each with all its candidates)."""


class PerformanceConfig(Config):
    """Speed and memory of training. Results change only by rounding, and by different dropout noise if code is compiled
    or texts are padded."""

    compile: bool = False
    """Compile the layers of Q-Former and language model with `torch.compile`. Takes a minute at the start, more if
    lengths vary; set pad_to_multiple_of with it."""
    cuda_graphs: bool = False
    """Capture the forward and backward pass once per shape and replay it: the host launches a graph, not thousands of
    kernels. For few experiments on a GPU; set pad_to_multiple_of too, otherwise every batch has its own shape."""
    pad_to_multiple_of: int = Field(default=1, ge=1)
    """Pad the texts of a training batch to a multiple of this many tokens (answers: to a multiple of at most eight), so
    that batches have few different shapes."""
    checkpointing: tuple[Literal["query", "answer"], ...] = ()
    """Stages whose layers store only their inputs and are computed again in the backward pass: less memory, more time.
    `query`: the Q-Former; `answer`: the language model."""

    shard_language_model: bool = False
    """With several processes: distribute the language model over them (FSDP), if it does not fit into one GPU."""

    _accepts_text = field_validator("checkpointing", mode="before")(_read_text_as_list)

    @field_validator("checkpointing")
    @classmethod
    def _in_order_of_the_stages(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(stage for stage in ("query", "answer") if stage in value)

    @model_validator(mode="after")
    def _can_be_combined(self) -> "PerformanceConfig":
        if self.cuda_graphs and self.checkpointing:
            raise ValueError(
                "cuda_graphs and checkpointing exclude each other (a capture cannot restore the noise of a layer that "
                "is computed again); choose one"
            )
        return self


class DistillationConfig(Config):
    """Learning from an original. If `answers` and `labels` are 0, training does not run the language model."""

    teacher: str | None = None
    """The original that a smaller model learns from: its name or folder, or a finished run of it."""
    visual: float = Field(default=1.0, ge=0)
    """Weight of the squared distance from the teacher's visual tokens, divided by their variance."""
    answers: float = Field(default=1.0, ge=0)
    """Weight of the divergence from the teacher's answers, at every label position."""
    labels: float = Field(default=1.0, ge=0)
    """Weight of the ordinary loss on the labels."""


RENAMED_IN_0_2 = {"judging": "evaluation"}
"""Section names of version 0.1 and of today; the old names are read and never written."""


class Recipe(Config):
    """Everything that changes a result, and nothing else."""

    experiment: str = Field(coerce_numbers_to_str=True)
    """Name of the experiment: its number in the grid, `baseline`, or your own."""
    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig = AdapterConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    distillation: DistillationConfig = DistillationConfig()
    performance: PerformanceConfig = PerformanceConfig()

    @model_validator(mode="before")
    @classmethod
    def _read_old_names(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {RENAMED_IN_0_2.get(name, name): value for name, value in values.items()}

    @model_validator(mode="after")
    def _can_be_written(self) -> "Recipe":
        recipe_parsing.require_folder_name(self.experiment)
        for path, value in _leaves(self):
            recipe_parsing.require_whole_characters(path, value)
        return self

    @model_validator(mode="after")
    def _method_supports_quantization(self) -> "Recipe":
        method, quantization = methods.PEFT.get(self.adapter.method), self.model.quantization
        if method and self.adapter.llm and quantization not in ("none", *method.quantization):
            raise ValueError(
                f"{self.adapter.method} does not work on a language model in {quantization}; set model.quantization to "
                f"{' or '.join(('none', *method.quantization))}, or leave adapter.llm empty"
            )
        return self

    @model_validator(mode="after")
    def _distillation_trains_all_parts(self) -> "Recipe":
        weights = self.distillation
        if weights.teacher and not (weights.labels or weights.answers) and (self.adapter.llm or not weights.visual):
            raise ValueError(
                "with distillation.labels=0 and distillation.answers=0 only the Q-Former is trained: set "
                "adapter.llm=[] and distillation.visual above 0, or give labels or answers a weight"
            )
        return self

    @property
    def title(self) -> str:
        """`DATASET/EXPERIMENT`."""
        return f"{self.data.name}/{self.experiment}"

    def to_yaml(self) -> str:
        """The recipe as YAML, which `load` reads."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def override(self, assignments: Sequence[str]) -> "Recipe":
        """A copy with `section.field=value` assignments applied (values are YAML).

        Raises UserError if a field does not exist or a value does not fit it.
        """
        values = self.model_dump(mode="json")
        for assignment in assignments:
            path, equals, text = assignment.partition("=")
            if not equals:
                raise UserError(f"--set {assignment:.100}: write it as section.field=value")
            recipe_parsing.assign(
                values, Recipe, _current_path(path.strip()), recipe_parsing.parse_value(assignment, text)
            )
        return from_mapping(values)

    def differences(self, other: "Recipe") -> dict[str, tuple[Any, Any]]:
        """Fields whose values differ: path → (this recipe's value, the other's)."""
        here, there = dict(_leaves(self)), dict(_leaves(other))
        return {path: (here[path], there[path]) for path in here if here[path] != there[path]}


def from_mapping(values: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Build a recipe. Raises UserError, which names the field and how to fix it."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(
            f"{source}: " + "; ".join(recipe_parsing.explain(e, Recipe) for e in error.errors()[:3])
        ) from None


def load(path: Path) -> Recipe:
    """Read a recipe from a YAML file. Raises UserError if it cannot be read or is no valid recipe."""
    try:
        with path.open(encoding="utf-8") as file:
            values = recipe_parsing.parse_yaml(file.read(recipe_parsing.MAX_BYTES + 1))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; `blipfit show DATASET ID --json` prints a recipe to start from"
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not a readable YAML file: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no recipe: expected keys such as model, data, adapter, training")
    return from_mapping(values, source=str(path))


def _current_path(path: str) -> str:
    """A field's path with the section's name of today."""
    section, dot, rest = path.partition(".")
    return RENAMED_IN_0_2.get(section, section) + dot + rest


def _leaves(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
