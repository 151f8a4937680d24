"""``ptq generate`` and ``ptq chat``: text from a model, once and in turns."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from ptq.cli.errors import guarded
from ptq.cli.options import (
    MODEL_HELP,
    Bits,
    Debug,
    Device,
    Dtype,
    Json,
    Quiet,
    parse_device,
    parse_dtype,
    parse_prefill,
)
from ptq.reading.printable import printable

if TYPE_CHECKING:
    from ptq.runtime.conversation import Conversation

HELP = "/reset forgets the conversation, /help says this, /exit or Ctrl-D leaves, Ctrl-C stops"


@guarded
def generate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")],
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="The question, or the text to continue.")
    ],
    raw: Annotated[
        bool,
        typer.Option(
            "--raw", help="Continue the text as it is, without the model's chat template."
        ),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most likely token, 1 samples from the model.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the sampling.")] = 0,
    bits: Bits = None,
    prefill: Annotated[
        str,
        typer.Option(
            metavar="16-bit|fp8",
            help="What long prompts are multiplied in: fp8 is faster on Hopper, an approximation, "
            "and takes a byte more for every weight.",
        ),
    ] = "16-bit",
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Answer a prompt, or continue it, and say how many tokens a second that made.

    A model with a chat template answers; one without, or with --raw, continues the text. It stops
    where the model's positions end.
    """
    import time

    from ptq.cli import display
    from ptq.runtime.conversation import cut
    from ptq.runtime.generate import generate as tokens_after
    from ptq.runtime.generate import record, stream_text
    from ptq.runtime.loaded_model import load_model

    subject = load_model(
        model,
        device=parse_device(device),
        dtype=parse_dtype(dtype),
        bits=bits,
        prefill=parse_prefill(prefill),
    )
    answers = subject.chats and not raw and bool(prompt)
    if answers:
        encoded = subject.encode_chat([{"role": "user", "content": prompt}])
    else:
        encoded = subject.encode(prompt)
    new_tokens: list[int] = []
    pieces: list[str] = []
    start = time.perf_counter()
    tokens = tokens_after(
        subject.module,
        encoded,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        stop=subject.ends,
    )
    before = "" if answers else prompt
    for piece in stream_text(subject.decode, encoded, record(tokens, new_tokens)):
        if not json:
            show(piece if pieces else before + piece)
        pieces.append(piece)
    seconds = time.perf_counter() - start
    why = cut(subject, encoded, new_tokens, max_new_tokens)
    if json:
        display.print_json(
            {
                "prompt": prompt,
                "chat_template": answers,
                "text": "".join(pieces),
                "tokens": len(new_tokens),
                "tokens_per_second": len(new_tokens) / seconds,
                "stopped": why,
            }
        )
    else:
        print("" if pieces else before)
        if not quiet:
            told = [f"{len(new_tokens)} tokens, {len(new_tokens) / seconds:.1f} tokens/s"]
            told += [why] if why else [] if new_tokens else ["the model ended the text at once"]
            told += ["answered by the chat template; --raw continues the text"] if answers else []
            display.note("; ".join(told))


def show(text: str) -> None:
    """Print a piece of text; on a terminal without what would steer it."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, which stops an answer and not the conversation."""


@contextmanager
def ctrl_c() -> Iterator[None]:
    """SIGINT raises ``Interrupted``; other requests to end stay what they are."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise Interrupted

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@guarded
def chat(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")],
    system: Annotated[
        str | None,
        typer.Option(show_default="its template's own", help="Instructions to the model."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 512,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most likely token, 1 samples from the model.")
    ] = 0.7,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the sampling.")] = 0,
    bits: Bits = None,
    device: Device = None,
    dtype: Dtype = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Talk to a model or checkpoint that has a chat template.

    It remembers the conversation; where its positions end, the oldest turns are forgotten, and that
    is said. /reset forgets all, Ctrl-C stops an answer, Ctrl-D or /exit leaves. From a pipe, every
    line is a question.
    """
    from ptq.cli import display
    from ptq.runtime.conversation import Conversation
    from ptq.runtime.loaded_model import load_model

    subject = load_model(model, device=parse_device(device), dtype=parse_dtype(dtype), bits=bits)
    conversation = Conversation(subject, system)
    tell = (lambda text: None) if quiet else display.note
    tell(f"{model}, {subject.positions or 'any number of'} positions; {HELP}")
    for turn, question in enumerate(questions(tell)):
        if question == "/reset":
            conversation.reset()
            tell("the conversation is forgotten")
        elif question == "/help":
            tell(HELP)
        elif question.startswith("/"):
            tell(f"unknown command {question.split()[0]}; {HELP}")
        else:
            try:
                with ctrl_c():
                    say(
                        conversation,
                        question,
                        max_new_tokens=max_new_tokens,
                        temperature=temperature,
                        seed=seed + turn,
                    )
            except Interrupted:
                print()
                tell("stopped")
            else:
                if conversation.forgotten:
                    tell(f"the oldest {conversation.forgotten} messages did not fit: forgotten")
                if conversation.cut:
                    tell(conversation.cut)


def say(conversation: "Conversation", question: str, **options) -> None:
    """Print an answer as it comes; a question that is too long is an error only to itself."""
    from ptq.cli import display
    from ptq.runtime.conversation import TooLong

    try:
        for piece in conversation.answer(question, **options):
            show(piece)
        print()
    except TooLong as error:
        display.note(f"error: {error}")


def questions(tell) -> Iterator[str]:
    """What is typed, line by line, until Ctrl-D or /exit; empty lines are left out."""
    typed = sys.stdin.isatty()
    if typed:
        import readline  # noqa: F401 - gives input() its keys and its history
    while True:
        try:
            with ctrl_c():
                line = input("> " if typed else "").strip()
        except EOFError:
            if typed:
                print()
            return
        except Interrupted:
            print()
            tell("Ctrl-D or /exit leaves")
            continue
        if line in ("/exit", "/quit", "/bye"):
            return
        if line:
            yield line
