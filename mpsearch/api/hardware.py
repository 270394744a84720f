"""Hardware: the profiles that there are, and measuring one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpsearch.api.studies import read_study
from mpsearch.observer import SILENT, Observer

if TYPE_CHECKING:
    import pandas as pd

    from mpsearch.study import StudySpec


@dataclass(frozen=True)
class Hardware:
    """A hardware profile.

    Attributes:
        name: what a study gives as `hardware`.
        about: the device in a sentence or two.
        source: where pairs and numbers are from.
        text: the profile as it is written, YAML.
        rows: measured rows of its table; 0 where it has none.
    """

    name: str
    about: str
    source: str
    text: str
    rows: int

    def to_json(self) -> dict[str, Any]:
        """What `mpsearch hardware list --json` prints of it."""
        return {"name": self.name, "about": self.about, "source": self.source, "rows": self.rows}


def hardware_list() -> list[Hardware]:
    """Give the hardware profiles that ship with mpsearch, by name.

    >>> import mpsearch
    >>> "w8a16-npu" in [profile.name for profile in mpsearch.hardware_list()]
    True
    """
    from mpsearch.hardware.profile import profile_names

    return [hardware_show(name) for name in profile_names()]


def hardware_show(hardware: str | Path) -> Hardware:
    """Give one hardware profile.

    Args:
        hardware: a shipped profile by name, or the path of a YAML file.

    Raises:
        MpsearchError: no such profile, or it cannot be used.

    >>> import mpsearch
    >>> mpsearch.hardware_show("int8-fp16").about[:12]
    'Accelerators'
    """
    from mpsearch.files import read_text
    from mpsearch.hardware.profile import load_profile, profile_path, table_path
    from mpsearch.hardware.table import read_table

    path, profile = profile_path(hardware), load_profile(hardware)
    measured = profile.cost is not None and profile.cost.table is not None
    rows = len(read_table(table_path(path, profile)).rows) if measured else 0
    return Hardware(path.stem, profile.about, profile.source, read_text(path), rows)


@dataclass(frozen=True)
class MeasuredTable:
    """A table that was measured.

    Attributes:
        path: the CSV; a profile of its name, ending in .yaml, is beside it.
        header: what it was measured on, in words.
        rows: columns op, in_shape, out_shape, kernel, stride, groups, fused_with, weight, activation, median_us, mad_us
            and n (rounds).
        checks: columns network (float, w8a8, mixed), whole_us, sum_us (of its rows), error (of the sum, as a share) and
            reason (why it was not compared).
        left_out: layers for which the runtime has no kernels here.
    """

    path: Path
    header: dict[str, str]
    rows: pd.DataFrame
    checks: pd.DataFrame
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """What `mpsearch measure --json` prints."""
        checks = self.checks.astype(object).where(self.checks.notna(), None)
        return {
            "path": str(self.path),
            "header": self.header,
            "rows": self.rows.to_dict("records"),
            "checks": checks.to_dict("records"),
            "left_out": list(self.left_out),
        }


def hardware_import_vela(
    study: str | Path | StudySpec,
    file: str | Path,
    clock_mhz: float,
    pair: str = "w8a8",
    out: str | Path = "table.csv",
    set: Sequence[str] = (),
) -> pd.DataFrame:
    """Write what Vela says of a study's network on an Ethos-U NPU as rows of a table; rows of other pairs stay.

    Args:
        study: a shipped study by name, the path of a study file, or a StudySpec: the network that Vela compiled.
        file: NETWORK_per-layer.csv, as `vela --verbose-performance` writes it.
        clock_mhz: the NPU's clock: Vela counts cycles.
        pair: precisions of that network.
        out: the table to write, CSV; a profile is written beside it where there is none.
        set: `key.path=value` to override values of the study file.

    Returns:
        the rows of the table: columns op, in_shape, out_shape, kernel, stride, groups, fused_with, weight, activation,
        median_us, mad_us and n (layers of this shape).

    Raises:
        MpsearchError: the study or the file cannot be used, or they are not of one network.
    """
    spec = read_study(study, set)
    import pandas as pd

    from mpsearch.hardware.table import COLUMNS
    from mpsearch.hardware.vela import import_file
    from mpsearch.precision import LayerPrecision
    from mpsearch.problem import open_problem

    table = import_file(open_problem(spec).graph, Path(file), LayerPrecision.shorthand(pair), clock_mhz, Path(out))
    rows = [(*key, *of_pair, row.median_us, row.mad_us, row.n) for (key, of_pair), row in table.rows.items()]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def measure(
    study: str | Path | StudySpec,
    runtime: str = "onnxruntime",
    out: str | Path = "table.csv",
    threads: int = 1,
    set: Sequence[str] = (),
    observer: Observer = SILENT,
) -> MeasuredTable:
    """Measure what each layer of a study's network takes on this machine, at each pair that a runtime has kernels for.

    The sum of the rows is then compared with the whole network. Called again, it goes on where it was.

    Args:
        study: a shipped study by name, the path of a study file, or a StudySpec.
        runtime: onnxruntime or openvino (float, W8A8), or torch (float, bfloat16).
        out: the table to write, CSV; a profile is written beside it, for `hardware: PATH` and `cost.model: table`.
        threads: that the runtime may use.
        set: `key.path=value` to override values of the study file.
        observer: told of every row as of a stage.

    Raises:
        MpsearchError: the study cannot be used, no such runtime, or the table is of another machine.
    """
    spec = read_study(study, set)
    import pandas as pd

    from mpsearch.hardware.table import COLUMNS
    from mpsearch.measure.measure import measure_study

    measured = measure_study(spec, runtime, Path(out), threads, observer)
    rows = [(*key, *pair, row.median_us, row.mad_us, row.n) for (key, pair), row in measured.table.rows.items()]
    checks = [(c.name, c.whole_us, c.sum_us, c.error, c.reason) for c in measured.checks]
    return MeasuredTable(
        Path(out),
        dict(measured.table.header),
        pd.DataFrame(rows, columns=list(COLUMNS)),
        pd.DataFrame(checks, columns=["network", "whole_us", "sum_us", "error", "reason"]),
        measured.left_out,
    )
