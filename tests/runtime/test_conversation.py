"""A conversation: what the model reads, what is kept, and what is forgotten when it is long."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ptq.runtime.conversation import Conversation, TooLong, cut
from ptq.runtime.loaded_model import Loaded, load_model

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def talker(
    make_tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Loaded:
    """A model of 64 positions with a chat template; a token is a byte."""
    path = tmp_path_factory.mktemp("talker") / "m"
    shutil.copytree(make_tiny_model("llama", max_position_embeddings=64), path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return load_model(path, device=torch.device("cpu"))


def read(conversation: Conversation) -> str:
    """What the model would read now."""
    return conversation.model.decode(conversation.encode(conversation.messages))


def test_an_answer_is_kept_with_its_question(talker: Loaded):
    conversation = Conversation(talker, system="be")
    answer = "".join(conversation.answer("hi", max_new_tokens=5))
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"]
    assert conversation.messages[1]["content"] == answer != ""
    assert read(conversation).startswith("<s>be\n<u>hi\n<a>")
    assert conversation.cut == "stopped at --max-new-tokens 5"
    conversation.reset()
    assert (conversation.messages, conversation.cut) == ([], None)


def test_an_answer_that_is_stopped_keeps_what_was_said(talker: Loaded):
    conversation = Conversation(talker)
    pieces = conversation.answer("hi", max_new_tokens=20)
    first = next(pieces)
    pieces.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": first}


def test_the_oldest_turns_make_room_and_the_system_stays(talker: Loaded):
    conversation = Conversation(talker, system="S")
    forgotten = []
    for letter in "abcd":
        list(conversation.answer(letter * 5, max_new_tokens=8))
        forgotten.append(conversation.forgotten)
    assert forgotten == [0, 0, 2, 2]
    assert "aaaaa" not in read(conversation) and "ddddd" in read(conversation)
    assert read(conversation).startswith("<s>S\n")


def test_a_message_that_leaves_no_room_is_refused_and_not_kept(talker: Loaded):
    conversation = Conversation(talker)
    with pytest.raises(TooLong, match=r"makes \d+ tokens and the model has 64 positions"):
        list(conversation.answer("x" * 60))
    assert conversation.messages == []
    assert list(conversation.answer("x", max_new_tokens=1)) != []


def test_an_answer_ends_with_the_positions(talker: Loaded):
    conversation = Conversation(talker)
    list(conversation.answer("x" * 50, max_new_tokens=500))
    assert conversation.cut == "stopped: the model has 64 positions, and they are full"


def test_a_text_that_the_model_ends_is_not_cut(talker: Loaded):
    assert cut(talker, [1] * 10, [2] * 3, 5) is None


def test_a_model_without_a_template_does_not_converse(tiny_llama: Path):
    base = load_model(tiny_llama, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="no chat template"):
        Conversation(base)


def test_a_template_that_refuses_is_an_error_of_one_line(talker: Loaded, monkeypatch):
    refuse = "{{ raise_exception('no system turns\nhere') }}"
    monkeypatch.setattr(talker.tokenizer, "chat_template", refuse)
    with pytest.raises(ValueError, match=r"refuses the conversation: no system turns$"):
        Conversation(talker, system="S")
