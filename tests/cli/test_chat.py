"""``ptq generate`` and ``ptq chat``: what they print for a model with a chat template and one
without."""

import io
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from command_line import Run

from ptq.runtime.conversation import Conversation

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def talker(make_tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 64 positions with a chat template; a token is a byte."""
    path = tmp_path_factory.mktemp("talker") / "m"
    shutil.copytree(make_tiny_model("llama", max_position_embeddings=64), path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


# ---------------------------------------------------------------- generate


def test_generate_continues_the_prompt(ptq: Run, tiny_llama: Path):
    found = json.loads(
        ptq("generate", tiny_llama, "--prompt", "the walk", "--max-new-tokens", 12, "--json").out
    )
    assert found["tokens"] == 12 and found["tokens_per_second"] > 0
    assert found["chat_template"] is False
    result = ptq("generate", tiny_llama, "--prompt", "the walk", "--max-new-tokens", 12)
    assert result.out.startswith("the walk")
    assert "12 tokens" in result.err and "tokens/s" in result.err
    assert "template" not in result.err
    sampled = [
        json.loads(
            ptq("generate", tiny_llama, "-p", "a", "--temperature", 1, "--seed", s, "--json").out
        )["text"]
        for s in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_model_with_a_template_answers_unless_told_not_to(ptq: Run, talker: Path):
    options = ["--prompt", "hi", "--max-new-tokens", 5]
    answer = ptq("generate", talker, *options)
    assert not answer.out.startswith("hi") and "--raw continues the text" in answer.err
    by_hand = ptq("generate", talker, "--raw", "-p", "<u>hi\n<a>", "--max-new-tokens", 5)
    assert by_hand.out == "<u>hi\n<a>" + answer.out
    assert "template" not in by_hand.err


def test_generate_stops_where_the_positions_end(ptq: Run, talker: Path):
    result = ptq("generate", talker, "--raw", "-p", "x" * 60, "--max-new-tokens", 50)
    assert "5 tokens" in result.err
    assert "stopped: the model has 64 positions, and they are full" in result.err
    error = ptq("generate", talker, "--raw", "-p", "x" * 65).error
    assert "the prompt has 65 tokens and the model 64 positions" in error


def test_generate_with_bad_input(ptq: Run, tiny_llama: Path, talker: Path):
    for model in (tiny_llama, talker):
        assert "no tokens" in ptq("generate", model, "--prompt", "").error
    assert "temperature" in ptq("generate", tiny_llama, "--prompt", "a", "--temperature", -1).error
    error = ptq("generate", tiny_llama, "--prompt", "a", "--max-new-tokens", 0).error
    assert "--max-new-tokens" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens on a machine without a GPU")
def test_a_prefill_in_fp8_needs_layers_and_a_gpu_for_it(
    ptq: Run, tiny_llama: Path, make_run, tmp_path
):
    asked = ("--prompt", "a", "--prefill")
    assert "choose 16-bit or fp8" in ptq("generate", tiny_llama, *asked, "int8").error
    assert "not quantized by ptq" in ptq("generate", tiny_llama, *asked, "fp8").error
    make_run("llama", "mxfp4", layers=1)(tmp_path / "out", dialect="ptq")
    error = ptq("generate", tmp_path / "out", *asked, "fp8").error
    assert "prefill fp8: cpu does not multiply FP8 numbers" in error


# ---------------------------------------------------------------- chat


def test_every_line_of_a_pipe_is_a_question(ptq: Run, talker: Path, monkeypatch):
    lines = "hi\n\nyou\n/reset\n/what\n" + "x" * 70 + "\n/exit\nnot read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    result = ptq("chat", talker, "--max-new-tokens", 4, "--temperature", 0)
    assert result.code == 0
    told = result.err.splitlines()
    assert told[0].startswith(f"{talker}, 64 positions; /reset")
    assert told[1] == told[2] == "stopped at --max-new-tokens 4"
    assert told[3] == "the conversation is forgotten"
    assert told[4].startswith("unknown command /what; /reset")
    assert told[5].startswith("error: this message makes") and len(told) == 6
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nyou\n"))
    again = ptq("chat", talker, "--max-new-tokens", 4, "--temperature", 0, "--quiet")
    assert again.out == result.out != "" and again.err == ""


def test_old_turns_are_forgotten_and_that_is_said(ptq: Run, talker: Path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("aaaaaaaaaaaa\n" * 4))
    result = ptq("chat", talker, "--max-new-tokens", 8)
    assert re.search(r"the oldest \d messages did not fit: forgotten", result.err)


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(ptq: Run, talker: Path, monkeypatch):
    def answer(self: Conversation, text: str, **options) -> Iterator[str]:
        yield "some"
        os.kill(os.getpid(), signal.SIGINT)
        yield "more"

    typed = iter(["hi", "SIGINT", "/help"])

    def ask(prompt: str) -> str:
        line = next(typed, None)
        if line is None:
            raise EOFError
        if line == "SIGINT":
            os.kill(os.getpid(), signal.SIGINT)
        return line

    monkeypatch.setattr(Conversation, "answer", answer)
    monkeypatch.setattr("builtins.input", ask)
    result = ptq("chat", talker)
    assert result.code == 0
    assert result.out == "some\n\n"
    assert result.err.splitlines()[1:3] == ["stopped", "Ctrl-D or /exit leaves"]
    assert "/reset forgets" in result.err.splitlines()[3]


def test_a_request_to_end_ends_the_conversation(ptq: Run, talker: Path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: os.kill(os.getpid(), signal.SIGTERM))
    assert ptq("chat", talker).code == 128 + signal.SIGTERM


def test_a_base_model_does_not_chat(ptq: Run, tiny_llama: Path):
    assert "has no chat template" in ptq("chat", tiny_llama).error
