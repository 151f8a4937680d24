"""Progress of long work: a bar in a terminal, a line now and then in a pipe, a bar in a notebook.

The time left is that of :class:`ptq.pipeline.pace.Pace`: foretold until the first step is over,
measured afterwards, and counted down while a step of any length goes on.
"""

import html
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from rich import progress
from rich.progress_bar import ProgressBar
from rich.table import Column
from rich.text import Text

from ptq.cli.terminal import err, note
from ptq.pipeline.pace import Pace
from ptq.reading.printable import printable
from ptq.runtime.figures import number, span
from ptq.runtime.inspect import mean

if TYPE_CHECKING:
    from ptq.pipeline.run import Progress
    from ptq.pipeline.tuning import Step

EVERY = 30.0  # seconds between two lines where there is no bar
TICK = 1.0  # seconds between two looks of a notebook's bar


class Shown(Protocol):
    """One way to show how far something is."""

    def refresh(self) -> None: ...

    def close(self) -> None: ...


class Bar:
    """How far something is; calling it with ``(done, total, text)`` says that a step is over."""

    def __init__(self, what: str) -> None:
        self.what, self.text = what, ""
        self.pace: Pace | None = None
        self.shown: Shown | None = None
        self._start = time.monotonic()

    def expect(self, costs: Sequence[float], *, seconds: bool) -> None:
        """What the steps are expected to take, the first one beginning now; see :class:`Pace`."""
        self.pace = Pace(costs, seconds=seconds)
        self._refresh()

    def __call__(self, done: int, total: int, text: str, *, known: bool = False) -> None:
        """``done`` of ``total`` steps are over. ``known``: an earlier run had finished them."""
        if self.pace is None or self.pace.count != total or done <= self.pace.done:
            since = self._start if self.pace is None else self.pace.since
            self.pace = Pace([1.0] * total, since=since)
        self.text = printable(text)
        self.pace.finish(done, known=known)
        self._refresh()

    def _refresh(self) -> None:
        if self.shown is not None:
            self.shown.refresh()

    @property
    def counts(self) -> str:
        """``3/30``; empty before that is known."""
        return "" if self.pace is None else f"{self.pace.done}/{self.pace.count}"

    @property
    def times(self) -> str:
        """The time that has gone and that is left, in words."""
        left = None if self.pace is None else self.pace.remaining
        gone = span(time.monotonic() - self._start)
        return gone if left is None or not left else f"{gone}, about {span(left)} left"


@contextmanager
def bar(quiet: bool, what: str) -> Iterator[Bar]:
    """A bar with the time gone and left; nothing is shown if ``quiet``."""
    shown = Bar(what)
    if not quiet:
        shown.shown = _way()(shown)
    try:
        yield shown
    finally:
        if shown.shown is not None:
            shown.shown.close()


def _way() -> Callable[[Bar], Shown]:
    """How progress is shown here."""
    if in_notebook():
        return _InNotebook
    return _OnTerminal if err.is_terminal else _InLines


def in_notebook() -> bool:
    """Whether this is a kernel of Jupyter, whose front end shows more than characters."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and getattr(shell, "kernel", None) is not None


class _Live(progress.ProgressColumn):
    """A column that is asked anew whenever the bar is drawn."""

    def __init__(self, render: Callable[[], ProgressBar | Text], *, cut: bool = False) -> None:
        # the one that may be cut takes what the others leave
        super().__init__(Column(no_wrap=True, overflow="ellipsis", ratio=1 if cut else None))
        self._render = render

    def render(self, task: progress.Task) -> ProgressBar | Text:
        return self._render()


class _OnTerminal:
    """A bar that is gone when the work is over."""

    def __init__(self, bar: Bar) -> None:
        columns = (
            _Live(lambda: Text(bar.what)),
            _Live(lambda: self._bar(bar)),
            _Live(lambda: Text(bar.counts, "green")),
            _Live(lambda: Text(bar.times, "cyan")),
            _Live(lambda: Text(bar.text, "dim"), cut=True),
        )
        self._bars = progress.Progress(
            *columns, console=err, transient=True, refresh_per_second=4, expand=True
        )
        self._bars.add_task(bar.what, total=1)
        self._bars.start()

    @staticmethod
    def _bar(bar: Bar) -> ProgressBar:
        share = None if bar.pace is None else bar.pace.share
        return ProgressBar(
            total=None if share is None else 1.0,
            completed=share or 0.0,
            width=20,
            pulse=share is None,
            animation_time=time.monotonic(),
        )

    def refresh(self) -> None:
        self._bars.refresh()

    def close(self) -> None:
        self._bars.stop()


class _InLines:
    """A line at the first step and the last, and now and then between them."""

    def __init__(self, bar: Bar) -> None:
        self._bar, self._last = bar, -EVERY

    def refresh(self) -> None:
        bar, now = self._bar, time.monotonic()
        if bar.pace is None or not bar.pace.done:
            return
        if bar.pace.done in (1, bar.pace.count) or now - self._last >= EVERY:
            self._last = now
            note(f"{bar.what} {bar.counts}  {bar.text}  {bar.times}")

    def close(self) -> None:
        pass


class _InNotebook:
    """A bar of HTML that a thread keeps going while a step runs."""

    def __init__(self, bar: Bar) -> None:
        from IPython.display import HTML, display  # pyright: ignore[reportMissingImports]

        self._bar, self._html = bar, HTML
        self._handle = display(HTML(self.markup()), display_id=True)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._thread.start()

    def markup(self) -> str:
        """The bar as HTML."""
        bar = self._bar
        value = "" if bar.pace is None else f' value="{bar.pace.share:.4f}"'
        words = html.escape("  ".join(filter(None, (bar.counts, bar.times, bar.text))))
        return f'{html.escape(bar.what)} <progress max="1"{value}></progress> <code>{words}</code>'

    def _tick(self) -> None:
        while not self._over.wait(TICK):
            self.refresh()

    def refresh(self) -> None:
        self._handle.update(self._html(self.markup()))

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self.refresh()


class Quantizing:
    """Progress of a quantization: ``on_block`` of a run."""

    def __init__(self, bar: Bar) -> None:
        self._bar, self._held_out = bar, ""

    def expect(self, costs: Sequence[float], *, seconds: bool) -> None:
        """What every block is expected to take, from now on: seconds, or shares of the whole."""
        self._bar.expect(costs, seconds=seconds)

    def __call__(self, done: "Progress | Step") -> None:
        """A block is finished, or a step of tuning was taken."""
        from ptq.pipeline.tuning import Step  # whoever calls has imported it

        if isinstance(done, Step):
            self._step(done)
            return
        error = mean(report.error for report in done.reports)
        told = "finished before" if done.resumed else f"error {number(error, 3)}"
        self._bar(done.index + 1, done.count, f"{done.block}  {told}", known=done.resumed)

    def _step(self, done: "Step") -> None:
        # what came before the first step is in its time, and an earlier run may have taken some
        first, self._bar.what = self._bar.what != "tuning", "tuning"
        if done.held_out is not None:
            self._held_out = f", held out {number(done.held_out)}"
        self._bar(done.done, done.steps, f"KL {number(done.kl)}{self._held_out}", known=first)


@contextmanager
def quantizing(quiet: bool) -> Iterator[Quantizing]:
    """Progress of a quantization, for ``on_block``: blocks, time gone and left, the mean error of
    the last block's layers."""
    with bar(quiet, "quantizing") as shown:
        yield Quantizing(shown)


@contextmanager
def evaluating(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Progress of an evaluation, for ``on_window``."""
    with bar(quiet, "evaluating") as step:

        def on_window(done: int, total: int) -> None:
            step(done, total, "windows")

        yield on_window
