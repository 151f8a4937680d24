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
        pa.Table.from_pylist([record for _, record in documents.read_jsonl(jsonl_file)]),
        tmp_path / "docs.parquet",
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
    "not json": ("a.jsonl", b'{"text": ', ValueError, "no text: line 1 is not JSON"),
    "not an object": ("a.jsonl", b"[1]", ValueError, "line 1 is not a JSON object"),
    "no text": (
        "a.jsonl",
        b'{"content": "", "id": 3}',
        ValueError,
        "no field 'text'; choose one of: content, id",
    ),
    "nulls": ("a.jsonl", b"null\nnull", ValueError, "line 1 is not a JSON object but a NoneType"),
    "field is null": (
        "a.jsonl",
        b'{"text": null}\n{"text": []}',
        ValueError,
        "2 of 2 records cannot be used, the first: line 1 holds null in field 'text'",
    ),
    "not a text": ("a.jsonl", b'{"text": 5}', ValueError, "holds int in field 'text', neither"),
    "utf-16": ("a.jsonl", '{"text": "w"}'.encode("utf-16"), ValueError, "line 1 is not UTF-8"),
    "chat": (
        "a.jsonl",
        b'{"text": [{"role": "a"}]}',
        ValueError,
        "chat messages in field .text., plain text is",
    ),
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
    with pytest.raises(ValueError, match="line 1 has no field 'body'; it has: content"):
        texts(tmp_path / "a.jsonl", field="body")


BAD = [
    b"null",
    b"[1]",
    b'{"text": ',
    b'{"body": "w1"}',
    b'{"text": null}',
    b'{"text": "a \\ud83d"}',
    b'{"text": "\xff"}',
    b'{"text": [{"role": "user"}, null]}',
    b"9" * 5000,
]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("first", [True, False])
def test_a_record_without_a_text_is_skipped_and_the_first_is_named(
    tmp_path: Path, bad: bytes, first: bool
):
    lines = [b'{"text": "one"}', b"", b'{"text": "two"}', bad, b'{"text": 7}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([bad, *lines] if first else lines))
    found = documents.read(str(tmp_path / "a.jsonl"), field=None, seed=None)
    assert list(found.texts) == ["one", "two"]
    assert (found.tally.used, found.tally.skipped) == (2, 3 if first else 2)
    assert found.tally.first.startswith("line 1 " if first else "line 4 ")
    assert "\n" not in str(found.tally)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str):
    content = "w1" if name == "a.txt" else '{"text": "w1"}'
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert texts(tmp_path / name) == ["w1"]


def test_null_rows_of_parquet_are_skipped(tmp_path: Path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    rows = [{"text": None}, {"text": "one"}, {"text": None}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = documents.read(str(tmp_path / "a.parquet"), field=None, seed=None)
    assert list(found.texts) == ["one"] and found.tally.skipped == 2
    assert found.tally.first.startswith("record 1 holds null")


def test_sharegpt_needs_no_field(tmp_path: Path):
    talk = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
    (tmp_path / "a.jsonl").write_text("null\n" + json.dumps({"id": 1, "conversations": talk}))
    found = documents.read(
        str(tmp_path / "a.jsonl"), field=None, seed=0, render=lambda messages: json.dumps(messages)
    )
    assert [json.loads(text) for text in found.texts] == [
        [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    ]
    assert found.description["field"] == "conversations"
