"""A fuzzer: on random networks and random configs every stage computes what it says, and every export answers alike.

`make fuzz` tries 1,000 networks; the default tests try 50. A failure shrinks to the smallest program that fails and
prints it: `build(Program(...))` makes the network again.
"""

from __future__ import annotations

import copy
import os
import random
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from networks import Program, build, programs, tensor_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mpsearch
from mpsearch.errors import ExportError
from mpsearch.exporters import packed
from mpsearch.graph.facts import ModelGraph
from mpsearch.precision import BITS, FLOAT, LayerPrecision, Precision, PrecisionConfig, per_tensor
from mpsearch.ptq.equalize import equalize
from mpsearch.ptq.fold import fold_batch_norms
from mpsearch.quant.prepare import inspect_network
from mpsearch.train import call

pytestmark = pytest.mark.study

EXAMPLES = int(os.environ.get("MPSEARCH_FUZZ_EXAMPLES", "25"))
EVERY = 5  # of this many networks one is exported to each format of another library: a graph export takes seconds

FLOAT_NOISE = 2e-5
"""Relative to the norm of the outputs: what another order of sums in float32 makes in networks as small as these."""
AGREE = 0.75
"""Share of samples that must agree to float noise between runtimes: a code on the boundary of two may fall either way,
and a network of few bits carries such a flip to its outputs. A wrong export is wrong on nearly all of them."""

CHOICES = [Precision(name, bits, "channel") for name in ("uniform", "shift", "apot") for bits in BITS[name]]
GRANULARITIES = ["tensor", "group2", "group3", "group4", "group5", "group8", "group100"]
"""What else than a channel shares a scale. Rows of the weights have 3 to 108 features: groups that divide a row, that
leave a rest, and that are longer than it."""
CONFIGS = st.randoms(use_true_random=False)


def distance(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of b."""
    return float((a - b).norm() / b.norm().clamp_min(1e-6))


def agreeing(a: Tensor, b: Tensor) -> float:
    """Share of the samples whose outputs are the same but for float noise."""
    scale = b.abs().amax().clamp_min(1e-6)
    return float(((a - b).abs().flatten(1).amax(1) <= 10 * FLOAT_NOISE * scale).float().mean())


@torch.no_grad()
def run(model: nn.Module, batch: Any) -> Tensor:
    return tensor_of(call(model, batch)).float()


def random_config(
    graph: ModelGraph,
    rng: random.Random,
    types: tuple[str, ...] = ("uniform", "shift", "apot"),
    groups: bool = True,
) -> PrecisionConfig:
    """A precision for each layer, the same for those that share a weight or an input; some tensors float."""
    choices = [choice for choice in CHOICES if choice.quantizer in types]
    granularities = GRANULARITIES if groups else ["tensor"]
    weight: dict[str, Precision] = {}
    activation: dict[str, Precision] = {}
    config = {}
    for layer in graph.quantizable:
        w = weight.setdefault(layer.weight_group, FLOAT if rng.random() < 0.1 else rng.choice(choices))
        if rng.random() < 0.3 and not w.is_float and layer.weight_group == layer.name:
            w = weight[layer.weight_group] = Precision(w.quantizer, w.bits, rng.choice(granularities))
        if layer.multiplies_activations:
            w = per_tensor(w)
        a = activation.setdefault(layer.input_group, FLOAT if rng.random() < 0.1 else rng.choice(choices))
        config[layer.name] = LayerPrecision(w, per_tensor(a))
    return PrecisionConfig(config)


def cannot_hold(target: str, graph: ModelGraph, config: PrecisionConfig) -> bool:
    """Whether a config has what no file of a target has a place for: such a one has to be refused."""
    products = any(layer.multiplies_activations for layer in graph.quantizable)
    return products or (target != "onnx" and any(precision.weight.group for precision in config.values()))


def fuzz(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test on random programs and configs."""
    checks = settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=EXAMPLES <= 50,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    return checks(given(program=programs(), rng=CONFIGS)(test))


@fuzz
def test_random_networks_are_inspected_prepared_trained_folded_and_exported(
    program: Program, rng: random.Random
) -> None:
    model, batch, _ = build(program)
    note(f"build({program!r})")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    outputs = run(model, batch)
    graph = inspect_network(model, batch, products=rng.random() < 0.5)

    # Facts: every multiply-accumulate is counted once.
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        call(copy.deepcopy(mpsearch.open_attention(model)).requires_grad_(False), batch)
    assert abs(graph.macs - counter.get_total_flops() / 2 / len(outputs)) <= len(graph.layers) + len(graph.other_macs)

    # Rewrites that change nothing: float precision, folding, equalization.
    floats = PrecisionConfig.uniform([layer.name for layer in graph.quantizable], LayerPrecision(FLOAT, FLOAT))
    assert distance(run(mpsearch.prepare(model, floats, batch, graph.layers).eval(), batch), outputs) < FLOAT_NOISE
    folded = fold_batch_norms(model, graph.layers, batch)
    assert distance(run(folded.model, batch), outputs) < FLOAT_NOISE
    equal = equalize(folded, replace_relu6=False)
    assert distance(run(equal.model, batch), outputs) < 20 * FLOAT_NOISE

    # A config: finite outputs, a gradient for every weight that is used, and nothing done to the model.
    config = random_config(graph, rng)
    note(f"PrecisionConfig({ {name: str(precision) for name, precision in config.items()} })")
    prepared = mpsearch.prepare(model, config, batch, graph.layers).eval()
    quantized = run(prepared, batch)
    assert torch.isfinite(quantized).all()
    training = copy.deepcopy(prepared).train()
    tensor_of(call(training, batch)).square().mean().backward()
    for name, parameter in training.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    # Our own exports: native bit for bit, packed within float noise of the sums that folding reorders.
    network = mpsearch.QuantizedNetwork(prepared, graph.layers, "fuzz", "noise", example_input=batch)
    with tempfile.TemporaryDirectory() as folder:
        mpsearch.export(network, "native", f"{folder}/native", verify=False)
        assert torch.equal(run(mpsearch.load(model, f"{folder}/native"), batch), quantized)
        mpsearch.export(network, "packed", f"{folder}/packed", verify=False)
        assert agreeing(run(packed.load(model, f"{folder}/packed"), batch), quantized) >= AGREE


def _onnx(folder: Path, x: Tensor, network: mpsearch.QuantizedNetwork) -> Tensor:
    import onnxruntime as ort

    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def _qonnx(folder: Path, x: Tensor, network: mpsearch.QuantizedNetwork) -> Tensor:
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    wrapper = ModelWrapper(str(folder / "model.onnx"))
    wrapper.set_tensor_shape(wrapper.graph.input[0].name, list(x.shape))
    return torch.from_numpy(
        execute_onnx(wrapper, {wrapper.graph.input[0].name: x.numpy()})[wrapper.graph.output[0].name]
    )


RUNTIMES: dict[str, tuple[Callable[[Path, Tensor, mpsearch.QuantizedNetwork], Tensor], str, tuple[str, ...]]] = {
    "onnx": (_onnx, "onnxruntime", ("uniform", "shift", "apot")),
    "qonnx": (_qonnx, "qonnx", ("uniform",)),
}
"""Format -> what runs its file, the package, and the quantizer types that it holds in activations."""


@pytest.mark.slow
@pytest.mark.parametrize("target", [*RUNTIMES, "brevitas"])
@settings(
    max_examples=max(1, EXAMPLES // EVERY),
    deadline=None,
    database=None,
    derandomize=EXAMPLES <= 50,
    suppress_health_check=list(HealthCheck),
)
@given(program=programs(most=5), rng=CONFIGS)
def test_random_networks_answer_the_same_in_the_runtime_of_their_format(
    target: str, program: Program, rng: random.Random
) -> None:
    package = RUNTIMES[target][1] if target in RUNTIMES else target
    if find_spec(package) is None or (target != "brevitas" and find_spec("onnxscript") is None):
        pytest.skip("needs mpsearch[targets]; `make test-all` installs it")
    model, batch, x = build(program)
    note(f"build({program!r})")
    graph = inspect_network(model, batch, products=rng.random() < 0.1)
    config = random_config(graph, rng, ("uniform",), groups=target == "onnx" or rng.random() < 0.1)
    note(f"PrecisionConfig({ {name: str(precision) for name, precision in config.items()} })")
    prepared = mpsearch.prepare(model, config, batch, graph.layers).eval()
    quantized = run(prepared, batch)
    network = mpsearch.QuantizedNetwork(prepared, graph.layers, "fuzz", "noise", example_input=batch)
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = mpsearch.export(network, target, f"{folder}/out", verify=False).path
        except ExportError as error:
            note(f"refused: {error}")
            refusal = str(error)
        else:
            refusal = None
        if refusal is not None:
            assert any(layer.name in refusal for layer in graph.quantizable), "a refusal must name its layer"
            return
        assert not cannot_hold(target, graph, config), "it is refused, and no other values are exported"
        if target == "brevitas":
            from mpsearch.exporters import brevitas

            theirs = run(brevitas.load(model, path), batch)
        else:
            theirs = RUNTIMES[target][0](path, x, network)
        assert agreeing(theirs, quantized) >= AGREE
