"""Pictures of a run: tables, figures, the report, the Optuna dashboard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpsearch.report.data import RunData as RunData
    from mpsearch.report.data import read_run as read_run

__all__ = ["RunData", "read_run"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from mpsearch.report import data

        return getattr(data, name)
    raise AttributeError(f"module 'mpsearch.report' has no attribute '{name}'")
