"""What text a record gives, and what is said of one that gives none."""

import itertools

import pytest

from ptq.text.records import PATIENCE, Tally, Unusable, default_field, text_of, texts


@pytest.mark.parametrize(
    ("value", "roles"),
    [
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "user assistant"),
        ([{"from": "system", "value": "a"}, {"from": "observation", "value": "b"}], "system tool"),
        ([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], "user tool"),
        ([{"from": "narrator", "value": "a"}, {"from": "user", "value": "b"}], "narrator user"),
    ],
)
def test_conversations_are_messages(value: list, roles: str) -> None:
    def render(messages: list[dict[str, object]]) -> str:
        assert [m["content"] for m in messages] == ["a", "b"]
        return " ".join(str(m["role"]) for m in messages)

    assert text_of({"conversations": value}, "conversations", render) == roles


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "is not a JSON object but a NoneType"),
        ({}, "has no field 'f'; it has: nothing"),
        ({"f": None}, "holds null in field 'f', neither text nor chat messages"),
        ({"f": []}, "holds list in field 'f', neither"),
        ({"f": [{"from": "human"}]}, "holds list in field 'f', neither"),
        ({"f": [{"role": "user"}, "x"]}, "holds list in field 'f', neither"),
        ({"f": [{"role": "user"}]}, "plain text is wanted here"),
        ({"f": "ab\ud800"}, "an unpaired surrogate in field 'f', at character 2"),
    ],
)
def test_a_record_without_a_text_says_why(record: object, message: str) -> None:
    with pytest.raises(Unusable, match=message):
        text_of(record, "f", None)


def test_a_rendered_text_is_checked_too() -> None:
    with pytest.raises(Unusable, match="surrogate"):
        text_of({"f": [{"role": "user", "content": "\udc00"}]}, "f", lambda m: str(m[0]["content"]))


def test_the_field_is_that_of_the_first_record_that_has_one() -> None:
    records = [("line 1", None), ("line 2", {"id": 3}), ("line 3", {"messages": [], "text": ""})]
    assert default_field(records, "a") == "text"
    with pytest.raises(ValueError, match=r"a holds no text: line 1 is not a JSON object"):
        default_field(records[:1], "a")
    with pytest.raises(ValueError, match="a has no field 'text'; choose one of: id"):
        default_field(records[1:2], "a")


def test_an_endless_source_without_a_text_is_given_up() -> None:
    endless, tally = ((f"record {i}", None) for i in itertools.count(1)), Tally()
    with pytest.raises(ValueError, match=f"{PATIENCE} of {PATIENCE} records .* record 1 is not"):
        list(texts(endless, "text", "a", None, tally))
    assert next(endless)[0] == f"record {PATIENCE + 1}"
