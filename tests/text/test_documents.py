"""Documents out of files and data sets: the same whatever they lie in, and every message."""

import json
from pathlib import Path

import pytest

from ptq.text import documents


@pytest.fixture
def jsonl_file(tmp_path: Path) -> Path:
    lines = [json.dumps({"id": d, "text": f"document {d}"}) for d in range(100)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "docs.jsonl"


def texts(source: object, *, field: str | None = None, seed: int | None = 0) -> list[str]:
    return list(documents.read(str(source), field=field, seed=seed).texts)


def test_without_a_seed_documents_keep_their_order(jsonl_file: Path):
    in_order = [f"document {d}" for d in range(100)]
    assert texts(jsonl_file, seed=None) == in_order
    assert texts(jsonl_file) == texts(jsonl_file) != in_order
    assert sorted(texts(jsonl_file)) == sorted(in_order)


def test_the_field_is_text_then_messages_unless_it_is_named(tmp_path: Path):
    talk = [{"role": "user", "content": "hello"}]
    record = {"text": "a", "messages": talk, "body": "b"}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record))
    assert texts(path) == ["a"] and texts(path, field="body") == ["b"]
    path.write_text(json.dumps({"messages": talk, "body": "b"}))
    chat = documents.read(str(path), field=None, seed=0, render=lambda m: f"{len(m)} messages")
    assert list(chat.texts) == ["1 messages"] and chat.description["field"] == "messages"


def test_parquet_equals_jsonl(jsonl_file: Path, tmp_path: Path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    parquet.write_table(
        pa.Table.from_pylist(documents.read_jsonl(jsonl_file)), tmp_path / "docs.parquet"
    )
    assert texts(tmp_path / "docs.parquet") == texts(jsonl_file) != texts(jsonl_file, seed=1)


def test_a_hub_dataset_is_streamed_and_its_revision_recorded(monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = [{"text": f"w{i} " * 30} for i in range(50)]
    asked = []

    def fake(name: str, config: str | None, *, split: str, streaming: bool) -> object:
        asked.append((name, config, split, streaming))
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    monkeypatch.setattr(datasets, "load_dataset", fake)
    monkeypatch.setattr(documents, "_revision", lambda name: f"revision of {name}")
    found = documents.read("owner/corpus:small", field=None, seed=0)
    assert asked == [("owner/corpus", "small", "train", True)]
    assert found.description["revision"] == "revision of owner/corpus"
    shuffled = list(found.texts)
    assert shuffled == texts("owner/corpus:small")
    assert sorted(shuffled) == sorted(row["text"] for row in rows)
    assert [row["text"] for row in rows] == texts("owner/corpus:small", seed=None) != shuffled


MISTAKES: dict[str, tuple[str, bytes | None, type[Exception], str]] = {
    "empty": ("a.jsonl", b"\n", ValueError, "is empty"),
    "not json": ("a.jsonl", b'{"text": "w1"}\n{"text": ', ValueError, "line 2 is not JSON"),
    "not an object": ("a.jsonl", b"[1]", ValueError, "line 1 is not a JSON object"),
    "no text": (
        "a.jsonl",
        b'{"content": "", "id": 3}',
        ValueError,
        "no field 'text'; choose one of: content, id",
    ),
    "field lost": (
        "a.jsonl",
        b'{"text": "w1"}\n{"body": "w1"}',
        ValueError,
        "record 2 has no field 'text'",
    ),
    "not a text": ("a.jsonl", b'{"text": 5}', ValueError, "holds int, neither text nor chat"),
    "chat": ("a.jsonl", b'{"text": [{"role": "a"}]}', ValueError, "chat messages, plain text is"),
    "unknown kind": ("a.csv", b"text", ValueError, "must be .txt, .jsonl, .parquet"),
    "bad parquet": ("a.parquet", b"nothing of the kind", ValueError, "parquet"),
    "not utf-8": ("a.txt", b"caf\xe9", ValueError, "not UTF-8"),
    "missing": ("a.txt", None, FileNotFoundError, "does not exist"),
    "directory": (".", None, FileNotFoundError, "is a directory"),
    "no id either": ("no/such/thing", None, FileNotFoundError, "does not exist"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named_in_one_line(case: str, tmp_path: Path):
    name, content, kind, message = MISTAKES[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(kind, match=message) as caught:
        texts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_field_that_is_not_there_is_named_with_those_that_are(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"content": "w1"}')
    with pytest.raises(ValueError, match="no field 'body'; it has: content"):
        texts(tmp_path / "a.jsonl", field="body")
