"""Data that is made here, so that studies of every kind run without a download: sounds, drawings, photographs, texts.

Each function is pure: the same arguments give the same data on every machine, up to the version of the library that
ships a photograph or a docstring.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------------------------- sounds

MELODIES: Sequence[tuple[int, int, int]] = (
    (0, 4, 7),
    (7, 4, 0),
    (0, 7, 4),
    (4, 0, 7),
    (7, 0, 4),
    (4, 7, 0),
    (0, 4, 0),
    (4, 0, 4),
    (7, 4, 7),
    (4, 7, 4),
)
"""Semitones above a keynote, of the three notes of each keyword."""

RATE = 4000
SOUND = 2000  # samples: half a second


def melodies(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keywords of three notes in any of three keys, any timbre, anywhere and with noise: their order is what counts.

    Args:
        count: sounds.
        seed: of everything about them.

    Returns:
        sounds `(count, 1, 2000)` float32 in [-1, 1] at 4000 samples a second, and classes `(count,)` by `MELODIES`.
    """
    random = np.random.default_rng(seed)
    labels = random.integers(len(MELODIES), size=count)
    sounds = 0.15 * random.standard_normal((count, SOUND))
    for sound, label in zip(sounds, labels, strict=True):
        keynote = 220 * 2 ** (random.integers(3) / 12)
        length = int(random.integers(450, 600))
        start = int(random.integers(SOUND - 3 * length + 1))
        strengths = random.uniform(0.1, 1.0, size=3)
        time = np.arange(length) / RATE
        fade = np.sin(np.pi * np.arange(length) / length)
        for place, semitones in enumerate(MELODIES[label]):
            pitch = keynote * 2 ** ((semitones + random.normal(scale=0.1)) / 12)
            phases = random.uniform(0, 2 * np.pi, size=3)
            waves = [
                strength * np.sin(2 * np.pi * (overtone + 1) * pitch * time + phase)
                for overtone, (strength, phase) in enumerate(zip(strengths, phases, strict=True))
            ]
            at = start + place * length
            sound[at : at + length] += 0.4 * fade * np.sum(waves, axis=0) / strengths.sum()
    return torch.from_numpy(sounds.clip(-1, 1).astype(np.float32)).unsqueeze(1), torch.from_numpy(labels)


# ------------------------------------------------------------------------------------------------------------ drawings

SHAPES = ("circle", "square", "triangle")
SIDE = 64


def shapes(count: int, seed: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Pictures of one to three filled shapes that do not touch, in any colour on a ground of another, with noise.

    Args:
        count: pictures.
        seed: of everything about them.

    Returns:
        pixels `(count, 3, 64, 64)` uint8; of each picture its boxes `(n, 4)`, x1 y1 x2 y2 in pixels, and their classes
        `(n,)`, from 1 by `SHAPES`.
    """
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    pixels = np.empty((count, 3, SIDE, SIDE), np.uint8)
    boxes, labels = [], []
    for picture in range(count):
        ground = random.uniform(0.2, 0.8, size=3)
        canvas = np.broadcast_to(ground[:, None, None], (3, SIDE, SIDE)).copy()
        placed: list[tuple[float, float, float]] = []  # centre and half a side
        mine: list[int] = []
        for _ in range(int(random.integers(1, 4))):
            half = random.uniform(6, 12)
            x, y = random.uniform(half + 1, SIDE - half - 1, size=2)
            if any(max(abs(x - a), abs(y - b)) < half + other + 1 for a, b, other in placed):
                continue
            label = int(random.integers(len(SHAPES)))
            colour = (ground + random.choice([-1, 1], size=3) * random.uniform(0.15, 0.4, size=3)).clip(0, 1)
            canvas[:, _inside(SHAPES[label], (rows - y) / half, (columns - x) / half)] = colour[:, None]
            placed.append((x, y, half))
            mine.append(label + 1)
        noisy = canvas + random.normal(scale=0.05, size=canvas.shape)
        pixels[picture] = (255 * noisy.clip(0, 1)).astype(np.uint8)
        boxes.append(torch.tensor([[x - h, y - h, x + h, y + h] for x, y, h in placed], dtype=torch.float32))
        labels.append(torch.tensor(mine, dtype=torch.long))
    return torch.from_numpy(pixels), boxes, labels


def _inside(shape: str, v: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Which pixels a shape covers that fills the square from -1 to 1; `v` downwards, `u` to the right."""
    if shape == "circle":
        covered = u * u + v * v <= 1
    elif shape == "square":
        covered = np.maximum(abs(u), abs(v)) <= 1
    else:
        covered = (abs(v) <= 1) & (abs(u) <= (v + 1) / 2)
    return np.asarray(covered)


# --------------------------------------------------------------------------------------------------------- photographs


def photographs() -> list[Tensor]:
    """The two photographs that scikit-learn ships, `(3, 427, 640)` uint8."""
    from sklearn.datasets import load_sample_images

    return [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images]


def tiles(image: Tensor, side: int) -> Tensor:
    """An image in squares `(n, c, side, side)`, row by row; what is left over at the right and at the bottom is cut."""
    channels, height, width = image.shape
    whole = image[:, : height // side * side, : width // side * side]
    parts = whole.unfold(1, side, side).unfold(2, side, side)
    return parts.permute(1, 2, 0, 3, 4).reshape(-1, channels, side, side)


def halved(images: Tensor, by: int) -> Tensor:
    """Images `(n, c, h, w)` smaller by a whole number, each pixel the mean of those that it replaces, rounded."""
    return torch.nn.functional.avg_pool2d(images.float(), by).round().to(images.dtype)


# --------------------------------------------------------------------------------------------------------------- texts

TOPICS = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
"""Packages of the standard library whose docstrings are told apart."""


def docstrings(least: int = 40) -> list[tuple[str, str]]:
    """(text, package) of the docstrings of every module, class and function of `TOPICS`; nothing of them is imported.

    Args:
        least: characters of a docstring; shorter ones say nothing of their package.
    """
    rows: dict[str, str] = {}
    for package in TOPICS:
        spec = importlib.util.find_spec(package)  # of a package at the top level: it is not imported
        assert spec is not None
        assert spec.origin is not None
        for path in sorted(Path(spec.origin).parent.rglob("*.py")):
            if "test" in path.parts or "tests" in path.parts:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = ast.get_docstring(node) or ""
                    if len(text) >= least:
                        rows.setdefault(text, package)
    return list(rows.items())
