"""Text for language models and for classifiers of sequences: files, tables, data sets of `datasets`, Python's own help.

A language model sees blocks of `length` tokens and says the next one at each; files of plain text are cut where they
are, in order, so that val and test are the ends of the text. A classifier sees one text a row, padded to `length`.

`tokenizer: bytes` needs no file: a token is a byte of UTF-8, and padding is byte 0.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from mpsearch.cache import content_key
from mpsearch.errors import TaskError, nearest
from mpsearch.files import require_regular, with_home
from mpsearch.graph.inputs import arguments
from mpsearch.metric import METRICS
from mpsearch.shipped import where
from mpsearch.study import TaskSpec, TextSpec
from mpsearch.task.cache import cached_tensors
from mpsearch.task.comparing import output_tensor
from mpsearch.task.hub import hub_problem
from mpsearch.task.imagefolder import split_meant, split_of
from mpsearch.task.libraries import Needs, imported
from mpsearch.task.made import docstrings
from mpsearch.task.own import OwnTask
from mpsearch.task.scores import nats
from mpsearch.task.splitting import divided
from mpsearch.task.study_task import StudyTask
from mpsearch.task.task import Split

logger = logging.getLogger(__name__)

TOKENS = 1  # raise when blocks are cut otherwise: entries of the cache are made again

Row = Mapping[str, Any]


class Tokenizer(Protocol):
    """What text becomes numbers by."""

    name: str
    vocabulary: int
    padding: int

    def encode(self, text: str) -> Sequence[int]:
        """The tokens of a text."""
        ...


class Bytes:
    """A token is a byte of UTF-8."""

    name, vocabulary, padding = "bytes", 256, 0

    def encode(self, text: str) -> Sequence[int]:
        """As `Tokenizer.encode`."""
        return text.encode("utf-8", errors="replace")


class FromFolder:
    """A tokenizer that transformers reads from a folder, without code of others."""

    def __init__(self, folder: str) -> None:
        transformers = imported("transformers", f"task.data.tokenizer '{folder}'", "zoo")
        path = with_home(folder)
        if not path.is_dir():
            raise TaskError(
                f"task.data.tokenizer: no folder {where(path)}: give one that a tokenizer's save_pretrained wrote, or "
                "write bytes"
            )
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # what a damaged folder raises depends on the damage
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TaskError(f"task.data.tokenizer: {where(path)} cannot be read: {said[:300]}") from None
        self.name = path.resolve().name
        self.vocabulary = len(self._tokenizer)
        self.padding = self._tokenizer.pad_token_id or 0
        self.content = content_key([path.name, *sorted((p.name, p.stat().st_size) for p in path.iterdir())])

    def encode(self, text: str) -> Sequence[int]:
        """As `Tokenizer.encode`; with the special tokens that the tokenizer puts around a text."""
        ids: list[int] = self._tokenizer(text, truncation=False, verbose=False)["input_ids"]
        return ids


@dataclass(frozen=True)
class Corpus:
    """Tokenized text of each split: inputs `(n, length)`, targets `(n, length)`, or classes `(n,)` with their names."""

    inputs: Mapping[Split, Tensor]
    targets: Mapping[Split, Tensor]
    counts: Mapping[Split, Tensor]  # (n,) tokens of a row that are no padding
    classes: Sequence[str]
    bytes_per_token: float
    key: str


class LanguageTask(StudyTask):
    """The next token: perplexity, or bits per byte."""

    def __init__(self, spec: TaskSpec, name: str, corpus: Corpus, vocabulary: int) -> None:
        self._corpus = corpus
        needs = Needs("language", vocabulary=vocabulary, over="text")
        self.sample_numbers = corpus.inputs["train"].shape[1] * vocabulary // 16
        super().__init__(spec, name, corpus.key, needs)
        if self.metric is METRICS["bits_per_byte"] and not hasattr(self, "score"):
            self.score = self._bits_per_byte  # a token is not a byte with every tokenizer

    def batches(self, split: Split) -> Iterable[Any]:
        """As `StudyTask.batches`: tokens `(n, length)` and the next ones `(n, length)`."""
        return DataLoader(TensorDataset(self._corpus.inputs[split], self._corpus.targets[split]), batch_size=16)

    def loss(self, output: Any, target: Any) -> Tensor:
        """The mean cross-entropy of the next token, nats."""
        return F.cross_entropy(output_tensor(output).flatten(0, 1), target.flatten())

    def float_batch(self) -> int:
        """As `StudyTask.float_batch`: blocks, of many tokens each."""
        return 16

    def _bits_per_byte(self, output: Any, target: Any) -> Tensor:
        return nats(output, target) / (self._corpus.bytes_per_token * float(np.log(2)))

    def fits(self, output: Any) -> bool:
        """As `StudyTask.fits`."""
        logits = output_tensor(output)
        shape = (1, self._corpus.inputs["train"].shape[1])
        enough = isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[2] >= (self.needs.vocabulary or 0)
        return enough and logits.shape[:2] == shape

    def expected(self) -> str:
        """As `StudyTask.expected`."""
        length = self._corpus.inputs["train"].shape[1]
        return f"(1, {length}, {self.needs.vocabulary}) for blocks of {length} tokens of the vocabulary"


class SequencesTask(StudyTask):
    """The class of a text."""

    def __init__(self, spec: TaskSpec, name: str, corpus: Corpus, tokenizer: Tokenizer) -> None:
        self._corpus = corpus
        there = len(corpus.classes)
        classes = spec.num_classes or there
        if classes < there:
            raise TaskError(
                f"task.num_classes: got {classes}, the data has {there} classes: leave it out, or give as many"
            )
        needs = Needs(
            "classification", classes, vocabulary=tokenizer.vocabulary, padding=tokenizer.padding, over="text"
        )
        super().__init__(spec, name, corpus.key, needs)
        self._masked = "attention_mask" in _named(self.network)

    def batches(self, split: Split) -> Iterable[Any]:
        """As `StudyTask.batches`: tokens `(n, length)`, with their mask where the network takes one; classes `(n,)`."""
        ids, counts = self._corpus.inputs[split], self._corpus.counts[split]
        x: Any = ids
        if self._masked:
            x = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < counts.unsqueeze(1)).long()}
        return [(x, self._corpus.targets[split])]


def _named(network: Any) -> Mapping[str, Any]:
    """The names of a network's inputs among those of a text."""
    names = dict.fromkeys(("input_ids", "attention_mask"), 0)
    return arguments(network, names)[1]


def text_task(spec: TaskSpec, workers: int | None = None) -> OwnTask:
    """The task of a study whose data is text.

    Raises:
        TaskError: files, columns or tokenizer are missing, the text is too short, or the network does not fit.
    """
    data = spec.data
    assert isinstance(data, TextSpec)
    tokenizer: Tokenizer = Bytes() if data.tokenizer == "bytes" else FromFolder(data.tokenizer)
    name = with_home(data.root).resolve().name if data.root else data.kind
    if data.label is not None:
        return SequencesTask(spec, name, _sequences(data, tokenizer), tokenizer).task()
    return LanguageTask(spec, name, _blocks(data, tokenizer), tokenizer.vocabulary).task()


def _blocks(data: TextSpec, tokenizer: Tokenizer) -> Corpus:
    """The text of each split in blocks of `length` tokens, each with the ones that follow."""
    texts = {split: list(part) for split, part in _texts(data).items()}
    key = _key(data, tokenizer, texts)

    def make() -> dict[str, Tensor]:
        made: dict[str, Tensor] = {"bytes": torch.tensor([sum(len(t.encode()) for p in texts.values() for t in p)])}
        for split, part in texts.items():
            pieces = [
                np.frombuffer(ids, np.uint8) if isinstance(ids, bytes) else ids for ids in map(tokenizer.encode, part)
            ]
            made[split] = torch.from_numpy(np.concatenate(pieces).astype(np.int32))
        return made

    streams, _ = cached_tensors(f"tokens-{key}", make)
    tokens = {split: streams[split] for split in texts}
    per_token = float(streams["bytes"]) / max(1, sum(map(len, tokens.values())))
    if list(tokens) == ["train"]:
        blocks = {"train": range((len(tokens["train"]) - 1) // data.length)}
        where_is = divided(data, {"train": list(blocks["train"])}, f"blocks of {data.length} tokens", shuffle=False)
        inputs = {split: _cut(tokens["train"], index, data.length, 0) for split, index in where_is.items()}
        targets = {split: _cut(tokens["train"], index, data.length, 1) for split, index in where_is.items()}
    else:
        pieces = {split: list(range((len(stream) - 1) // data.length)) for split, stream in tokens.items()}
        owners = {split: [(split, i) for i in part] for split, part in pieces.items()}
        where_are = divided(data, owners, f"blocks of {data.length} tokens", shuffle=False)
        inputs, targets = (
            {
                split: torch.cat([_cut(tokens[owner], [i], data.length, shift) for owner, i in part])
                for split, part in where_are.items()
            }
            for shift in (0, 1)
        )
    counts = {split: torch.full((len(part),), data.length) for split, part in inputs.items()}
    return Corpus(
        inputs, targets, counts, (), per_token, content_key(key, data.model_dump(mode="json", exclude={"root"}))
    )


def _cut(stream: Tensor, index: Sequence[int], length: int, shift: int) -> Tensor:
    """Blocks of a stream by their numbers: `(n, length)` int64, from `shift` tokens on."""
    whole = stream[shift : shift + (len(stream) - 1) // length * length].reshape(-1, length)
    return whole[list(index)].long()


def _sequences(data: TextSpec, tokenizer: Tokenizer) -> Corpus:
    """A text a row, cut or padded to `length` tokens, with its class."""
    assert data.label is not None
    parts = {split: list(rows) for split, rows in _rows(data).items()}
    pairs: dict[Split, list[tuple[str, Any]]] = {
        split: [(_text(row, data), _column(row, data.label, data)) for row in rows] for split, rows in parts.items()
    }
    splits = divided(data, pairs, "texts")
    classes = sorted(
        {label for part in splits.values() for _, label in part}, key=lambda label: (str(type(label)), label)
    )
    if len(classes) < 2:
        raise TaskError(f"task.data.label: the column '{data.label}' has {len(classes)} class: two or more are needed")
    number = {label: i for i, label in enumerate(classes)}
    inputs: dict[Split, Tensor] = {}
    targets: dict[Split, Tensor] = {}
    counts: dict[Split, Tensor] = {}
    for split, part in splits.items():
        ids = torch.full((len(part), data.length), tokenizer.padding, dtype=torch.long)
        counts[split] = torch.zeros(len(part), dtype=torch.long)
        for i, (text, _) in enumerate(part):
            tokens = list(tokenizer.encode(text))[: data.length]
            ids[i, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            counts[split][i] = max(1, len(tokens))
        inputs[split], targets[split] = ids, torch.tensor([number[label] for _, label in part])
    facts = data.model_dump(mode="json", exclude={"root"})
    key = content_key(facts, _key(data, tokenizer, {split: map(repr, part) for split, part in splits.items()}))
    return Corpus(inputs, targets, counts, [str(label) for label in classes], 1.0, key)


def _key(data: TextSpec, tokenizer: Tokenizer, texts: Mapping[Split, Iterable[str]]) -> str:
    digest = hashlib.sha256()
    for split, part in texts.items():
        digest.update(split.encode())
        for text in part:
            digest.update(text.encode("utf-8", errors="replace") + b"\0")
    return content_key(
        TOKENS, digest.hexdigest(), tokenizer.name, tokenizer.vocabulary, getattr(tokenizer, "content", "")
    )


# ------------------------------------------------------------------------------------------------------------ sources


def _texts(data: TextSpec) -> Mapping[Split, Iterable[str]]:
    """The texts of each split; `train` where the data has no splits."""
    if data.kind == "pydoc":
        from pydoc_data.topics import topics

        return {"train": [topics[name] for name in sorted(topics)]}
    if data.kind == "text":
        files = _files(with_home(data.root or ""), data.kind, (".txt", ".md", ".rst", ".text"))
        return {split: [_content(path) for path in paths] for split, paths in files.items()}
    return {split: [_text(row, data) for row in rows] for split, rows in _rows(data).items()}


def _rows(data: TextSpec) -> Mapping[Split, Iterable[Row]]:
    """The rows of each split."""
    if data.kind == "docstrings":
        return {"train": [{"text": text, "package": package} for text, package in docstrings()]}
    root = with_home(data.root or "")
    if data.kind == "hf_dataset":
        return _from_datasets(data, root)
    read, suffixes = _TABLES[data.kind]
    files = _files(root, data.kind, suffixes)
    return {split: [row for path in paths for row in read(path)] for split, paths in files.items()}


def _files(root: Path, kind: str, suffixes: Sequence[str]) -> dict[Split, list[Path]]:
    """The files of each split: by the names of files, or of the folders that they lie in; else all are train."""
    if root.is_file():
        return {"train": [root]}
    if not root.is_dir():
        raise TaskError(f"task.data.root: no file or folder {where(root)}")
    paths = sorted(
        path for path in root.rglob("*") if path.suffix.lower() in suffixes and not path.name.startswith(".")
    )
    if not paths:
        raise TaskError(f"task.data.root: '{root}' holds no file of kind {kind}: expected {' '.join(suffixes)}")
    meant = {path: split_of(path.relative_to(root)) for path in paths}
    if not any(meant.values()):
        return {"train": paths}
    if odd := [path.name for path, split in meant.items() if split is None]:
        raise TaskError(
            f"task.data.root: '{root}' holds splits and also {', '.join(odd[:3])}: name each file train, val or test, "
            "or none"
        )
    files: dict[Split, list[Path]] = {}
    for path, split in meant.items():
        if split is not None:
            files.setdefault(split, []).append(path)
    return files


def _content(path: Path) -> str:
    try:
        require_regular(path)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"'{path}' is no text in UTF-8: {error}") from None


def _from_jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_content(path).split("\n"), 1):  # U+2028 ends no line of JSON
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TaskError(f"'{path}', line {number}, is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise TaskError(f"'{path}', line {number}: expected an object, got {type(row).__name__}")
        yield row


def _from_csv(path: Path) -> Iterator[Row]:
    reader = csv.DictReader(
        io.StringIO(_content(path), newline=""), dialect="excel-tab" if path.suffix == ".tsv" else "excel"
    )
    try:
        yield from reader
    except csv.Error as error:
        raise TaskError(f"'{path}', line {reader.line_num}, is not CSV: {error}") from None


def _from_arrow(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        if path.suffix == ".parquet":
            table = parquet.read_table(path)
        else:
            with pa.memory_map(str(path)) as source:
                try:
                    table = pa.ipc.open_file(source).read_all()
                except pa.ArrowInvalid:  # a stream, as `datasets` writes them
                    table = pa.ipc.open_stream(source).read_all()
    except (OSError, pa.ArrowException) as error:
        raise TaskError(f"'{path}' is neither Arrow nor Parquet: {error}") from None
    yield from table.to_pylist()


_TABLES: Mapping[str, tuple[Callable[[Path], Iterator[Row]], Sequence[str]]] = {
    "jsonl": (_from_jsonl, (".jsonl", ".json", ".ndjson")),
    "csv": (_from_csv, (".csv", ".tsv")),
    "arrow": (_from_arrow, (".arrow", ".parquet", ".feather")),
}


def _from_datasets(data: TextSpec, root: Path) -> Mapping[Split, Iterable[Row]]:
    datasets = imported("datasets", "task.data.kind hf_dataset", "text")
    local = root.is_dir()
    problem = None if local else hub_problem()
    try:
        loaded = datasets.load_from_disk(str(root)) if local else datasets.load_dataset(data.root, data.config)
    except Exception as error:  # of the network, the hub, or the files
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TaskError(
            f"task.data.root: '{data.root}' is no folder of save_to_disk, nor can it be had from the hub: {said[:300]}"
            + ("" if problem is None else f"; {problem}: save it where it can be had, by save_to_disk, and give that")
        ) from None
    parts = dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}
    splits: dict[Split, Iterable[Row]] = {}
    for name, part in parts.items():
        if (meant := split_meant(name)) is not None:
            splits[meant] = part
    return splits or {"train": next(iter(parts.values()))}


def _text(row: Row, data: TextSpec) -> str:
    text = _column(row, data.text, data)
    if not isinstance(text, str):
        raise TaskError(f"task.data.text: the column '{data.text}' holds a {type(text).__name__}, expected text")
    return text


def _column(row: Row, name: str, data: TextSpec) -> Any:
    if name not in row or row[name] is None:
        which = "label" if name == data.label else "text"
        raise TaskError(f"task.data.{which}: a row of '{data.root}' has no '{name}': {nearest(name, map(str, row))}")
    return row[name]
