"""What stands around every command: errors that users can put right in one line, exit codes, what
is told on stderr.

Exit codes: 0 done; 1 an error in the program; 2 what the user can put right, in one line on stderr;
130 interrupted. Without ``--debug`` the libraries' own chatter is off.
"""

import functools
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, red if that is a terminal, and the end of the program."""
    line = f"error: {' '.join(message.split())}"
    print(
        f"\033[31m{line}\033[0m" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else line,
        file=sys.stderr,
    )
    sys.exit(code)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """``command``, with what users can put right told in one line: ValueError, OSError, memory,
    Ctrl-C."""

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
                    kept = options.get("out") and Path(f"{options['out']}.partial").is_dir()
                    then = "; the same command continues after the finished blocks" if kept else ""
                    fail("interrupted" + then, 130)
                if not isinstance(error, (ValueError, OSError, MemoryError)) and not out_of_memory(
                    error
                ):
                    raise
                if debug:
                    traceback.print_exc()
                fail(describe(error), 2)

    return run


@contextmanager
def listening() -> Iterator[list[int]]:
    """Ctrl-C raises KeyboardInterrupt, as always, and is noted: libraries turn some into errors of
    their own."""
    interrupts: list[int] = []

    def interrupt(number: int, frame: object) -> NoReturn:
        interrupts.append(number)
        raise KeyboardInterrupt

    usual = signal.getsignal(signal.SIGINT)
    if usual is not signal.default_int_handler:  # ignored, or somebody else's
        yield interrupts
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, usual)


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
