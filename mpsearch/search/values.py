"""What the weights of a run's knee are: the ranges that its quantizers learned, and histograms, as values.

They are measured by a process that has the network (`search/knee.py`) and stored in the run folder (`knee.json`), so
that whoever looks at a run needs none. This module needs no torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mpsearch.documents import explain
from mpsearch.errors import RunError
from mpsearch.files import write_text
from mpsearch.record import Count, RunFolder
from mpsearch.space.choices import TensorName


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Real = Annotated[float, Field(gt=-1e39, lt=1e39)]  # as float32 has it


class TensorRange(_Value):
    """The smallest and the largest value that the quantizer of one tensor can give, over all channels."""

    layer: str
    tensor: TensorName
    weights: Count = Field(description="elements of the layer's weight")
    low: Real
    high: Real
    seen_low: Real | None = Field(description="the smallest float weight; none for an activation")
    seen_high: Real | None


class WeightHistogram(_Value):
    """The weights of one layer before and after quantization, counted in equal bins from -end to end."""

    layer: str
    end: Real = Field(gt=0)
    before: tuple[Count, ...] = Field(min_length=1)
    after: tuple[Count, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _same_bins(self) -> WeightHistogram:
        if len(self.before) != len(self.after):
            raise ValueError(f"{len(self.before)} bins before and {len(self.after)} after: they must be the same bins")
        return self


class KneeValues(_Value):
    """`knee.json`: of the config that was the knee when it was written."""

    schema_: Literal["mpsearch/knee/1"] = Field(default="mpsearch/knee/1", alias="schema")
    config: str = Field(description="digest of the config")
    checkpoint: str = Field(description="name of the file in checkpoints/ that they are read from")
    ranges: tuple[TensorRange, ...]
    histograms: tuple[WeightHistogram, ...]


def read_values(folder: RunFolder) -> KneeValues | None:
    """What was stored last; None before that.

    Raises:
        RunError: the file is not mpsearch's; the message says how to make it again.
    """
    text = folder.read_file(folder.knee_json)
    if text is None:
        return None
    try:
        return KneeValues.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise RunError(
            f"{folder.knee_json} cannot be used:\n{explain(error, KneeValues, 'values')}\ndelete it, or let "
            f"`mpsearch resume {folder.path}` write it again"
        ) from None


def write_values(folder: RunFolder, values: KneeValues) -> None:
    """Store them, whole or not at all. Raises WriteError where it cannot."""
    write_text(folder.knee_json, values.model_dump_json(by_alias=True) + "\n", sync=True)
