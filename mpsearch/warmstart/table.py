"""A sensitivity table: what quantizing one tensor alone does, by layer, tensor and precision."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from mpsearch.documents import read_json
from mpsearch.errors import MpsearchError, PrecisionError, RunError, nearest
from mpsearch.files import replacing, require_regular, write_json
from mpsearch.precision import Precision, PrecisionConfig
from mpsearch.space.choices import GRANULARITY, TENSORS, TensorName

Proxy = Literal["kl", "jeffreys", "fit", "sqnr"]
PROXIES: tuple[Proxy, ...] = get_args(Proxy)
Key = tuple[str, TensorName, Precision]
SCHEMA = "mpsearch/sensitivity/1"
_COLUMNS = ["layer", "tensor", "precision", "value"]


@dataclass(frozen=True)
class SensitivityTable(Mapping[Key, float]):
    """(layer, tensor, precision) -> sensitivity under one proxy, in layer order. NaN: the network breaks there."""

    proxy: str
    entries: Mapping[Key, float] = field(hash=False, repr=False)
    samples: int  # of calibration data
    seconds: float  # wall time
    notes: tuple[str, ...] = ()  # such as why the network could not be replayed

    def __getitem__(self, key: Key) -> float:
        return 0.0 if key[2].is_float else self.entries[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def total(self, config: PrecisionConfig) -> float:
        """The sum over all tensors of a config.

        Raises:
            PrecisionError: the table has no entry for one of them.
        """
        return math.fsum(
            self.of(name, tensor, getattr(layer, tensor)) for name, layer in config.items() for tensor in TENSORS
        )

    def of(self, layer: str, tensor: TensorName, precision: Precision) -> float:
        """One entry. Raises PrecisionError where there is none."""
        try:
            return self[layer, tensor, precision]
        except KeyError:
            raise PrecisionError(
                f"the {self.proxy} table has no entry for layer '{layer}' with {tensor} {precision}: "
                "measure it again on the search space that is used"
            ) from None

    def to_frame(self) -> pd.DataFrame:
        """Columns layer, tensor, precision (as text), value; what else is known is in `attrs`."""
        rows = [(layer, tensor, str(precision), value) for (layer, tensor, precision), value in self.entries.items()]
        frame = pd.DataFrame(rows, columns=_COLUMNS).astype({"value": float})
        frame.attrs = {
            "schema": SCHEMA,
            "proxy": self.proxy,
            "samples": self.samples,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }
        return frame

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> SensitivityTable:
        """The inverse of `to_frame`.

        Raises:
            RunError: the frame is no such table; the message says what is wrong with it.
        """
        about = frame.attrs
        try:
            if about["schema"] != SCHEMA:
                raise ValueError(f"its schema is {about['schema']!r}, expected {SCHEMA!r}")
            entries = {
                (str(layer), tensor, Precision.parse(precision, GRANULARITY[tensor])): float(value)
                for layer, tensor, precision, value in frame[_COLUMNS].itertuples(index=False)
            }
            notes = tuple(map(str, about["notes"]))
            return cls(str(about["proxy"]), entries, int(about["samples"]), float(about["seconds"]), notes)
        except (KeyError, ValueError, TypeError, AttributeError, PrecisionError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise RunError(f"not a sensitivity table: {what}; measure it again") from None

    def save(self, path: str | Path) -> None:
        """Write `.json` or `.parquet`. Raises RunError on another ending, WriteError where it cannot be written."""
        path, frame = Path(path), self.to_frame()
        if _ending(path) == ".parquet":
            with replacing(path) as temporary:
                frame.to_parquet(temporary, index=False)
            return
        rows = [{**row, "value": _finite(row["value"])} for row in frame.to_dict("records")]
        write_json(path, {**frame.attrs, "rows": rows})

    @classmethod
    def load(cls, path: str | Path) -> SensitivityTable:
        """Read what `save` wrote. Raises RunError if it cannot be read or is no sensitivity table."""
        path = Path(path)
        try:
            if _ending(path) == ".parquet":
                require_regular(path)
                return cls.from_frame(pd.read_parquet(path))
            document: dict[Any, Any] = {**read_json(path, RunError, "measure it again")}
            if not isinstance(document.get("rows"), list):
                raise ValueError("it has no 'rows'")
            frame = pd.DataFrame(document.pop("rows"), columns=_COLUMNS)
            frame.attrs = document
            return cls.from_frame(frame)
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror or error}") from None
        except (ValueError, RunError) as error:
            raise RunError(f"{path} cannot be used: {error}") from None


def advice(folder: Path) -> str:
    """How files of a warm start, which are in `folder`, are made again."""
    return f"`mpsearch resume {folder.parent}` makes it again"


_OF_SNAPSHOT = {"budget": float, "step": int, "bits": dict, "marginals": dict, "slopes": dict, "loss": float}
_OF_STEP = {"step": int, "loss": float, "cost": float, "bits": dict}


def read_descent(folder: Path) -> dict[str, Any]:
    """What `descent.json` in the folder of a warm start says, without the weights: `snapshots`, `log`, `seconds`.

    Raises:
        RunError: it is missing or damaged.
    """
    path = folder / "descent.json"
    document = read_json(path, RunError, advice(folder))
    try:
        _require(document, {"snapshots": list, "log": list, "seconds": float})
        if not document["snapshots"]:
            raise ValueError("it has no snapshot")
        for rows, kinds in ((document["snapshots"], _OF_SNAPSHOT), (document["log"], _OF_STEP)):
            for row in rows:
                _require(row, kinds)
        if unknown := {key for row in document["snapshots"] for key in row} - _OF_SNAPSHOT.keys():
            raise ValueError(f"unknown key '{min(unknown)}'")
    except ValueError as error:
        raise RunError(f"{path} cannot be used: {error}; {advice(folder)}") from None
    return document


def _require(row: Any, kinds: Mapping[str, type]) -> None:
    """Raises ValueError: a row lacks a key, or has a value of another kind."""
    for key, kind in kinds.items():
        value = row.get(key) if isinstance(row, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float if kind is float else kind):
            raise ValueError(f"'{key}' must be a {kind.__name__}, got {value!r:.40}")
        if isinstance(value, dict):  # tensor -> a number
            _require(value, dict.fromkeys(value, float))


def check_proxy(proxy: str) -> None:
    """Raise MpsearchError if there is no such proxy."""
    if proxy not in PROXIES:
        raise MpsearchError(f"unknown sensitivity proxy '{proxy}': {nearest(proxy, PROXIES)}")


def _ending(path: Path) -> str:
    if path.suffix not in (".json", ".parquet"):
        raise RunError(f"cannot tell the format of '{path}': end its name in .json or .parquet")
    return path.suffix


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
