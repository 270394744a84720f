"""Reading back: the manifest of an export, and precision configs that others wrote.

`read_config` knows

- a folder that `mpsearch export` wrote, whatever the target, or its JSON file;
- our `layers` object alone, as `mpsearch import -o` writes it;
- AIMET encodings, format 0.6: bits and symmetry of `param_encodings`, and of the layers' *input* encodings;
- a table as Brevitas users keep it, JSON or YAML: layer -> bits, or {weight_bit_width, input_bit_width}.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpsearch.documents import read_yaml
from mpsearch.errors import ExportError, PrecisionError, nearest
from mpsearch.exporters.manifest import MANIFEST
from mpsearch.exporters.native import CONFIG_FILE
from mpsearch.precision import FLOAT, FLOAT_BITS, LayerPrecision, Precision, PrecisionConfig


def read_precisions(text: str) -> PrecisionConfig | LayerPrecision:
    """What a command line names: the config of a file or folder if there is one, else one precision for all layers.

    That is a shorthand, `w4a8`, or weight and input, `shift:4 x float`.

    Raises:
        PrecisionError: neither.
        ExportError: the file is no config.
    """
    if Path(text).exists():
        return read_config(text)
    weight, separator, activation = text.partition(" x ")
    try:
        return LayerPrecision.parse(weight, activation) if separator else LayerPrecision.shorthand(text)
    except PrecisionError as error:
        raise PrecisionError(f"CONFIG got '{text}': there is no such file, and as a precision, {error}") from None


def read_config(path: str | Path) -> PrecisionConfig:
    """The precision config in a file or folder of one of the formats at the module's top; what it leaves out is float.

    Raises:
        ExportError: there is no such file, or it has none of these formats; the message says what was found.
        PrecisionError: a layer has a precision that does not exist; the message names it.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / name for name in (CONFIG_FILE, MANIFEST) if (path / name).exists()]
        if not files:
            raise ExportError(f"{path} holds neither {CONFIG_FILE} nor {MANIFEST}: give what export wrote, or a file")
        path = files[0]
    document = _read(path)
    if "param_encodings" in document:
        return _from_aimet(document, path)
    if "layers" in document:
        try:
            return PrecisionConfig.from_json(document["layers"])
        except PrecisionError as error:
            raise ExportError(f"{path}: {error}") from None
    return PrecisionConfig((str(name), _from_table(str(name), row, path)) for name, row in document.items())


def _read(path: Path) -> dict[str, Any]:
    if path.is_file() and zipfile.is_zipfile(path):
        raise ExportError(
            f"{path} is an archive, as torch.save writes, and no config: for a checkpoint of MHAQ give its YAML too, "
            "--config mhaq.yaml"
        )
    document = read_yaml(path, ExportError)  # JSON is YAML
    if not isinstance(document, dict) or not document:
        raise ExportError(f"{path} holds no table of layers: expected layer -> bits, or what an export wrote")
    return document


def _from_aimet(document: Mapping[str, Any], path: Path) -> PrecisionConfig:
    weights, activations = document["param_encodings"], document.get("activation_encodings", {})
    if not isinstance(weights, Mapping) or not isinstance(activations, Mapping):
        raise ExportError(
            f"{path} has AIMET encodings of version {document.get('version')!r}, which name tensors and not layers: "
            "expected 0.6, as QuantizationSimModel writes for torch"
        )
    precisions: dict[str, LayerPrecision] = {}
    by_layer = {name.removesuffix(".weight"): value for name, value in weights.items() if name.endswith(".weight")}
    for name in {**by_layer, **activations}:
        try:
            weight = _aimet_weight(by_layer.get(name))
            inputs = activations.get(name, {}).get("input", {})
            activation = FLOAT if "0" not in inputs else _uniform(inputs["0"]["bitwidth"], "tensor")
        except (KeyError, TypeError, AttributeError, IndexError):
            raise ExportError(f"{path}: the encodings of layer '{name}' are not of AIMET's format 0.6") from None
        except PrecisionError as error:
            raise PrecisionError(f"{path}: layer '{name}': {error}") from None
        if not (weight.is_float and activation.is_float):  # output encodings alone say nothing of this layer
            precisions[name] = LayerPrecision(weight, activation)
    return PrecisionConfig(precisions)


def _aimet_weight(encodings: Any) -> Precision:
    if encodings is None:
        return FLOAT
    return _uniform(encodings[0]["bitwidth"], "channel" if len(encodings) > 1 else "tensor")


def _from_table(name: str, row: Any, path: Path) -> LayerPrecision:
    known = {"weight_bit_width", "input_bit_width"}
    row = {"weight_bit_width": row} if isinstance(row, int) else row
    if not isinstance(row, Mapping) or not row or not set(row) <= known:
        raise ExportError(
            f"{path}: layer '{name}' has {row!r}: expected bits, or an object with {' and '.join(sorted(known))}"
        )
    try:
        weight, activation = (row.get(key, FLOAT_BITS) for key in ("weight_bit_width", "input_bit_width"))
        return LayerPrecision(_uniform(weight, "channel"), _uniform(activation, "tensor"))
    except PrecisionError as error:
        raise PrecisionError(f"{path}: layer '{name}': {error}") from None


def _uniform(bits: Any, granularity: Any) -> Precision:
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise PrecisionError(f"bits must be a whole number, got {bits!r}")
    return FLOAT if bits >= FLOAT_BITS else Precision("uniform", bits, granularity)


def complete(config: PrecisionConfig, layers: list[str]) -> PrecisionConfig:
    """The config with the layers that it does not name as float, in the order of `layers`.

    Raises:
        ExportError: it names a layer that is none of these.
    """
    for name in config:
        if name not in layers:
            raise ExportError(f"the config names '{name}', which is no quantizable layer here: {nearest(name, layers)}")
    leave = LayerPrecision(FLOAT, FLOAT)
    return PrecisionConfig((name, config.get(name, leave)) for name in layers)
