"""Text: language models and classifiers of sequences."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpsearch.errors import StudyError, TaskError
from mpsearch.study import TaskSpec, parse_study
from mpsearch.task.load import load_task
from mpsearch.task.scoring import measure


class NextByte(nn.Module):
    """Bytes `(n, steps)` -> logits `(n, steps, 256)`, from each byte alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(256, 16), nn.Linear(16, 256)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embedding(input_ids))  # type: ignore[no-any-return]


class Topic(nn.Module):
    """Bytes and their mask -> logits `(n, 2)`: the mean of what is no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(256, 16), nn.Linear(16, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        weights = attention_mask.unsqueeze(2) / attention_mask.sum(dim=1).reshape(-1, 1, 1)
        return self.head((self.embedding(input_ids) * weights).sum(dim=1))  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "networks_of_text", __import__("sys").modules[__name__])


def task(model: str = "NextByte", metric: Any = None, epochs: int = 1, **data: Any) -> Any:
    return load_task(TaskSpec(model=f"networks_of_text:{model}", data=data, metric=metric, float_epochs=epochs))


def test_a_block_is_followed_by_the_next_token_and_splits_keep_the_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(chr(33 + i % 90) for i in range(400)))
    of = task(kind="text", root=str(tmp_path), length=8)
    assert [of._of(split).count for split in ("train", "val", "test")] == [39, 5, 5]
    x, y = of._of("test").take([4], seed=0)
    assert bytes(x[0].tolist()) == (tmp_path / "a.txt").read_bytes()[384:392]
    assert torch.equal(x[0, 1:], y[0, :-1])


def test_a_language_model_learns_text_and_is_scored_by_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcd" * 2400)
    of = task(metric="bits_per_byte", epochs=30, kind="text", root=str(tmp_path / "a.txt"), length=16)
    assert measure(of, of.float_model(), "val").score < 0.3
    plain = task(epochs=30, kind="text", root=str(tmp_path / "a.txt"), length=16)
    assert plain.metric.name == "perplexity"
    assert 1 <= measure(plain, plain.float_model(), "val").score < 2**0.3


def test_files_that_are_named_as_splits_are_used_as_they_are(tmp_path: Path) -> None:
    for name, letter in (("train", "a"), ("validation", "b"), ("test", "c")):
        (tmp_path / f"{name}.txt").write_text(letter * 100)
    of = task(kind="text", root=str(tmp_path), length=8)
    letters = {split: chr(int(next(iter(of._of(split).take([0], 0)))[0, 0])) for split in ("train", "val", "test")}
    assert letters == {"train": "a", "val": "b", "test": "c"}
    (tmp_path / "more.txt").write_text("d")
    with pytest.raises(TaskError, match=r"holds splits and also more\.txt"):
        task(kind="text", root=str(tmp_path), length=8)


def test_the_help_of_python_is_text_without_a_file() -> None:
    of = task(kind="pydoc", length=64)
    assert of._of("train").count > 3000
    assert of.name == "NextByte/pydoc"


# ---------------------------------------------------------------------------------------------------------- tables

ROWS = [{"text": "xyxyz"[i % 3 :] + "x" * i, "label": "late"} for i in range(10)]
ROWS += [{"text": "abab" + "b" * i, "label": "early"} for i in range(10)]


def write(folder: Path, kind: str, rows: Any = ROWS) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        path.write_text("text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in rows))
    else:
        import pyarrow as pa

        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "arrow"])
def test_sequences_of_a_table_are_classified(tmp_path: Path, kind: str) -> None:
    of = task("Topic", epochs=40, kind=kind, root=str(write(tmp_path, kind)), label="label", length=12)
    assert of.metric.name == "top1"
    batch, _ = next(of.train_batches(16, 1, 0))
    assert batch["attention_mask"].sum(dim=1).min() < 12  # padded
    assert (batch["attention_mask"] == (batch["input_ids"] != 0)).all()
    assert measure(of, of.float_model(), "val").score == 1.0


def test_a_column_of_a_table_is_text_for_a_language_model(tmp_path: Path) -> None:
    of = task(kind="jsonl", root=str(write(tmp_path, "jsonl")), length=4)
    assert of.kind == "language"
    x, _ = of._of("train").take([0], 0)
    assert bytes(x[0].tolist()) == b"xyxy"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"label": "lable"}, r"task\.data\.label: a row of .* has no 'lable': did you mean 'label'"),
        ({"text": "txt", "label": "label"}, r"task\.data\.text: a row of .* has no 'txt': did you mean 'text'"),
        ({"root": "nowhere.jsonl"}, "no file or folder 'nowhere.jsonl' in "),
        ({"length": 4000}, "no blocks of 4000 tokens in"),
        ({"tokenizer": "nowhere"}, r"no folder 'nowhere' in .*or write bytes|needs transformers"),
    ],
)
def test_what_is_wrong_with_a_table_is_told(tmp_path: Path, keys: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        task(**{"kind": "jsonl", "root": str(write(tmp_path, "jsonl")), "length": 4} | keys)


def test_lines_that_are_no_objects_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n[1]\n')
    with pytest.raises(TaskError, match="line 2: expected an object, got list"):
        task(kind="jsonl", root=str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(TaskError, match="line 2, is not JSON"):
        task(kind="jsonl", root=str(tmp_path / "a.jsonl"))


def test_lines_of_a_table_end_where_they_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\u2028b"}\n' * 40, encoding="utf-8")
    (tmp_path / "a.csv").write_text("text\n" + '"a\u2028\nb"\n' * 40, encoding="utf-8")
    for kind, text in (("jsonl", "a\u2028b"), ("csv", "a\u2028\nb")):
        x, _ = task(kind=kind, root=str(tmp_path / f"a.{kind}"), length=len(text.encode()))._of("train").take([0], 0)
        assert bytes(x[0].tolist()).decode() == text


def test_a_large_vocabulary_is_scored_in_small_batches() -> None:
    of = task(kind="pydoc", length=64)
    assert of._numbers("val") == 64 * 256 // 16


def test_a_data_set_of_datasets_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(TaskError, match=r"needs datasets .*pip install 'mpsearch\[text\]'"):
        task(kind="hf_dataset", root="somewhere")


def test_a_folder_of_datasets_is_read_with_its_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {"train": ROWS[:7] + ROWS[10:17], "validation": ROWS[7:9] + ROWS[17:19], "test": [ROWS[9], ROWS[19]]}
    datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in parts.items()}).save_to_disk(
        tmp_path
    )
    of = task("Topic", kind="hf_dataset", root=str(tmp_path), label="label", length=8)
    assert [of._of(split).count for split in ("train", "val", "test")] == [14, 4, 2]


def test_a_data_set_on_a_hub_that_does_not_answer_is_told_with_what_to_do(silent_hub: str) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(TaskError, match=rf"'org/set' .*{silent_hub} does not answer .*save it .* by save_to_disk"):
        task("Topic", kind="hf_dataset", root="org/set", label="label", length=8)


def test_a_network_for_another_kind_of_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"cannot take a sample of the data 'pydoc'|expected \(1, 8, 256\)"):
        task("Topic", kind="pydoc", length=8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "text"}, "task.data: give `root`"),
        ({"kind": "text", "root": "x", "label": "y"}, "text has no columns: leave `label` out"),
        ({"kind": "csv", "root": "x", "lable": "y"}, "task.data.lable: no such key; did you mean 'label'"),
        ({"kind": "csv", "root": "x", "config": "y"}, "`config` is for kind: hf_dataset"),
    ],
)
def test_a_study_of_text_is_checked(data: Any, message: str) -> None:
    with pytest.raises(StudyError) as error:
        parse_study({"name": "a", "space": "uniform", "task": {"model": "a:b", "data": data}})
    assert message in str(error.value)


def test_paths_of_text_become_absolute_and_names_on_the_hub_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("words", "net"):
        (tmp_path / name).mkdir()
    (tmp_path / "a.jsonl").write_text("{}")

    def absolute(model: str, **data: Any) -> Any:
        return parse_study({"name": "a", "space": "uniform", "task": {"model": model, "data": data}}).absolute().task

    of = absolute("hf:net", kind="jsonl", root="a.jsonl", tokenizer="words")
    assert of.model == f"hf:{tmp_path / 'net'}"
    assert (of.data.root, of.data.tokenizer) == (str(tmp_path / "a.jsonl"), str(tmp_path / "words"))
    hub = absolute("hf:org/net", kind="hf_dataset", root="org/set")
    assert (hub.model, hub.data.root, hub.data.tokenizer) == ("hf:org/net", "org/set", "bytes")


# ------------------------------------------------------------------------------------------------------- tokenizers


def words(folder: Path) -> Path:
    """A tokenizer of four words, as transformers saves one."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"[UNK]": 0, "red": 1, "green": 2, "blue": 3}, unk_token="[UNK]")
    of = tokenizers.Tokenizer(model)
    of.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=of, unk_token="[UNK]").save_pretrained(folder / "words")
    return folder / "words"


def test_a_tokenizer_of_a_folder_is_used_and_bytes_are_counted(tmp_path: Path) -> None:
    tokenizer = words(tmp_path)
    (tmp_path / "a.txt").write_text("red green blue " * 200)
    of = load_task(
        TaskSpec(
            model="hf:GPT2LMHeadModel",
            model_args={"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8},
            data={"kind": "text", "root": str(tmp_path / "a.txt"), "tokenizer": str(tokenizer), "length": 8},
            metric="bits_per_byte",
        )
    )
    model = of._own.network
    assert model.config.vocab_size == 4
    nats = math.log(measure(of_perplexity(of), model, "val").score)
    assert measure(of, model, "val").score == pytest.approx(nats / math.log(2) / 5, rel=1e-3)  # 15 bytes for 3 words


def of_perplexity(of: Any) -> Any:
    spec = of._own.spec
    return load_task(spec.model_copy(update={"metric": "perplexity"}))


@pytest.mark.parametrize("model", ["GPT2ForSequenceClassification", "BertForSequenceClassification"])
def test_a_classifier_of_transformers_does_not_see_padding(tmp_path: Path, model: str) -> None:
    pytest.importorskip("transformers")
    gpt = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    bert = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    data = {"kind": "csv", "root": str(write(tmp_path, "csv")), "label": "label", "length": 16}
    of = load_task(TaskSpec(model=f"hf:{model}", model_args=gpt if "GPT2" in model else bert, data=data))
    batch, _ = of._of("train").take([0, 1, 2, 3], seed=0)
    network = of._own.network.requires_grad_(False)
    length = int(batch["attention_mask"][0].sum())
    assert length < 16
    short = network(**{name: tensor[:1, :length] for name, tensor in batch.items()}).logits
    assert torch.allclose(network(**batch).logits[:1], short, atol=1e-5)
