"""Precision configs of rows: a row has a config's digest, and `configs.jsonl` beside the rows says what it stands for.

A line is `{"config": digest, "layers": {"uniform:4/channel x uniform:8/tensor": [layer names]}}`: layers are grouped
by their precision, because most networks have few of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.rows import Rows, RowsError
from mpsearch.precision import LayerPrecision, PrecisionConfig

NAME = "configs.jsonl"


def keep(configs: Iterable[PrecisionConfig], folder: Path) -> None:
    """Write the configs that the folder's file does not have yet."""
    rows = Rows(folder / NAME, key=("config",))
    there = {row["config"] for row in rows.read()}
    new = {config.digest: config for config in configs if config.digest not in there}
    rows.append_bare(*({"config": digest, "layers": _grouped(config)} for digest, config in new.items()))


def read(folder: Path) -> dict[str, PrecisionConfig]:
    """Digest -> config, of all in the folder's file.

    Raises:
        RowsError: a line's layers do not have its digest.
    """
    configs = {}
    for row in Rows(folder / NAME, key=("config",)).read():
        config = PrecisionConfig(
            (name, LayerPrecision.parse(*text.split(" x "))) for text, names in row["layers"].items() for name in names
        )
        if config.digest != row["config"]:
            raise RowsError(f"{folder / NAME}: {row['config']} has layers of digest {config.digest}: restore the file")
        configs[config.digest] = config
    return configs


def _grouped(config: PrecisionConfig) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, layer in config.items():
        groups.setdefault(str(layer), []).append(name)
    return groups
