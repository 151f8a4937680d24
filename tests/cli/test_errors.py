"""What stands around every command: one line for what users can put right, exit codes, signals."""

import signal

import pytest

from ptq.cli.errors import SIGNALS, describe, guarded, out_of_memory


def code_of(error: BaseException) -> int:
    @guarded
    def command(*, quiet: bool) -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        command(quiet=True)
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n  b"), "error: a b"),
        (
            FileNotFoundError(2, "No such file or directory", "x"),
            "error: No such file or directory: x",
        ),
        (FileExistsError("x exists"), "error: x exists"),
        (MemoryError(), "error: out of memory; lower --batch-size"),
        (KeyboardInterrupt(), "error: interrupted"),
    ],
)
def test_what_users_can_put_right_is_one_line(error: BaseException, line: str, capfd) -> None:
    assert code_of(error) == (130 if isinstance(error, KeyboardInterrupt) else 2)
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(line) and err.count("\n") == 1


def test_errors_of_the_program_keep_their_traceback() -> None:
    @guarded
    def command(*, quiet: bool) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command(quiet=True)


@pytest.mark.parametrize("number", SIGNALS)
def test_handlers_are_put_back_and_what_is_ignored_stays_ignored(number: int) -> None:
    during = []

    @guarded
    def command(*, quiet: bool) -> None:
        during.append(signal.getsignal(number))

    before = signal.signal(number, signal.SIG_IGN)
    try:
        command(quiet=True)
        assert during == [signal.SIG_IGN] and signal.getsignal(number) is signal.SIG_IGN
        signal.signal(number, signal.SIG_DFL)
        command(quiet=True)
        assert callable(during[1]) and signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_running_out_of_memory_is_recognised() -> None:
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 TB"))
    assert not out_of_memory(ValueError("memory"))
    assert describe(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    "instead", [ValueError("could not determine the shape"), RuntimeError("stack expects")]
)
def test_ctrl_c_that_a_library_turns_into_its_own_error_is_an_interruption(
    instead: Exception, capfd
):
    """Measured: 11 % of the interrupts inside a safetensors read come out of torch as a
    ValueError."""

    @guarded
    def command(*, quiet: bool):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise instead from None

    # a shell that starts the tests in the background lets them ignore SIGINT
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stop:
            command(quiet=True)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130 and capfd.readouterr().err == "error: interrupted\n"
