"""
The grids of the quantizers
===========================

What each quantizer type maps a value to, and how far apart its levels are.
"""

# %%
# A quantizer is a module: bits and type are data, so a new precision changes buffers and nothing is rebuilt.
import matplotlib.pyplot as plt
import torch

from mpsearch.precision import Precision
from mpsearch.quant.quantizer import Quantizer
from mpsearch.quant.switch import make_quantizer


def quantizer(text: str, step: float) -> Quantizer:
    """A weight quantizer in eval mode, as it is scored."""
    precision = Precision.parse(text, "tensor")
    made = make_quantizer([precision.quantizer], channels=1, dims=1, signed=True, offset=False, elements=1)
    made.set_precision(precision)
    made.set_range(torch.tensor([step]))
    return made.eval()


x = torch.linspace(-1.2, 1.2, 2401)
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True)
for axis, (name, step) in zip(axes, {"uniform:3": 0.25, "shift:3": 1.0, "apot:4": 1.6}.items(), strict=True):
    axis.plot(x, x, color="0.8")
    axis.plot(x, quantizer(name, step)(x).detach())
    axis.set_title(name)
    axis.set_xlabel("x")
axes[0].set_ylabel("q(x)")
figure.tight_layout()

# %%
# The levels of power-of-two quantizers lie close around zero, where most weights are; the uniform ones are equally far
# apart. In units of the step:
for name in ("uniform:3", "shift:3", "apot:4"):
    levels = quantizer(name, 1.0)(torch.linspace(-9, 9, 9001)).detach()
    print(name, sorted({round(float(level), 4) for level in levels}))

# %%
# While training, a shift quantizer is a sum of sigmoids that becomes the hard one as its slope grows.
from mpsearch.quant.shift import sigmoid_levels  # noqa: E402

levels = torch.tensor([0.0, 0.25, 0.5, 1.0])
figure, axis = plt.subplots(figsize=(5, 3.4))
for slope in (4.0, 16.0, 64.0):
    axis.plot(x, sigmoid_levels(x, levels, torch.tensor(slope)), label=f"T = {slope:g}")
axis.legend()
axis.set_title("shift:3 in training")
figure.tight_layout()
