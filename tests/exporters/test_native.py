"""A native export gives the model back, bit for bit, in a process that has torch and safetensors alone."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import mpsearch
from mpsearch.errors import ExportError
from mpsearch.exporters import packed
from mpsearch.exporters.read import read_config
from mpsearch.exporters.verify import Verified
from mpsearch.graph.layers import inspect_model
from mpsearch.metric import TOP1
from mpsearch.precision import FLOAT, LayerPrecision, Precision, PrecisionConfig

MODEL = """
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.Tanh(),
        nn.ConvTranspose2d(4, 4, 2), nn.Flatten(), nn.Linear(4 * 7 * 7, 3)).eval()

def batch():
    return torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
"""
scope: dict[str, object] = {}
exec(MODEL, scope)

CONFIG = PrecisionConfig(
    {
        "0": LayerPrecision.shorthand("w8a8"),
        "3": LayerPrecision.parse("apot:4", "shift:3"),
        "5": LayerPrecision(Precision("shift", 5, "tensor"), FLOAT),
        "7": LayerPrecision(FLOAT, Precision("uniform", 2, "tensor")),
    }
)


def network() -> nn.Module:
    return scope["network"]()  # type: ignore[operator, no-any-return]


def batch() -> Tensor:
    return scope["batch"]()  # type: ignore[operator, no-any-return]


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, nn.Module]:
    model = network()
    layers = inspect_model(model, batch()).layers
    prepared = mpsearch.prepare(model, CONFIG, batch(), layers)
    with torch.no_grad():
        for parameter in prepared.parameters():  # as if trained
            parameter.mul_(1.01)
    result = mpsearch.QuantizedNetwork(
        prepared,
        layers,
        name="small",
        task="noise",
        score={"val": 0.5, "test": None},
        metric=TOP1,
        cost={"model": "bops", "reference": "w8a8", "relative": 0.3},
    )
    return mpsearch.export(result, "native", tmp_path / "out").path, prepared


def test_load_gives_identical_outputs(exported: tuple[Path, nn.Module]) -> None:
    folder, prepared = exported
    loaded = mpsearch.load(network(), folder)
    assert torch.equal(loaded(batch()), prepared(batch()))


@pytest.mark.parametrize("float_too", [True, False])
def test_an_export_is_exact_however_the_network_lies_in_memory(tmp_path: Path, float_too: bool) -> None:
    """Trials train with channels last; files are dense, and another layout sums in another order."""
    x = torch.randn(8, 16, 20, 20, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(16, 48, 3), nn.ReLU(), nn.Conv2d(48, 24, 3), nn.Flatten(), nn.Linear(6144, 5)
    ).eval()
    float_model = copy.deepcopy(model).to(memory_format=torch.channels_last if float_too else torch.contiguous_format)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    layers = inspect_model(model, x).layers
    config = PrecisionConfig.uniform([layer.name for layer in layers], LayerPrecision.shorthand("w8a8"))
    prepared = mpsearch.prepare(model, config, x, layers).eval()
    quantized = mpsearch.QuantizedNetwork(prepared, layers, "net", "noise", samples=x, float_model=float_model)
    verified = mpsearch.export(quantized, "native", tmp_path / "out").verified
    assert isinstance(verified, Verified)
    assert (verified.same_answers, verified.max_difference) == (8, 0.0)
    assert prepared[0].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr, index]


def test_load_needs_torch_and_safetensors_alone(exported: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, prepared = exported
    (tmp_path / "small_network.py").write_text(MODEL)
    torch.save(prepared(batch()).detach(), tmp_path / "expected.pt")
    script = f"""
import sys
allowed = ("optuna", "ray", "pandas", "plotly", "pydantic", "sklearn", "typer", "yaml", "scipy", "torchvision")
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in allowed:
            raise ImportError(f"{{name}} must not be needed")
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, {str(tmp_path)!r})
import torch
torch.set_num_threads(1)
import mpsearch
from small_network import network, batch
y = mpsearch.load(network(), {str(folder)!r})(batch())
assert torch.equal(y, torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_document_keeps_to_the_published_schema(exported: tuple[Path, nn.Module]) -> None:
    folder, _ = exported
    schema = json.loads((Path(mpsearch.__file__).parent / "schema" / "precision-config-1.json").read_text())
    document = json.loads((folder / "precision.json").read_text())
    jsonschema.validate(document, schema)
    assert PrecisionConfig.from_json(document["layers"]) == CONFIG
    document["layers"]["0"]["weight"]["bits"] = "8"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)


def test_the_config_is_read_from_the_folder_or_the_file(exported: tuple[Path, nn.Module]) -> None:
    folder, _ = exported
    assert read_config(folder) == read_config(folder / "precision.json") == CONFIG
    edit(folder, layers={})
    with pytest.raises(ExportError, match=r"precision\.json: 'layers' must be an object"):
        read_config(folder / "precision.json")


def test_load_leaves_the_given_network_untouched(exported: tuple[Path, nn.Module]) -> None:
    model = network()
    before = model(batch())
    mpsearch.load(model, exported[0])
    assert torch.equal(model(batch()), before)


def test_an_export_is_not_overwritten(exported: tuple[Path, nn.Module]) -> None:
    folder, prepared = exported
    layers = inspect_model(network(), batch()).layers
    with pytest.raises(ExportError, match="already holds"):
        mpsearch.export(mpsearch.QuantizedNetwork(prepared, layers, "small", "noise"), "native", folder)


def test_unknown_format_is_named(exported: tuple[Path, nn.Module], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="unknown export format 'natve': did you mean 'native'"):
        mpsearch.export(mpsearch.QuantizedNetwork(exported[1], (), "small", "noise"), "natve", tmp_path / "x")


def edit(folder: Path, **changes: object) -> None:
    path = folder / "precision.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_foreign_and_older_schemas_are_refused(exported: tuple[Path, nn.Module]) -> None:
    folder, _ = exported
    for schema in ("mpsearch/precision-config/0", "somebody/else", None):
        edit(folder, schema=schema)
        with pytest.raises(ExportError, match="reads 'mpsearch/precision-config/1'"):
            mpsearch.load(network(), folder)


def test_another_network_is_refused_by_layer_or_shape(exported: tuple[Path, nn.Module]) -> None:
    with pytest.raises(ExportError, match="names a layer '5' that the model does not have"):
        mpsearch.load(nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)), exported[0])
    wider = network()
    wider[0] = nn.Conv2d(1, 7, 3)  # type: ignore[operator]
    with pytest.raises(ExportError, match=r"of another network.*0\.weight"):
        mpsearch.load(wider, exported[0])


def test_damaged_files_are_refused(exported: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, _ = exported
    with pytest.raises(ExportError, match="holds no export"):
        mpsearch.load(network(), tmp_path)
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ExportError, match="SHA-256 differs"):
        mpsearch.load(network(), folder)
    edit(folder, tensors={"file": "model.safetensors"})
    with pytest.raises(ExportError, match="SHA-256 differs"):  # a native manifest must say it
        mpsearch.load(network(), folder)
    edit(folder, tensors={"file": "../other.safetensors", "sha256": ""})
    with pytest.raises(ExportError, match="file name in the same folder"):
        mpsearch.load(network(), folder)
    (folder / "precision.json").write_text("{")
    with pytest.raises(ExportError, match="is damaged, it is no JSON"):
        mpsearch.load(network(), folder)


def test_bits_outside_a_quantizer_are_refused(exported: tuple[Path, nn.Module]) -> None:
    folder, _ = exported
    layers = json.loads((folder / "precision.json").read_text())["layers"]
    layers["3"]["weight"]["bits"] = 9
    edit(folder, layers=layers)
    with pytest.raises(ExportError, match="layer '3': apot has no 9-bit form: give 2 to 5 bits"):
        mpsearch.load(network(), folder)


@pytest.mark.parametrize("quantizer", [None, [], {}, 5, True])
def test_quantizer_that_is_no_name_is_refused(exported: tuple[Path, nn.Module], quantizer: object) -> None:
    folder, _ = exported
    layers = json.loads((folder / "precision.json").read_text())["layers"]
    layers["3"]["weight"]["quantizer"] = quantizer
    edit(folder, layers=layers)
    with pytest.raises(ExportError, match="layer '3': 'quantizer' must be a text, got"):
        mpsearch.load(network(), folder)


@pytest.mark.parametrize("file", ["precision.json", "model.safetensors"])
def test_pipe_in_the_place_of_a_file_is_not_waited_for(exported: tuple[Path, nn.Module], file: str) -> None:
    folder, _ = exported
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(ExportError, match=rf"cannot read .*{file}: it is a pipe or a device"):
        mpsearch.load(network(), folder)


class Versioned(nn.Sequential):
    """A module that converts old checkpoints by their version, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *rest) -> None:  # type: ignore[no-untyped-def, override]
        assert metadata.get("version") == 2
        super()._load_from_state_dict(state, prefix, metadata, *rest)


@pytest.mark.parametrize(("to", "load"), [("native", mpsearch.load), ("packed", packed.load)])
def test_modules_that_ask_for_the_version_of_a_checkpoint_load(to: str, load, tmp_path: Path) -> None:
    model, x = Versioned(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), torch.randn(8, 4)
    layers = inspect_model(model, x).layers
    config = PrecisionConfig.uniform(["0", "2"], LayerPrecision.shorthand("w4a4"))
    prepared = mpsearch.prepare(model, config, x, layers)
    folder = mpsearch.export(mpsearch.QuantizedNetwork(prepared, layers, "net", "noise"), to, tmp_path / "out").path
    assert torch.equal(load(model, folder)(x), prepared(x))
