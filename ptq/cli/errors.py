"""What stands around every command: errors that users can put right in one line, exit codes, what
is told on stderr.

Exit codes: 0 done; 1 an error in the program; 2 what the user can put right, in one line on stderr;
128 + n ended by signal n. Without ``--debug`` the libraries' own chatter is off.
"""

import functools
import logging
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from ptq.reading.printable import printable

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, red if that is a terminal, and the end of the program."""
    line = f"error: {printable(' '.join(message.split()))}"
    print(
        f"\033[31m{line}\033[0m" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else line,
        file=sys.stderr,
    )
    sys.exit(code)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """``command``, with what users can put right told in one line: ValueError, OSError, memory,
    Ctrl-C and other requests to end."""

    @functools.wraps(command)
    def run(*args, **options) -> None:
        debug = bool(options.get("debug"))
        with listening() as interrupts:
            try:
                settle(quiet=bool(options.get("quiet")), debug=debug)
                command(*args, **options)
            except BrokenPipeError:  # ptq inspect … | head
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(1)
            except (KeyboardInterrupt, Exception) as error:
                if interrupts or isinstance(error, KeyboardInterrupt):
                    out = options.get("out")
                    resumable = out and any(map(os.path.exists, unfinished(out)))
                    then = (
                        "; the same command continues after the finished blocks"
                        if resumable
                        else ""
                    )
                    number = interrupts[0] if interrupts else signal.SIGINT
                    fail("interrupted" + then, 128 + number)
                if not isinstance(error, (ValueError, OSError, MemoryError)) and not out_of_memory(
                    error
                ):
                    raise
                if debug:
                    traceback.print_exc()
                fail(describe(error), 2)

    return run


def unfinished(out: str | os.PathLike[str]) -> tuple[str, str]:
    """Where a quantization, and an analysis, keep what is finished."""
    return f"{os.path.realpath(out)}.partial", os.path.join(out, "analysis.partial.jsonl")


@contextmanager
def listening() -> Iterator[list[int]]:
    """Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt, so that files are closed and removed on
    the way out, and are noted: libraries turn some into errors of their own."""
    interrupts: list[int] = []
    with suppress(FileNotFoundError):  # said by those who need a temporary file
        # found by writing a file, once a process: a signal in between would leave it there
        tempfile.gettempdir()

    def interrupt(number: int, frame: object) -> NoReturn:
        interrupts.append(number)
        raise KeyboardInterrupt

    usual = {number: signal.getsignal(number) for number in SIGNALS}
    # what is ignored (nohup), or somebody else's, stays so
    ours = {n: h for n, h in usual.items() if h in (signal.SIG_DFL, signal.default_int_handler)}
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield interrupts
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


def out_of_memory(error: BaseException) -> bool:
    """Whether a GPU, or torch's allocator on the CPU, has run out of memory."""
    torch = sys.modules.get("torch")
    return torch is not None and (
        isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error).lower()
    )


def describe(error: BaseException) -> str:
    """The message of an error; those of the file system say which file."""
    if isinstance(error, MemoryError) or out_of_memory(error):
        return (
            "out of memory; lower --batch-size or --samples (bench: --tokens), or use --device cpu"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def settle(*, quiet: bool, debug: bool) -> None:
    """Decide what is told on stderr besides progress: everything, our own warnings, or with
    ``quiet`` nothing."""
    if debug:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        return
    for name, value in {  # read by the libraries when they are imported
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    logger = logging.getLogger("ptq")
    logger.propagate = False
    if quiet:
        logger.addHandler(logging.NullHandler())
    else:
        from ptq.cli.display import Messages

        logger.addHandler(Messages(logging.WARNING))
