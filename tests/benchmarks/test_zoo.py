"""Networks of timm and transformers pass every stage, their ONNX file in a default session too; what the zoo runs."""

from __future__ import annotations

import json
import os
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.__main__ import main
from benchmarks.families import FAMILIES
from benchmarks.zoo import STAGES, check_within

MISSING = "needs mpsearch[targets,zoo]; `make test-all` installs it"

NETWORKS = {
    "timm": [
        "test_byobnet",
        "test_convnext",
        "test_efficientnet",
        "test_mambaout",
        "test_nfnet",
        "test_resnet",
        "test_vit",
        "lcnet_035",
        "mobilenetv3_small_050",
        "tf_mobilenetv3_small_075",
    ],
    "transformers": [
        "electra",
        "gpt2",
        "llama",
        "t5",
        "bart",
        "nystromformer",
        "swin",
        "segformer",
        "whisper",
        "wav2vec2",
    ],
}

ELSE = {
    "nystromformer": {
        "onnx": "refused: torch.onnx cannot export zoo, in 'nystromformer.encoder.layer.0.attention.self' "
        "(NystromformerSelfAttention): RuntimeError: Attempting to broadcast a dimension of length 8"
    },
}
"""What a stage says where it does not pass: how it begins."""

COMPUTED = (
    "conv1d: its weight is computed anew at each call: remove its parametrization, weight norm or pruning mask first"
)
FLOAT = {
    "test_nfnet": ["conv2d: its class ScaledStdConv2d has a forward of its own"],
    "tf_mobilenetv3_small_075": ["conv2d: its class Conv2dSame has a forward of its own"],
    "bart": ["embedding: its class BartLearnedPositionalEmbedding has a forward of its own"],
    "whisper": [
        "embedding: its class WhisperPositionalEmbedding has a forward of its own",
        "embedding: its weight is a constant: it wants no gradient (requires_grad is False)",
    ],
    "wav2vec2": [COMPUTED],
}
"""What a network runs that stays float, and why."""


@pytest.mark.slow
@pytest.mark.parametrize(("family", "network"), [(family, name) for family in NETWORKS for name in NETWORKS[family]])
def test_a_network_passes_every_stage_or_says_why_not(family: str, network: str, tmp_path: Path) -> None:
    if find_spec(family) is None or find_spec("onnxruntime") is None or find_spec("onnxscript") is None:
        pytest.skip(MISSING)
    results = tmp_path / "rows.jsonl"
    assert main(["zoo", "--family", family, "--only", network, "--results", str(results)]) == 0
    (row,) = map(json.loads, results.read_text().splitlines())
    assert row["network"] == network
    for stage in STAGES:
        outcome = ELSE.get(network, {}).get(stage, "ok")
        assert row[stage].startswith(outcome), f"{stage}: {row[stage]}"
        assert (row[stage] == "ok") == (outcome == "ok"), f"{stage}: {row[stage]}"
    stays = [text for text in row["float"] if not text.endswith("the model does not run it on the example input")]
    assert stays == FLOAT.get(network, [])


def test_a_network_beyond_its_limits_is_stopped_and_says_in_which_stage() -> None:
    class Slow(nn.Module):
        """It ends at first, and then no longer."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            while self.calls > 1:
                time.sleep(0.1)
            y: Tensor = self.fc(x)
            return y

    def make() -> tuple[nn.Module, Tensor]:
        return Slow().eval(), torch.ones(2, 2)

    row = check_within(make, STAGES, limit_s=1, limit_gb=float("inf"))
    assert row == {"inspect": "not measured: too large: over 1 s"}
    row = check_within(make, STAGES, limit_s=float("inf"), limit_gb=1e-3)
    assert row == {"inspect": "not measured: too large: over 0.001 GB"}


def test_within_its_limits_a_network_passes_and_a_crash_of_its_process_is_told() -> None:
    def make() -> tuple[nn.Module, Tensor]:
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.ones(2, 4)

    row = check_within(make, STAGES[:-1], limit_s=100, limit_gb=float("inf"))
    assert {row[stage] for stage in STAGES[:-1]} == {"ok"}
    row = check_within(lambda: os._exit(3), STAGES, limit_s=100, limit_gb=float("inf"))  # type: ignore[arg-type, return-value]
    assert row == {"inspect": "crash: its process ended with 3"}


def test_an_exact_name_stands_for_that_network_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> tuple[nn.Module, Tensor]:
        return nn.Linear(4, 4).eval(), torch.ones(2, 4)

    monkeypatch.setitem(FAMILIES, "names", lambda: dict.fromkeys(["vgg11", "vgg11_bn", "vgg13", "resnet"], make))
    results = tmp_path / "rows.jsonl"

    def networks(*arguments: str) -> list[str]:
        results.unlink(missing_ok=True)
        assert main(["zoo", "--family", "names", "--stages", "fold", "--results", str(results), *arguments]) == 0
        return [json.loads(line)["network"] for line in results.read_text().splitlines()]

    assert networks("--only", "vgg11") == ["vgg11"]
    assert networks("--only", "vgg1,resnet") == ["vgg11", "vgg11_bn", "vgg13", "resnet"]


def test_the_rest_are_the_networks_that_no_commit_has_such_stages_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> tuple[nn.Module, Tensor]:
        return nn.Linear(4, 4).eval(), torch.ones(2, 4)

    monkeypatch.setitem(FAMILIES, "names", lambda: dict.fromkeys(["a", "b", "c"], make))
    results = tmp_path / "rows.jsonl"
    earlier = [
        {"family": "names", "network": "a", "commit": "1", "inspect": "ok", "fold": "ok"},
        {"family": "names", "network": "a", "commit": "2", "inspect": "ok", "ptq": "ok"},
        {"family": "names", "network": "b", "commit": "1", "inspect": "ok", "fold": "ok"},
        {"family": "others", "network": "c", "commit": "1", "inspect": "ok", "fold": "ok", "ptq": "ok"},
    ]
    results.write_text("".join(json.dumps(row) + "\n" for row in earlier))
    assert main(["zoo", "--family", "names", "--stages", "fold,ptq", "--rest", "--results", str(results)]) == 0
    assert [json.loads(line)["network"] for line in results.read_text().splitlines()][4:] == ["b", "c"]
