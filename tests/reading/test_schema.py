"""Values are what they say they are, files are files; messages name file, key, value, remedy."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from ptq.reading import schema
from ptq.reading.schema import (
    Count,
    Finite,
    JsonObject,
    Share,
    check,
    check_fields,
    open_regular,
    plain,
    read_bytes,
    read_json,
    stays_inside,
)


@dataclass(frozen=True)
class Part:
    name: str
    size: Annotated[int, Field(ge=1)] = 1


@dataclass(frozen=True)
class Whole:
    share: Share
    parts: tuple[Part, ...] = ()
    more: dict[str, Part] = field(default_factory=dict)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    whole = Whole(0.5, (Part("a"), Part("b", 3)), {"c": Part("d", 2)})
    file = write(tmp_path / "x.json", json.dumps(plain(whole)))
    assert read_json(file, Whole, "") == whole == check(plain(whole), Whole, "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"x\.json is not JSON \(.*\): copy it again"),
        ("[]", r"x\.json is \[\], .*: copy it again"),
        ('{"parts": []}', r"x\.json has no 'share': copy it again"),
        ('{"share": true}', r"x\.json: share is True, it should be a valid number"),
        ('{"share": "0.5"}', r"x\.json: share is '0\.5', it should be a valid number"),
        ('{"share": 1.5}', r"x\.json: share is 1\.5, it should be less than or equal to 1"),
        ('{"share": NaN}', r"x\.json: share is nan, "),
        ('{"share": 0, "parts": [{"name": "a", "size": 0}]}', r"parts\[0\]\.size is 0, it should"),
        ('{"share": 0, "more": {"k": {"name": 3}}}', r"more\.k\.name is 3, it should be a valid"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "x.json", text)
    with pytest.raises(ValueError, match=message) as caught:
        read_json(file, Whole, "copy it again")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["2", True, 2.5, float("inf"), None, 0, 2**31])
def test_a_count_is_a_whole_number(value: object) -> None:
    assert check(2, Count, "n") == 2
    with pytest.raises(ValueError, match=r"^n "):
        check(value, Count, "n")


@pytest.mark.parametrize("value", [float("inf"), float("nan"), "1", False])
def test_a_number_is_finite(value: object) -> None:
    assert check(-1.5, Finite, "n") == -1.5
    with pytest.raises(ValueError, match=r"^n is "):
        check(value, Finite, "n")


def test_what_json_cannot_say_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"x is \{1, 2\}: JSON could not say that"):
        check({1, 2}, JsonObject, "x")


def test_fields_are_checked_where_they_were_set_by_hand() -> None:
    check_fields(Part("a", 2), "part")
    with pytest.raises(ValueError, match="part: size is 0, it should be"):
        check_fields(Part("a", 0), "part")


def test_a_long_value_is_cut_in_messages() -> None:
    with pytest.raises(ValueError, match="…") as caught:
        check("a" * 10**6, Count, "n")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("read", [read_bytes, open_regular])
def test_what_never_ends_is_not_opened(tmp_path: Path, read) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match=r"no regular file|Is a directory"):
            read(path)


def test_a_file_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "LARGEST", 4)
    assert read_bytes(write(tmp_path / "a", "1234")) == b"1234"
    with pytest.raises(ValueError, match="has more than 4 bytes"):
        read_bytes(write(tmp_path / "a", "12345"))


@pytest.mark.parametrize("name", ["a", "a/b.safetensors", "..a", "a..b/c"])
def test_names_that_stay_inside(name: str) -> None:
    assert stays_inside(name)


@pytest.mark.parametrize("name", ["", ".", "/", "/a", "..", "../a", "a/../b", "a\0b"])
def test_names_that_lead_out(name: str) -> None:
    assert not stays_inside(name)
