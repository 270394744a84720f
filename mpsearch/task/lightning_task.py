"""`factory: lightning`: a LightningModule and its DataModule as a task.

    task:
      factory: lightning
      args: {module: "my_module:Lit", data: "my_module:Data", metric: top1}

The network that is searched is the LightningModule's `network` (an attribute, as `model`), or all of it: then its
`forward` answers. Trials distil, so that `training_step` is only needed to train the float network, once, by
Lightning's own Trainer; a `checkpoint` (a .ckpt of Lightning is one) makes that superfluous.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mpsearch.documents import explain
from mpsearch.errors import TaskError
from mpsearch.metric import find_metric
from mpsearch.shipped import shipped
from mpsearch.task.checkpoint import load_checkpoint
from mpsearch.task.comparing import KIND_OF_METRIC, output_tensor
from mpsearch.task.factory import call_factory
from mpsearch.task.own import OwnTask
from mpsearch.task.samples import seeded
from mpsearch.task.task import Split

LOADERS: Mapping[Split, str] = {"train": "train_dataloader", "val": "val_dataloader", "test": "test_dataloader"}
NETWORKS = ("model", "net", "network", "backbone")
"""Attributes in which LightningModules hold what they train, where `args.network` does not say it."""


class LightningArgs(BaseModel):
    """What `task.args` are for `factory: lightning`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    module: str = Field(description="module:class of the LightningModule")
    data: str = Field(description="module:class of the LightningDataModule")
    metric: str = Field(description="what scores are: the name of a common metric")
    module_args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the LightningModule")
    data_args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the LightningDataModule")
    network: str | None = Field(
        default=None, description="attribute with the network; default: model, net, ..., or all"
    )
    loss: str | None = Field(default=None, description="method (output, target) -> loss; default: the usual one")
    checkpoint: str | None = Field(default=None, description="file with trained weights; null: train by Lightning")
    epochs: int = Field(default=10, gt=0, description="of that training")


class LightningTask:
    """What OwnTask needs, of a LightningModule and a DataModule."""

    def __init__(self, args: LightningArgs) -> None:
        with seeded(0):
            self._module = call_factory("task.args.module", args.module, args.module_args)
            self._data = call_factory("task.args.data", args.data, args.data_args)
        for what, thing, method in (
            ("module", self._module, "training_step"),
            ("data", self._data, "train_dataloader"),
        ):
            if not hasattr(thing, method):
                raise TaskError(
                    f"task.args.{what}: {getattr(args, what)} gave a {type(thing).__name__} without {method}: expected "
                    f"a {'LightningModule' if what == 'module' else 'LightningDataModule'}"
                )
        self.metric = find_metric(args.metric, "task.args.metric")
        self.kind = KIND_OF_METRIC.get(self.metric.name)
        self.name = f"{type(self._module).__name__}/{type(self._data).__name__}"
        self._args, self._network = args, self._searched(args.network)
        self._loss = self._the_loss(args.loss)
        self._ready = False
        if args.checkpoint is None:
            self.train = self._train  # what OwnTask calls where a task has it
        else:
            load_checkpoint(self._network, shipped("checkpoints", args.checkpoint, TaskError))

    @property
    def code(self) -> Sequence[str]:
        """The source of what people wrote: other source, other weights."""
        return [inspect.getsource(type(thing)) for thing in (self._module, self._data)]

    def float_model(self) -> nn.Module:
        """The network."""
        return self._network

    def batches(self, split: Split) -> Any:
        """The DataModule's loader of a split."""
        if not self._ready:
            for stage, given in (("prepare_data", ()), ("setup", ("fit",)), ("setup", ("test",))):
                getattr(self._data, stage, lambda *_: None)(*given)
            self._ready = True
        method = getattr(self._data, LOADERS[split], None)
        loader = method() if callable(method) else None
        if not isinstance(loader, DataLoader):
            raise TaskError(
                f"{self.name}: {LOADERS[split]}() gave a {type(loader).__name__}, expected a DataLoader: train, val "
                "and test are needed"
            )
        return loader

    def loss(self, output: Any, target: Any) -> Tensor:
        """The loss of a batch, where trials do not distil."""
        return self._loss(output, target)

    def _searched(self, name: str | None) -> nn.Module:
        if name is not None:
            network = getattr(self._module, name, None)
            if not isinstance(network, nn.Module):
                others = ", ".join(key for key, _ in self._module.named_children())
                raise TaskError(f"task.args.network: the module has no network '{name}': it holds {others or 'none'}")
            return network
        held = [getattr(self._module, key, None) for key in NETWORKS]
        whole: nn.Module = self._module
        return next((network for network in held if isinstance(network, nn.Module)), whole)

    def _the_loss(self, name: str | None) -> Callable[[Any, Any], Tensor]:
        if name is not None:
            loss = getattr(self._module, name, None)
            if not callable(loss):
                raise TaskError(f"task.args.loss: the module has no method '{name}'")
            return loss  # type: ignore[no-any-return]
        if self.kind in ("classification", "segmentation"):
            return lambda output, target: F.cross_entropy(output_tensor(output), target)
        if self.kind == "language":
            return lambda output, target: F.cross_entropy(output_tensor(output).flatten(0, -2), target.flatten())
        if self.kind == "regression":
            return lambda output, target: F.mse_loss(output_tensor(output), target)
        raise TaskError(
            f"task.args.loss: nothing is known of the loss that goes with {self.metric.name}: name a method of the "
            "module (output, target) -> loss"
        )

    def _train(self, model: nn.Module) -> None:
        """Train the whole LightningModule, which holds the network, by Lightning's Trainer."""
        library = next(
            root
            for kind in type(self._module).__mro__
            if (root := kind.__module__.partition(".")[0]) in ("lightning", "pytorch_lightning")
        )
        pl = importlib.import_module("lightning.pytorch" if library == "lightning" else library)
        logging.getLogger("lightning.pytorch" if library == "lightning" else library).setLevel(logging.WARNING)
        trainer = pl.Trainer(
            max_epochs=self._args.epochs,
            accelerator="auto" if torch.cuda.is_available() else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )
        self._module.train()
        trainer.fit(self._module, datamodule=self._data)
        self._module.cpu()
        self._module.trainer = None  # which cannot be copied with the network


def lightning_task(args: Mapping[str, Any]) -> OwnTask:
    """The task of `factory: lightning`, with `task.args`.

    Raises:
        TaskError: an argument is missing or unknown, a class cannot be built, or its checkpoint is of another network.
    """
    try:
        checked = LightningArgs.model_validate(args)
    except ValidationError as error:
        raise TaskError("task.args cannot be used:\n" + explain(error, LightningArgs, "task.args")) from None
    task = LightningTask(checked)
    return OwnTask(task, ["lightning", dict(args), *task.code])
