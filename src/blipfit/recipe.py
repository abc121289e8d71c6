"""Recipe: the whole experiment as one frozen value, to and from YAML."""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from blipfit import methods, sublayers
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
    """A frozen group of fields; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ModelConfig(Config):
    name: str
    """Hub name (`Salesforce/instructblip-flan-t5-xl`), a local folder of that format, `tiny-t5` or `tiny-vicuna`."""
    revision: str | None = None
    """Hub revision (commit or tag); the default branch where absent."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """How the frozen language model is stored, through bitsandbytes: `8bit` as LLM.int8(), `4bit` as NF4. LoRA above it
    trains as ever; vision tower, Q-Former and head stay as they are."""


class DataConfig(Config):
    name: str
    """Data set: `scienceqa`, `iconqa`, `icons` or `own`."""
    prompt: str
    """Prompt name with its version, e.g. `scienceqa-v1`."""
    images: Literal["stored", "shared", "off"] = "shared"
    """`shared`: training sees the published augmentation, one ViT pass a step for the whole bank; other splits come
    from the feature store. `stored`: the plain resize everywhere, all features from the store. `off`: the plain resize,
    nothing is kept."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first N questions of every split (for trials)."""

    @field_validator("images", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        """YAML 1.1 reads a bare `off` as false."""
        return "off" if value is False else value


class AdaLoRAConfig(Config):
    """AdaLoRA's budget and schedule; read where `method` is `adalora`. Steps are optimizer steps."""

    init_rank: int | None = Field(default=None, ge=2)
    """Rank of every layer at the start; half as much again as `target_rank`, rounded up, where absent."""
    target_rank: float | None = Field(default=None, gt=0)
    """Mean rank of a layer at the end; the adapter's `rank` where absent."""
    tinit: int | None = Field(default=None, ge=0)
    """Steps before the budget begins to fall; a tenth of all where absent."""
    tfinal: int | None = Field(default=None, ge=0)
    """Steps at the end with ranks that stay; half of all where absent."""
    delta_t: int = Field(default=10, ge=1)
    """Steps from one allocation to the next."""
    beta1: Smoothing = 0.85
    """Of the exponential mean of the sensitivity."""
    beta2: Smoothing = 0.85
    """Of the exponential mean of its uncertainty."""
    orthogonal_weight: float = Field(default=0.5, ge=0)
    """Weight of the orthogonality penalty in the training loss; evaluation never includes it."""


class AdapterConfig(Config):
    method: str = "lora"
    """How the chosen layers are adapted: `lora`; `adalora`, which spreads a budget of ranks over them by importance;
    or `dora`, `rslora`, `pissa`, `ia3`, through peft and one experiment at a time."""
    qformer: Literal["full"] | tuple[QFormerSublayer, ...] = ()
    """Sublayers of the Q-Former with LoRA, or `full` to train all of it."""
    llm: tuple[LanguageSublayer, ...] = ()
    """Sublayers of the language model with LoRA; empty: frozen."""
    llm_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Only these blocks of the language model, counted from 0; T5: the encoder's first, then the decoder's."""
    rank: int = Field(default=8, ge=1)
    """LoRA rank r; `ia3` has none."""
    alpha: float = Field(default=8, gt=0)
    """LoRA alpha; the scaling is alpha / rank (AdaLoRA: alpha / init_rank; rsLoRA: alpha / √rank)."""
    adalora: AdaLoRAConfig = AdaLoRAConfig()

    @field_validator("method")
    @classmethod
    def _is_a_method(cls, value: str) -> str:
        known = (*methods.OWN, *methods.PEFT)
        if value not in known:
            near = difflib.get_close_matches(value, known, n=1)
            raise ValueError(
                "unknown method; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
            )
        return value

    @field_validator("qformer", "llm", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) and value != "full" else value

    @field_validator("qformer", "llm")
    @classmethod
    def _in_canonical_order(cls, value: Any, info: ValidationInfo) -> Any:
        """One placement has one spelling: duplicates go, the order is fixed."""
        if value == "full":
            return value
        known = QFORMER_SUBLAYERS if info.field_name == "qformer" else LANGUAGE_SUBLAYERS
        return tuple(part for part in known if part in value)

    @field_validator("llm_layers")
    @classmethod
    def _sorted_layers(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return None if value is None else tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _layers_of_something(self) -> "AdapterConfig":
        if self.llm_layers is not None and not (self.llm and self.llm_layers):
            raise ValueError("llm_layers chooses blocks for the sublayers in llm; give both, or neither")
        return self

    @model_validator(mode="after")
    def _has_ranks_to_spread(self) -> "AdapterConfig":
        if self.method != "adalora":
            if self.adalora != AdaLoRAConfig():
                raise ValueError("adapter.adalora is set and would not be read; set adapter.method to adalora too")
        elif self.qformer in ("full", ()) and not self.llm:
            raise ValueError("adalora has no layer to spread ranks over; choose sublayers in adapter.qformer or llm")
        elif self.start_rank <= self.mean_rank:
            raise ValueError(
                f"adalora starts at rank {self.start_rank} and must end lower, not at {self.mean_rank:g}; "
                "raise adapter.adalora.init_rank or lower target_rank"
            )
        return self

    @model_validator(mode="after")
    def _is_read_by_its_method(self) -> "AdapterConfig":
        if self.method not in methods.PEFT:
            return self
        if self.qformer in ("full", ()) and not self.llm:
            raise ValueError(f"{self.method} has no layer to adapt; choose sublayers in adapter.qformer or llm")
        for name in [name for name in methods.RANKED if name not in methods.PEFT[self.method].reads]:
            value, untouched = getattr(self, name), type(self).model_fields[name].default
            if value != untouched:
                raise ValueError(
                    f"{self.method} has no {name}, so adapter.{name} {value:g} would not be read; "
                    f"leave it at {untouched} (--set adapter.{name}={untouched})"
                )
        return self

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
    """Questions a forward pass."""
    accumulation: int = Field(default=1, ge=1)
    """Forward passes an optimizer step; the effective batch is batch_size × accumulation."""
    group_by_length: bool = False
    """Draw each batch from questions of like length, so that little is spent on padding. Where length tells the kind of
    question, batches are then of one kind, and training suffers."""
    learning_rate: float = Field(default=5e-4, gt=0)
    """Start value; falls linearly per epoch: lr × (1 − epoch / max_epochs)."""
    weight_decay: float = Field(default=0.05, ge=0)
    """AdamW decay on matrices; biases, norms and vectors have none."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW betas."""
    max_epochs: int = Field(default=15, ge=1)
    """Epochs at most; also the length of the schedule."""
    patience: int = Field(default=3, ge=1)
    """Stop after this many epochs without a better validation accuracy."""
    seed: int = 42
    """Of data order, augmentation, dropout and LoRA's A."""
    dropout: bool = True
    """Whether the model's own dropout is active in training, frozen parts included."""
    max_text_tokens: int = Field(default=128, ge=8)
    """Prompts are cut to this from the left in training (Q-Former: also in evaluation)."""
    max_target_tokens: int = Field(default=256, ge=2)
    """Answers are cut to this from the right."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the frozen parts and of autocast; `auto`: bf16 on GPUs that have it, fp32 on CPU."""


class EvaluationConfig(Config):
    method: Literal["ranking", "generation"] = "ranking"
    """`ranking`: the candidate with the highest summed log-likelihood is the answer, and the best epoch has the highest
    validation accuracy. `generation`, for open questions: the model answers in its own words, judged by ROUGE and
    exact match, and the best epoch has the lowest validation loss."""
    decoding: str = "greedy"
    """How words are chosen in `generation`: `greedy`, `published`, `short-answer`, `caption` or `sampling`."""
    batch_size: int = Field(default=16, ge=1)
    """Questions a forward pass (their candidates come on top)."""


class PerformanceConfig(Config):
    """How fast and in how much memory training runs. Results change by rounding alone, and by other dropout noise where
    code is compiled or texts are padded."""

    compile: bool = False
    """Compile the layers of Q-Former and language model with `torch.compile`. Takes a minute at the start, more where
    lengths vary; set pad_to_multiple_of with it."""
    cuda_graphs: bool = False
    """Capture the forward and backward pass once for each shape and replay it: without the time that the host takes to
    launch thousands of kernels. Pays for few experiments on a GPU; needs pad_to_multiple_of, or every batch is a shape
    of its own."""
    pad_to_multiple_of: int = Field(default=1, ge=1)
    """Texts of a training batch are padded to a multiple of so many tokens (answers: of eight at most), so that batches
    have few different shapes."""
    checkpointing: tuple[Literal["query", "answer"], ...] = ()
    """Stages whose layers store only their inputs and are computed again in the backward pass: less memory, a third
    more time. `query`: the Q-Former; `answer`: the language model."""

    @field_validator("checkpointing", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

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
    """Where labels and answers weigh nothing, only seeing is learned: the language model is left out of training."""

    teacher: str | None = None
    """An original that a smaller model also learns from: its name or folder, or a finished run of it."""
    visual: float = Field(default=1.0, ge=0)
    """Weight of the distance from its visual tokens, in parts of their variance."""
    answers: float = Field(default=1.0, ge=0)
    """Weight of the divergence from its answers, at every label position."""
    labels: float = Field(default=1.0, ge=0)
    """Weight of the ordinary loss on the labels."""


RENAMED_IN_0_2 = {"judging": "evaluation"}
"""Sections by the names that recipes of version 0.1 give them; read, and never written."""


class Recipe(Config):
    """Everything that changes a result, and nothing else."""

    experiment: str = Field(coerce_numbers_to_str=True)
    """Name of the experiment: the grid's number, `baseline`, or your own."""
    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig = AdapterConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    distillation: DistillationConfig = DistillationConfig()
    performance: PerformanceConfig = PerformanceConfig()

    @model_validator(mode="before")
    @classmethod
    def _reads_older_names(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {RENAMED_IN_0_2.get(name, name): value for name, value in values.items()}

    @model_validator(mode="after")
    def _names_a_folder(self) -> "Recipe":
        if not self.experiment or any(c in self.experiment for c in "/\\") or self.experiment.startswith("."):
            raise ValueError(f"experiment {self.experiment!r} cannot name a folder")
        return self

    @model_validator(mode="after")
    def _can_stand_beside_quantized_weights(self) -> "Recipe":
        method, packed = methods.PEFT.get(self.adapter.method), self.model.quantization
        if method and self.adapter.llm and packed not in ("none", *method.quantization):
            raise ValueError(
                f"{self.adapter.method} does not work on a language model in {packed}; set model.quantization to "
                f"{' or '.join(('none', *method.quantization))}, or leave adapter.llm empty"
            )
        return self

    @model_validator(mode="after")
    def _nothing_is_trained_in_vain(self) -> "Recipe":
        part = self.distillation
        if part.teacher and not (part.labels or part.answers) and (self.adapter.llm or not part.visual):
            raise ValueError(
                "with distillation.labels=0 and distillation.answers=0 only seeing is learned: set adapter.llm=[] and "
                "distillation.visual above 0, or give labels or answers a weight"
            )
        return self

    @property
    def title(self) -> str:
        return f"{self.data.name}/{self.experiment}"

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def override(self, assignments: Sequence[str]) -> "Recipe":
        """Return a copy with `section.field=value` assignments applied (values are YAML)."""
        values = self.model_dump(mode="json")
        for assignment in assignments:
            path, equals, text = assignment.partition("=")
            if not equals:
                raise UserError(f"--set {assignment}: write it as section.field=value")
            _assign(values, path.strip(), _parse(assignment, text))
        return from_mapping(values)

    def differences(self, other: "Recipe") -> dict[str, tuple[Any, Any]]:
        """Fields whose values differ: path → (here, there)."""
        here, there = dict(_leaves(self)), dict(_leaves(other))
        return {path: (here[path], there[path]) for path in here if here[path] != there[path]}


def from_mapping(values: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Build a Recipe; every mistake becomes one sentence that names the field and the mend."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(_sentence(e) for e in error.errors()[:3])) from None


def load(path: Path) -> Recipe:
    """Read a recipe from a YAML file."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; `blipfit show DATASET ID --json` prints a recipe to start from"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{path} is not a readable YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no recipe: expected keys such as model, data, adapter, training")
    return from_mapping(values, source=str(path))


def _fields_of(path: Sequence[str | int]) -> list[str]:
    """Known field names of the section that `path` leads to."""
    part: type[BaseModel] = Recipe
    for key in path:
        annotation = part.model_fields[str(key)].annotation if str(key) in part.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        part = annotation
    return list(part.model_fields)


def _unknown(key: str, path: Sequence[str | int]) -> str:
    known = _fields_of(path)
    near = difflib.get_close_matches(key, known, n=1)
    where = ".".join(map(str, path))
    section = f" in {where}" if where else ""
    return f"unknown key {key!r}{section}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")


def _sentence(error: Any) -> str:
    location = error["loc"]
    if error["type"] == "extra_forbidden":
        return _unknown(str(location[-1]), location[:-1])
    # Where a field has several types, pydantic adds the type to the path; a user knows no such key.
    field = ".".join(str(key) for key in location if not str(key).startswith(("literal[", "tuple[")))
    message = error["msg"].removeprefix("Value error, ")
    # A sentence about several fields of a section names them; the whole section would hide it.
    whole = error["type"] == "value_error" and isinstance(error["input"], Mapping)
    got = "" if whole else f" (got {error['input']!r})"
    return f"{field}: {message[:1].lower()}{message[1:]}{got}" if field else message


def _assign(values: dict[str, Any], path: str, value: Any) -> None:
    first, *rest = path.split(".")
    keys = [RENAMED_IN_0_2.get(first, first), *rest]
    section = values
    for depth, key in enumerate(keys):
        if key not in section:
            raise UserError(f"--set {path}: {_unknown(key, keys[:depth])}")
        if depth == len(keys) - 1:
            if isinstance(section[key], dict):
                raise UserError(f"--set {path}: {path} is a section; set one of its fields: {', '.join(section[key])}")
            section[key] = value
        elif not isinstance(section[key], dict):
            raise UserError(f"--set {path}: {'.'.join(keys[: depth + 1])} has no fields")
        else:
            section = section[key]


def _parse(assignment: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {assignment}: {text!r} is not a YAML value") from None
    if isinstance(value, str):
        try:  # YAML 1.1 reads 1e-4 as a string; everybody means the number.
            return float(value)
        except ValueError:
            return value
    return value


def _leaves(part: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in type(part).model_fields:
        value = getattr(part, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
