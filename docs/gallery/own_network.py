"""
A network, its layers, its cost
===============================

Without a study: inspect a network, give each layer a precision, price it, export it and load it again.
"""

# %%
# Layers are what one forward pass shows: shapes, MACs (multiply-accumulates), and which share an input.
import tempfile

import torch

import mpsearch

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
    torch.nn.Conv2d(8, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16 * 64, 10),
).eval()  # fmt: skip
batch = torch.randn(32, 1, 8, 8)
graph = mpsearch.inspect_model(model, batch)
for layer in graph.layers:
    print(f"{layer.name}: {layer.kind} {layer.weight_shape}, {layer.macs:,} MACs")

# %%
# A config names the precision of each layer's weight and input.
config = mpsearch.PrecisionConfig(
    {
        "0": mpsearch.LayerPrecision.shorthand("w8a8"),
        "3": mpsearch.LayerPrecision.parse("shift:4", "uniform:6"),
        "6": mpsearch.LayerPrecision.parse("uniform:4/group128", "uniform:8"),
    }
)
for name, layer in config.items():
    print(name, layer)

# %%
# What it costs under each cost model, beside W8A8:
w8a8 = mpsearch.PrecisionConfig.uniform(config, mpsearch.LayerPrecision.shorthand("w8a8"))
for name in ("shift_energy", "bops", "weight_bytes", "activation_bytes", "memory_energy"):
    cost, reference = (mpsearch.cost_of(graph.layers, each, name) for each in (config, w8a8))
    print(f"{name}: {cost.total:.4g} {cost.unit}, {cost.total / reference.total:.3f} of W8A8")

# %%
# `prepare` quantizes a copy. An export is loaded again and compared before it counts.
quantized = mpsearch.prepare(model, config, batch, graph.layers).eval()
network = mpsearch.QuantizedNetwork(
    quantized, graph.layers, "example", "random images", samples=batch, float_model=model
)
with tempfile.TemporaryDirectory() as folder:
    print(mpsearch.export(network, "packed", f"{folder}/packed").verified)
