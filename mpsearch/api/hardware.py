"""Hardware: the profiles that there are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
    from mpsearch.hardware.profile import load_profile, profile_path, table_path

    path, profile = profile_path(hardware), load_profile(hardware)
    rows = 0
    if profile.cost is not None and profile.cost.table is not None:
        lines = table_path(path, profile).read_text(encoding="utf-8").splitlines()
        rows = max(0, sum(bool(line) and not line.startswith("#") for line in lines) - 1)
    return Hardware(path.stem, profile.about, profile.source, path.read_text(encoding="utf-8"), rows)
