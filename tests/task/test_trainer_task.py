"""A Trainer of Hugging Face as a task; without transformers where nothing of theirs is asked for."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import mpsearch
from torch import Tensor, nn

from mpsearch.errors import TaskError
from mpsearch.study import TaskSpec
from mpsearch.task.load import load_task
from mpsearch.task.scoring import measure

pytestmark = pytest.mark.study


@dataclass
class Output:
    """As those of transformers, to whoever reads attributes."""

    logits: Tensor
    loss: Tensor | None = None


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, points: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.linear(points)
        return Output(logits, None if labels is None else nn.functional.cross_entropy(logits, labels))


class ToyForCausalLM(nn.Module):
    """Knows that each token is followed by the next one of five."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Embedding(5, 5)
        self.out = nn.Linear(5, 5, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(5))
            self.out.weight.copy_(9 * torch.eye(5).roll(1, 0))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        return Output(self.out(self.head(input_ids)))


class Trainer:
    """What a Trainer has that a task needs."""

    def __init__(self, model: nn.Module, train: Any, held: Any) -> None:
        self.model, self.train_dataset, self.eval_dataset = model, train, held
        self.trained = 0

    def data_collator(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}

    def train(self) -> None:
        self.trained += 1
        optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        batch = self.data_collator(self.train_dataset)
        for _ in range(60):
            optimizer.zero_grad()
            self.model(**batch).loss.backward()
            optimizer.step()


def points(count: int, seed: int) -> list[dict[str, Any]]:
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    return [{"points": row, "labels": (row.sum() > 0).long()} for row in x]


def classifier(split: bool = False, **names: Any) -> Trainer:
    torch.manual_seed(0)
    held = {"validation": points(20, 1), "test": points(10, 2)} if split else points(30, 1)
    return Trainer(Classifier(), points(64, 0), names.get("held", held))


def language() -> Trainer:
    rows = [{"input_ids": (torch.arange(6) + i) % 5, "labels": (torch.arange(6) + i) % 5} for i in range(8)]
    return Trainer(ToyForCausalLM(), rows, rows)


def first_tokens(count: int, seed: int) -> list[dict[str, Any]]:
    ids = torch.randint(1, 12, (count, 6), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": (row[0] > 6).long()} for row in ids]


def real(folder: str) -> Any:
    """A Trainer of transformers, for whether the first token is large."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=2
    )
    args = transformers.TrainingArguments(
        folder,
        num_train_epochs=6,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    model = transformers.BertForSequenceClassification(config)
    return transformers.Trainer(model, args, train_dataset=first_tokens(256, 0), eval_dataset=first_tokens(128, 1))


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trainer_of_tests", sys.modules[__name__])


def task(function: str = "classifier", **args: Any) -> Any:
    usual = {"trainer": f"trainer_of_tests:{function}", "metric": "top1"}
    return load_task(TaskSpec(factory="trainer", args=usual | args))


def test_the_trainer_trains_the_float_network_and_its_data_are_split() -> None:
    of = task()
    model = of.float_model()
    measured = measure(of, model, "val")
    assert measured.score > 0.9
    assert measured.values is not None
    assert len(measured.values) == 15  # every other one of 30
    x, target = next(of.train_batches(8, 1, 0))
    assert of.loss(model(**x), target) < 0.3
    assert len(measure(task(trainer_args={"split": True}), model, "val").values) == 20


def test_a_language_model_is_scored_by_the_next_token() -> None:
    of = task("language", metric="perplexity", checkpoint=None, shifted=None)
    model = ToyForCausalLM()
    assert measure(of, model, "val").score == pytest.approx(1.0005, abs=1e-3)
    wrong = task("language", metric="perplexity", shifted=False)
    assert measure(wrong, model, "val").score > 100


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"trainer": "trainer_of_tests:points"}, "raised TypeError"),
        ({"trainer_args": {"held": {"val": [], "other": []}}}, "expected entries val and test"),
        ({"labels": "answers"}, "a batch has no 'answers': it holds points, labels"),
        ({"metric": "top0"}, "top0"),
        ({"trainers": "x"}, "trainers"),
    ],
)
def test_what_cannot_be_used_is_said(args: dict[str, Any], message: str) -> None:
    def used() -> None:
        measure(task(**args), Classifier(), "val")

    with pytest.raises(TaskError, match=message):
        used()


def test_something_else_is_no_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "classifier", Classifier)
    with pytest.raises(TaskError, match="gave a Classifier without model, train_dataset, eval_dataset, data_collator"):
        task()


@pytest.mark.slow
def test_a_trainer_of_transformers_is_searched_and_exported(tmp_path: Path) -> None:
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package, reason="needs mpsearch[trainer]; `make test-all` installs it")
    args = {"trainer": "trainer_of_tests:real", "metric": "top1", "trainer_args": {"folder": str(tmp_path / "trainer")}}
    study = {
        "name": "trainer",
        "task": {"factory": "trainer", "args": args},
        "space": "uniform",
        "warm_start": {"method": "none", "ilp": False},
        "search": {"prescreen": 0, "trials": 3, "concurrency": 1},
        "trial": {"steps": 8, "batch_size": 16, "compile": False, "calibration_samples": 32},
        "storage": "none",
        "engine": {"address": "none"},
    }
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    for step in (("run", "study.yaml", "--out", "run"), ("export", "run", "--to", "native", "--out", "native")):
        done = mpsearch(*step, cwd=tmp_path)
        assert done.returncode == 0, f"{step}: {done.stderr}"
    records = [json.loads(line) for line in (tmp_path / "run" / "trials.jsonl").read_text().splitlines()]
    assert [record["state"] for record in records] == ["complete"] * 3
    assert max(record["score"] for record in records) > 0.9
    verified = json.loads((tmp_path / "native" / "precision.json").read_text())["verified"]
    assert verified["same_answers"] == verified["samples"] > 0
    names = json.loads((tmp_path / "native" / "precision.json").read_text())["layers"]
    assert "bert.embeddings.word_embeddings" in names
