"""The networks that mpsearch brings itself: CIFAR ResNets, and small ones for 8x8 digits, for masks and for sounds.

ResNets for 32x32 images: He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, section 4.2, with
the parameter-free shortcut (option A): where a stage halves the image, the shortcut takes every second pixel and fills
the new channels with zeros.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv3x3(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, groups=groups, bias=False)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around an option-A shortcut: `(n, inputs, h, w)` -> `(n, outputs, h/stride, w/stride)`."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.new_channels = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """One block; see the class."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """The input, subsampled and zero-padded to the output's shape."""
        if self.stride == 1 and self.new_channels == 0:
            return x
        before = self.new_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))


class CifarResNet(nn.Module):
    """ResNet of depth 6n+2 for small images: three stages of n blocks with 16, 32 and 64 channels."""

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = _conv3x3(in_channels, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(blocks, 16, 16, stride=1)
        self.layer2 = self._stage(blocks, 16, 32, stride=2)
        self.layer3 = self._stage(blocks, 32, 64, stride=2)
        self.linear = nn.Linear(64, num_classes)
        _kaiming(self)

    @staticmethod
    def _stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
        rest = [ResidualBlock(outputs, outputs) for _ in range(blocks - 1)]
        return nn.Sequential(ResidualBlock(inputs, outputs, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, in_channels, h, w)` -> logits `(n, num_classes)`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class SeparableBlock(nn.Module):
    """Depthwise 3x3, then pointwise 1x1, each with BatchNorm and ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = _conv3x3(inputs, inputs, stride, groups=inputs)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.pointwise = nn.Conv2d(inputs, outputs, kernel_size=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, inputs, h, w)` -> `(n, outputs, h/stride, w/stride)`."""
        x = F.relu(self.bn1(self.depthwise(x)))
        return F.relu(self.bn2(self.pointwise(x)))


class DigitsCNN(nn.Module):
    """Ten convolutions and a classifier for 8x8 images, small enough to train in seconds.

    Dense, depthwise and pointwise layers and a layer that most of the cost sits in: layers differ in how many bits they
    need, so that a mixed precision has something to gain.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, 12)
        self.bn1 = nn.BatchNorm2d(12)
        self.block1 = ResidualBlock(12, 12)
        self.down = SeparableBlock(12, 24, stride=2)
        self.block2 = ResidualBlock(24, 24)
        self.mix = SeparableBlock(24, 32)
        self.conv2 = _conv3x3(32, 32)
        self.bn2 = nn.BatchNorm2d(32)
        self.linear = nn.Linear(32, num_classes)
        _kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, in_channels, 8, 8)` -> logits `(n, num_classes)`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.mix(self.block2(self.down(self.block1(x))))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.linear(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class _TwoConvs(nn.Module):
    """Two 3x3 convolutions with BatchNorm and ReLU: `(n, inputs, h, w)` -> `(n, outputs, h, w)`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv3x3(inputs, outputs), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = _conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Both; see the class."""
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class UNet(nn.Module):
    """A small U-Net (arXiv 1505.04597) for masks, `levels` times halved and doubled again.

    We differ: convolutions keep the size and have BatchNorm, and doubling is by nearest neighbour and a 3x3 convolution
    rather than by a transposed one.
    """

    def __init__(self, num_classes: int = 2, in_channels: int = 3, width: int = 8, levels: int = 3) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels + 1)]
        self.first = _TwoConvs(in_channels, width)
        self.down = nn.ModuleList(_TwoConvs(a, b) for a, b in pairwise(widths))
        self.up = nn.ModuleList(_TwoConvs(a + b, a) for a, b in pairwise(widths))
        self.head = nn.Conv2d(width, num_classes, kernel_size=1)
        _kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, in_channels, h, w)` -> logits `(n, num_classes, h, w)`; h and w are multiples of `2**levels`."""
        x = self.first(x)
        skipped = []
        for block in self.down:
            skipped.append(x)
            x = block(F.max_pool2d(x, 2))
        for block, skip in zip(reversed(self.up), reversed(skipped), strict=True):
            x = block(torch.cat([skip, F.interpolate(x, scale_factor=2.0, mode="nearest")], dim=1))
        return self.head(x)  # type: ignore[no-any-return]


class WaveCNN(nn.Module):
    """A small network on the waveform, in the manner of M5 (arXiv 1610.00087): a long first kernel, then short ones."""

    def __init__(self, num_classes: int = 2, in_channels: int = 1, width: int = 16, first: int = 80, stride: int = 16):
        super().__init__()
        widths = [in_channels, width, width, 2 * width, 2 * width]
        kernels = [(first, stride)] + [(3, 1)] * (len(widths) - 2)
        self.convs = nn.ModuleList(
            nn.Conv1d(a, b, kernel, stride, padding=kernel // 2, bias=False)
            for a, b, (kernel, stride) in zip(widths, widths[1:], kernels, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(b) for b in widths[1:])
        self.linear = nn.Linear(widths[-1], num_classes)
        _kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, in_channels, samples)` -> logits `(n, num_classes)`."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
            x = F.max_pool1d(x, 4, ceil_mode=True) if x.shape[-1] >= 4 else x
        return self.linear(x.mean(dim=2))  # type: ignore[no-any-return]


class ESPCN(nn.Module):
    """A small network for larger images (arXiv 1609.05158): what it computes at the small size, it spreads over pixels.

    We differ: ReLU for tanh, one layer more, and it learns what bilinear interpolation lacks.
    """

    def __init__(self, in_channels: int = 3, scale: int = 2, width: int = 24) -> None:
        super().__init__()
        self.scale = scale
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=5, padding=2)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.conv3 = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.conv4 = nn.Conv2d(width, in_channels * scale**2, kernel_size=3, padding=1)
        _kaiming(self)
        nn.init.zeros_(self.conv4.weight)  # it begins as the interpolation

    def forward(self, x: Tensor) -> Tensor:
        """`(n, in_channels, h, w)` in [0, 1] -> `(n, in_channels, scale h, scale w)`."""
        y = F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))
        return F.interpolate(x, scale_factor=float(self.scale), mode="bilinear") + F.pixel_shuffle(
            self.conv4(y), self.scale
        )


class _Levels(nn.Module):
    """Features of an image at an eighth and a sixteenth of its size, for `small_fcos`."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.out_channels = 2 * width
        self.blocks = nn.ModuleList(
            _TwoConvs(a, b) for a, b in pairwise((in_channels, width, width, 2 * width, 2 * width))
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """`(n, c, h, w)` -> level -> `(n, out_channels, h / 8, w / 8)` and half of that."""
        levels = {}
        for level, block in enumerate(self.blocks):
            x = F.max_pool2d(block(x), 2)
            if level >= 2:
                levels[str(level)] = x
        return levels


def small_fcos(num_classes: int = 1, in_channels: int = 3, width: int = 16, size: int = 64) -> nn.Module:
    """A small detector: torchvision's FCOS (arXiv 1904.01355) on a few convolutions, for pictures of `size` pixels.

    Args:
        num_classes: without the background.
        in_channels: of pictures.
        width: channels of the first half of the convolutions; the others have twice as many.
        size: side that pictures are brought to.
    """
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    detector: nn.Module = FCOS(
        _Levels(in_channels, width),
        num_classes + 1,
        min_size=size,
        max_size=size,
        anchor_generator=AnchorGenerator(sizes=((12,), (24,)), aspect_ratios=((1.0,), (1.0,))),
        detections_per_img=10,
    )
    return detector


@torch.no_grad()
def _kaiming(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
