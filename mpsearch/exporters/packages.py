"""The packages that export targets need beside mpsearch; `pip install 'mpsearch[TARGET]'` brings them."""

from __future__ import annotations

from importlib.util import find_spec

from mpsearch.errors import ExportError

PACKAGES: dict[str, tuple[str, ...]] = {
    "qonnx": ("onnx", "onnxscript"),
    "onnx": ("onnx", "onnxscript"),
    "brevitas": ("brevitas",),
    "torchao": ("torchao",),
    "modelopt": ("modelopt",),
    "aimet": ("aimet_torch",),
}
"""Target -> importable names; the others need nothing."""


def need(target: str) -> None:
    """Refuse a target whose packages are not installed, and name the extra that brings them.

    Raises:
        ExportError: a package is missing.
    """
    missing = [package for package in PACKAGES.get(target, ()) if find_spec(package) is None]
    if missing:
        raise ExportError(f"{target} needs the package {missing[0]}: pip install 'mpsearch[{target}]'")
