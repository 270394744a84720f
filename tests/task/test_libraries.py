"""Networks of other people by name: timm, torchvision, transformers."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch

from mpsearch.errors import TaskError
from mpsearch.study import TaskSpec
from mpsearch.task.libraries import Needs
from mpsearch.task.load import load_task
from mpsearch.task.models import build_network

CLASSES = Needs("classification", 5, 3, (32, 32))
LANGUAGE = Needs("language", vocabulary=17, over="text")
TINY = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}


def network(model: str, needs: Needs = CLASSES, **args: Any) -> Any:
    spec = TaskSpec(model=model, data={"kind": "digits"}, model_args=args)
    return build_network(spec, needs)


def test_torchvision_networks_of_every_kind_are_known_by_name() -> None:
    classifier = network("torchvision:mobilenet_v2", width_mult=0.25).module.eval()
    assert classifier(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    segmenter = network("torchvision:lraspp_mobilenet_v3_large", Needs("segmentation", 4, 3)).module.eval()
    assert segmenter(torch.zeros(1, 3, 32, 32))["out"].shape == (1, 4, 32, 32)
    detector = network("torchvision:ssdlite320_mobilenet_v3_large", Needs("detection", 2, 3)).module
    assert detector.head.classification_head.num_columns == 3  # with the background


@pytest.mark.parametrize(
    ("model", "needs", "message"),
    [
        ("torchvision:resnet_18", CLASSES, "torchvision has no network 'resnet_18': did you mean resnet18"),
        ("torchvision:ssd300_vgg16", CLASSES, "ssd300_vgg16 finds boxes, and the data asks for classification"),
        (
            "torchvision:resnet18",
            Needs("detection", 2, 3),
            "resnet18 does not find boxes, and the data asks for detection",
        ),
    ],
)
def test_what_torchvision_cannot_do_is_told(model: str, needs: Needs, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        network(model, needs)


def test_arguments_of_a_library_are_named_in_the_error() -> None:
    with pytest.raises(TaskError, match=r"torchvision:resnet18 cannot be built with {'widht': 3}: TypeError: .*widht"):
        network("torchvision:resnet18", widht=3)


@pytest.mark.parametrize(("model", "library"), [("timm:resnet18", "timm"), ("hf:GPT2LMHeadModel", "transformers")])
def test_a_library_that_is_missing_names_what_to_install(
    model: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(TaskError, match=rf"needs {library} .*pip install 'mpsearch\[zoo\]'"):
        network(model)


# ------------------------------------------------------------------------------------------------------------- timm


def test_a_network_of_timm_gets_the_classes_and_channels_of_the_data() -> None:
    pytest.importorskip("timm")
    built = network("timm:test_efficientnet", Needs("classification", 5, 1, (32, 32)))
    assert built.weights is None
    assert built.module.eval()(torch.zeros(2, 1, 32, 32)).shape == (2, 5)
    with pytest.raises(TaskError, match="timm has no network 'test_eficientnet': did you mean test_efficientnet"):
        network("timm:test_eficientnet")
    with pytest.raises(TaskError, match="timm's networks classify, and the data asks for segmentation"):
        network("timm:test_efficientnet", Needs("segmentation", 5, 3))


def test_a_network_of_timm_is_trained_on_a_folder_of_images(make_folder: Any) -> None:
    pytest.importorskip("timm")
    root = make_folder(per_class=6, size=(32, 32))
    data = {"kind": "imagefolder", "root": str(root), "augment": False}
    task = load_task(TaskSpec(model="timm:test_efficientnet", data=data, float_epochs=2), workers=1)
    x = task.calibration_input(2)
    assert task.float_model()(x).shape == (2, 2)
    assert task.name == "test_efficientnet/images"


# ----------------------------------------------------------------------------------------------------- transformers


def test_a_class_of_transformers_gets_what_the_data_decides() -> None:
    pytest.importorskip("transformers")
    model = network("hf:GPT2LMHeadModel", LANGUAGE, **TINY).module.eval()
    assert model.config.vocab_size == 17
    assert model(torch.zeros(1, 4, dtype=torch.long)).logits.shape == (1, 4, 17)
    auto = network("hf:AutoModelForCausalLM", LANGUAGE, model_type="gpt2", **TINY).module
    assert type(auto) is type(model)
    image = network("hf:ViTForImageClassification", **VIT).module
    assert (image.config.image_size, image.config.num_labels) == (32, 5)
    assert image(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 5)


VIT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        ("hf:GPT2LMHeadModle", {}, "has no network 'GPT2LMHeadModle' .*did you mean GPT2LMHeadModel"),
        (
            "hf:GPT2LMHeadModel",
            {"n_layers": 1},
            "GPT2Config of GPT2LMHeadModel has no 'n_layers': did you mean n_layer",
        ),
        ("hf:AutoModelForCausalLM", {"model_type": "gtp2"}, "needs a `model_type`, got 'gtp2': did you mean gpt2"),
        ("hf:./nowhere", {}, "no folder 'nowhere' in "),
        ("hf:/nowhere/at/all", {}, "no folder '/nowhere/at/all'"),
    ],
)
def test_what_transformers_does_not_have_is_told(model: str, args: Any, message: str) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(TaskError, match=message):
        network(model, LANGUAGE, **args)


def test_a_folder_of_save_pretrained_gives_trained_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    saved = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=17, **TINY)).eval()
    saved.save_pretrained(tmp_path / "net")
    built = network(f"hf:{tmp_path / 'net'}", LANGUAGE)
    assert built.weights == f"hf:{tmp_path / 'net'}"
    x = torch.arange(4).unsqueeze(0)
    assert torch.equal(built.module.eval()(x).logits, saved(x).logits)


def test_a_head_for_other_classes_is_trained_anew(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(image_size=32, num_labels=3, **VIT)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    whole, other = (network(f"hf:{tmp_path}", Needs("classification", n, 3, (32, 32))) for n in (3, 5))
    assert whole.weights is not None
    assert other.weights is None
    assert other.module.classifier.out_features == 5


def test_weights_that_are_pickled_are_not_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    saved = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=17, **TINY))
    saved.config.save_pretrained(tmp_path)
    torch.save(saved.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(TaskError, match=r"no \.safetensors file, and nothing else is read"):
        network(f"hf:{tmp_path}", LANGUAGE)


@pytest.mark.parametrize(
    "argument", [{"trust_remote_code": True}, {"use_safetensors": False}, {"weights_only": False}, {"config": "other"}]
)
def test_a_study_cannot_have_code_beside_the_weights_run(tmp_path: Path, argument: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(TaskError, match=f"'{next(iter(argument))}' is not for a study to say"):
        network(f"hf:{tmp_path}", LANGUAGE, **argument)


def test_code_beside_the_weights_is_not_run(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    saved = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=17, **TINY))
    saved.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    auto = '"model_type": "strange", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}'
    (tmp_path / "config.json").write_text(config.replace('"model_type": "gpt2"', auto))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(TaskError, match="cannot be built"):
        network(f"hf:{tmp_path}", LANGUAGE)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("model", "needs", "args", "instead"),
    [
        ("hf:org/net", LANGUAGE, {}, "task.model: hf:FOLDER"),
        ("timm:resnet18", CLASSES, {"pretrained": True}, "task.checkpoint"),
    ],
)
def test_a_hub_that_does_not_answer_is_told_with_what_to_do(
    silent_hub: str, model: str, needs: Needs, args: Any, instead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers" if model.startswith("hf") else "timm")
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))  # nothing is stored
    with pytest.raises(TaskError, match=rf"{silent_hub} does not answer \(.*timed out.*give it as {instead}"):
        network(model, needs, **args)
    assert constants.HF_HUB_OFFLINE is True  # what is asked next fails at once, or is stored


def test_what_is_stored_is_used_without_the_hub(
    silent_hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    import huggingface_hub.constants as constants

    saved = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=17, **TINY)).eval()
    stored = tmp_path / "models--org--net"
    saved.save_pretrained(stored / "snapshots" / "0123")
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    x = torch.arange(4).unsqueeze(0)
    assert torch.equal(network("hf:org/net", LANGUAGE).module.eval()(x).logits, saved(x).logits)


def test_weights_of_torchvision_that_cannot_be_downloaded_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", _unreachable)
    with pytest.raises(TaskError, match=r"resnet18 cannot be built .*unreachable.*state dict as task\.checkpoint"):
        network("torchvision:resnet18", Needs("classification", 1000, 3), weights="DEFAULT")


def _unreachable(*_: Any, **__: Any) -> None:
    raise urllib.error.URLError("Network is unreachable")
