"""Networks of timm and transformers pass every stage, their ONNX file in a default session too."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.zoo import STAGES

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


@pytest.fixture(scope="module", params=NETWORKS)
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    family: str = request.param
    if find_spec(family) is None or find_spec("onnxruntime") is None or find_spec("onnxscript") is None:
        pytest.skip(MISSING)
    results: Path = tmp_path_factory.mktemp("zoo") / "rows.jsonl"
    only = ",".join(NETWORKS[family])
    assert main(["zoo", "--family", family, "--only", only, "--results", str(results)]) == 0
    made = {row["network"]: row for row in map(json.loads, results.read_text().splitlines())}
    assert set(NETWORKS[family]) <= set(made)
    return {name: made[name] for name in NETWORKS[family]}


@pytest.mark.slow
def test_every_network_passes_every_stage_or_says_why_not(rows: dict[str, dict[str, Any]]) -> None:
    for name, row in rows.items():
        for stage in STAGES:
            outcome = ELSE.get(name, {}).get(stage, "ok")
            assert row[stage].startswith(outcome), f"{name}, {stage}: {row[stage]}"
            assert (row[stage] == "ok") == (outcome == "ok"), f"{name}, {stage}: {row[stage]}"
        stays = [text for text in row["float"] if not text.endswith("the model does not run it on the example input")]
        assert stays == FLOAT.get(name, []), name
