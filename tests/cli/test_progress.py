"""Progress with the right time left: in a terminal, in a pipe, in a notebook."""

import io
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from rich.console import Console

from ptq.cli import progress
from ptq.pipeline import pace
from ptq.pipeline.run import Progress
from ptq.pipeline.tuning import Step


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the time on."""
    now = [1000.0]

    def wait(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(pace.Pace.__init__, "__kwdefaults__",
                        pace.Pace.__init__.__kwdefaults__ | {"clock": lambda: now[0]})  # fmt: skip
    return wait


def test_a_log_gets_the_first_step_the_last_and_one_now_and_then(
    capsys: pytest.CaptureFixture[str], clock: Callable[[float], None]
):
    with progress.bar(False, "working") as step:
        for done in range(1, 101):
            clock(1.0)
            step(done, 100, f"step {done}")
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/100", "31/100", "61/100", "91/100", "100/100"]
    assert lines[1] == "working 31/100  step 31  31 s, about 1 min 09 s left"
    assert lines[-1] == "working 100/100  step 100  1 min 40 s"


def test_a_quiet_bar_says_nothing(capsys: pytest.CaptureFixture[str]):
    with progress.bar(True, "working") as step:
        step(1, 1, "x")
    assert capsys.readouterr() == ("", "")


def test_a_bar_in_a_terminal_counts_down_within_a_step(
    monkeypatch: pytest.MonkeyPatch, clock: Callable[[float], None]
):
    """Steps of ten minutes: a bar that forgets what is older than 30 s would know nothing."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=110, color_system=None)
    monkeypatch.setattr(progress, "err", console)
    with progress.bar(False, "quantizing") as step:
        step.expect([600.0] * 3, seconds=True)
        clock(300)
        step.shown.refresh()  # pyright: ignore[reportOptionalMemberAccess]
        clock(900)
        step(1, 3, "model.layers.0  \x1b[31merror 0.001 " + 80 * "x")
    frames = screen.getvalue().replace("\r", "\n").splitlines()
    assert any("quantizing" in f and "0/3 5 min 00 s, about 25 min 00 s left" in f for f in frames)
    late = next(f for f in frames if "1/3 20 min 00 s, about 40 min 00 s left" in f)
    assert r"\x1b[31merror" in late and "…" in late and len(late.split("\x1b")[0]) <= 110


class Notebook:
    """What IPython gives a program that runs in a kernel."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.get_ipython = lambda: SimpleNamespace(kernel=object())
        self.HTML = str

    def display(self, markup: str, *, display_id: bool) -> "Notebook":
        assert display_id
        self.shown.append(markup)
        return self

    def update(self, markup: str) -> None:
        self.shown.append(markup)


def test_a_notebook_gets_a_bar_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    clock: Callable[[float], None],
):
    assert not progress.in_notebook()
    notebook = Notebook()
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    monkeypatch.setitem(sys.modules, "IPython.display", notebook)
    assert progress.in_notebook()
    with progress.bar(False, "quantizing") as step:
        step(1, 4, "a <b>")
    assert capsys.readouterr() == ("", "")
    assert notebook.shown[0].startswith('quantizing <progress max="1"></progress>')
    assert 'value="0.25' in notebook.shown[-1] and "a &lt;b&gt;" in notebook.shown[-1]


def test_blocks_are_told_with_their_errors(
    capsys: pytest.CaptureFixture[str], clock: Callable[[float], None]
):
    with progress.quantizing(quiet=False) as on_block:
        on_block.expect([1.0, 2.0, 3.0], seconds=True)
        reports = [SimpleNamespace(error=e) for e in (0.001, 0.003)]
        for index, (found, resumed) in enumerate([([], True), (reports, False), (reports, False)]):
            clock(4.0)
            done = Progress(
                block=f"layers.{index}", index=index, count=3, reports=found, resumed=resumed
            )
            on_block(done)
    assert capsys.readouterr().err.splitlines() == [
        "quantizing 1/3  layers.0  finished before  4 s, about 5 s left",
        "quantizing 3/3  layers.2  error 0.002  12 s",
    ]


def test_steps_of_tuning_are_told_with_their_losses(
    capsys: pytest.CaptureFixture[str], clock: Callable[[float], None]
):
    with progress.quantizing(quiet=False) as on_block:
        on_block(Progress(block="b", index=0, count=1, reports=[], resumed=True))
        for done in range(11, 14):  # an earlier run had taken ten
            clock(40.0)
            found = 0.25 if done == 12 else None
            on_block(Step(done=done, steps=13, kl=0.5, held_out=found))
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("  ")[0] for line in lines] == [
        "quantizing 1/1", "tuning 11/13", "tuning 12/13", "tuning 13/13"
    ]  # fmt: skip
    assert [line.partition("  ")[2] for line in lines[1:]] == [
        "KL 0.5  40 s",
        "KL 0.5, held out 0.25  1 min 20 s, about 40 s left",
        "KL 0.5, held out 0.25  2 min 00 s",
    ]


def test_evaluation_in_a_log_is_two_lines_if_it_is_short(capsys: pytest.CaptureFixture[str]):
    with progress.evaluating(quiet=False) as on_window:
        for done in range(1, 101):
            on_window(done, 100)
    assert len(capsys.readouterr().err.splitlines()) == 2
