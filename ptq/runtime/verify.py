"""Whether a checkpoint is what was written, and what a reader may rely on.

A check is a row of ``CHECKS``; what no row asks is said in ``UNCHECKED``.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ptq.checkpoint.checksums import SUMS, differences
from ptq.checkpoint.engines import WRONG, Result
from ptq.checkpoint.layer_checks import FLOATS, check_numbers
from ptq.checkpoint.reader import Checkpoint
from ptq.runtime.tables import Table, Tabular


@dataclass(frozen=True, kw_only=True)
class Check:
    """A question to a checkpoint directory.

    Attributes:
        what: is looked at, in words.
        problems: one line for each that is found.
    """

    what: str
    problems: Callable[[Path], Iterator[str]]


@dataclass(frozen=True, kw_only=True, repr=False)
class Verdict(Tabular):
    """What was found.

    Attributes:
        checked, unchecked: what was looked at, and what was not, in words.
        problems: one line each; none if all is well.
        engines: what came out of those that are installed, if they were asked.
    """

    path: str
    checked: tuple[str, ...]
    unchecked: tuple[str, ...]
    problems: tuple[str, ...]
    engines: tuple[Result, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there is no problem, and no engine computes it wrongly."""
        return not self.problems and all(found.outcome != WRONG for found in self.engines)

    def to_dict(self) -> dict[str, object]:
        """For JSON: all fields, and ``ok``."""
        return {**asdict(self), "ok": self.ok}

    def tables(self) -> tuple[Table, ...]:
        """A line for each problem, or one that there is none; what was not looked at."""
        found = self.problems or (f"{self.path}: ok ({', '.join(self.checked)})",)
        notes = (*found, f"not checked: {'; '.join(self.unchecked)}")
        return (Table(title="", columns=(), rows=(), notes=notes),)


def verify(
    path: Path | str, *, engines: bool = False, on_engine: Callable[[str], None] | None = None
) -> Verdict:
    """Ask all ``CHECKS``; reads every file twice, and holds one tensor or layer at a time.

    Args:
        engines: if there is no problem, open it in what is installed too
            (:func:`ptq.runtime.engine_check.check_engines`); each holds the whole model.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: ``ptq.load`` does not open what has no problem.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no directory: give that of a quantized checkpoint")
    results: list[Result] = []
    # two checks may stumble over the same thing
    problems = tuple(dict.fromkeys(line for check in CHECKS for line in check.problems(path)))
    if opened := engines and not problems:
        from ptq.runtime.engine_check import check_engines  # transformers, which takes a while

        results = check_engines(path, on_engine=on_engine)
    return Verdict(
        path=str(path),
        checked=tuple(check.what for check in CHECKS),
        unchecked=UNCHECKED if opened else (*UNCHECKED, UNOPENED),
        problems=problems,
        engines=tuple(results),
    )


def damaged_tensors(path: Path) -> Iterator[str]:
    """What a reader would refuse: of configuration, reports and every tensor."""
    try:
        checkpoint = Checkpoint(path)
        _ = checkpoint.reports, checkpoint.layers
    except (ValueError, OSError) as error:
        yield str(error)
        return
    if not checkpoint.layers:
        yield f"{path} has no quantized layer, although its config.json says how they are stored"
    for name in checkpoint.layers:
        try:
            checkpoint.layer(name)
        except (ValueError, OSError) as error:
            yield str(error)
    for name in checkpoint.other_names():
        try:
            tensor = checkpoint.tensor(name)
            if tensor.dtype in FLOATS:
                check_numbers(tensor, name)
        except (ValueError, OSError) as error:
            yield str(error)


CHECKS = (
    Check(what=f"files against {SUMS}", problems=differences),
    Check(what="types, shapes and ranges of all tensors", problems=damaged_tensors),
)
UNCHECKED = (
    f"who wrote {SUMS}",
    "whether config.json is of the same model (ptq.load asks that)",
    "how close the numbers are to the original's (ptq eval measures that)",
)
UNOPENED = "whether other engines open it (--engines asks those that are installed)"
