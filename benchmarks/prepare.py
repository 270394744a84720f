"""Gets what the studies on CIFAR-10 need: the images in folders, and a trained ResNet-20.

torchvision downloads CIFAR-10 (170 MB) into `--folder`. The images are written without loss as PNG files in
`FOLDER/cifar10/{train,val,test}/<class>/`; val and test are the two halves of the official test set. Then the float
ResNet-20 is trained as a study trains one (SGD, random crops and flips) and its state dict is written to
`FOLDER/resnet20.safetensors`. What is there already is not made again. At the end the two environment variables are
printed that `studies/resnet20-cifar10-jpeg.yaml` and `studies/mobilenetv2-cifar10-jpeg.yaml` read.

The figures in `results` are of a copy of CIFAR-10 as JPEG files, and of another checkpoint: compare differences from
the float network, not accuracies.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file

from benchmarks.printing import say
from benchmarks.rows import RowsError
from mpsearch.files import replacing
from mpsearch.study import load_study
from mpsearch.task.load import load_task
from mpsearch.task.scoring import evaluate

STUDY = "resnet20-cifar10-jpeg"
DATA, CHECKPOINT = "MPSEARCH_CIFAR10_JPEG", "MPSEARCH_RESNET20"


def prepare(
    folder: Annotated[Path, typer.Option(help="folder for images and checkpoint")] = Path("data"),
    epochs: Annotated[int, typer.Option(help="epochs of the float network's training", min=1)] = 60,
) -> None:
    root = folder.absolute() / "cifar10"
    write_images(root, folder.absolute())
    checkpoint = folder.absolute() / "resnet20.safetensors"
    train(root, checkpoint, epochs)
    print(f"export {DATA}={shlex.quote(str(root))} {CHECKPOINT}={shlex.quote(str(checkpoint))}")


def write_images(root: Path, download: Path) -> None:
    """CIFAR-10 as PNG files; a folder that is there is whole, because it gets its name last."""
    if root.exists():
        return say(f"{root} is there already")
    say("CIFAR-10 is downloaded and written as PNG files")
    unfinished = root.with_name(f"{root.name}.unfinished")
    for split, dataset, positions in splits(download):
        for number in positions:
            image, label = dataset[number]
            place = unfinished / split / dataset.classes[label]
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{number:05}.png")
    unfinished.rename(root)
    return None


def splits(download: Path) -> list[tuple[str, Any, range]]:
    """Split, torchvision's data set, and which of its images the split has.

    Raises:
        RowsError: it cannot be downloaded.
    """
    from torchvision.datasets import CIFAR10

    try:
        train, test = (CIFAR10(str(download), train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise RowsError(
            f"torchvision cannot download CIFAR-10 ({error}): check the network, or put its cifar-10-python.tar.gz "
            f"into {download}"
        ) from None
    half = len(test) // 2
    return [("train", train, range(len(train))), ("val", test, range(half)), ("test", test, range(half, len(test)))]


def train(root: Path, checkpoint: Path, epochs: int) -> None:
    """Train the study's float network on these images and write its state dict."""
    if checkpoint.exists():
        return say(f"{checkpoint} is there already")
    os.environ |= {DATA: str(root), CHECKPOINT: str(checkpoint)}
    task = load_task(load_study(STUDY, ["task.checkpoint=null", f"task.float_epochs={epochs}"]).task)
    say(f"the float network is trained for {epochs} epochs, which takes hours on a CPU and minutes on a card")
    model = task.float_model()
    scores = ", ".join(f"{split} {100 * evaluate(task, model, split):.2f} %" for split in ("val", "test"))
    state: dict[str, torch.Tensor] = {name: value.contiguous() for name, value in model.state_dict().items()}
    with replacing(checkpoint) as temporary:
        save_file(state, temporary)
    print(f"{checkpoint}: {scores}")
    return None
