"""Checkpoints of one model beside each other: format, size, errors of layers by kind, and what
``ptq eval --keep`` found. No weight is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ptq.model.layer_names import kinds
from ptq.runtime.evaluate import TOP, Evaluation
from ptq.runtime.figures import number, percent, size
from ptq.runtime.inspect import LayerRow, Report, inspect, mean
from ptq.runtime.kept_evaluations import kept_evaluations
from ptq.runtime.tables import Table, Tabular


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A checkpoint of a comparison; ``evaluation`` is None where none was kept on the text that
    most have."""

    name: str
    report: Report
    evaluation: Evaluation | None

    def rows(self, of: frozenset[str], *, outputs: bool) -> list[LayerRow]:
        """Its layers among ``of`` whose errors are those of outputs, or of weights."""
        return [r for r in self.report.layers if r.layer in of and r.of_outputs == outputs]


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(Tabular):
    """Checkpoints of one model.

    Attributes:
        common: layers that all of them have quantized; errors are means over these.
        kinds: what those do, by layer, in the order of the model.
    """

    checkpoints: tuple[Compared, ...]
    common: frozenset[str]
    kinds: dict[str, str]

    def to_dict(self) -> dict[str, object]:
        """For JSON: a record for every checkpoint, with its errors by kind."""
        return {
            "common_layers": len(self.common),
            "checkpoints": [
                {
                    "name": c.name,
                    "path": c.report.path,
                    "formats": c.report.formats,
                    "dialect": c.report.dialect,
                    "bytes": c.report.bytes,
                    "bits_per_weight": c.report.bits_per_weight,
                    "bits_per_parameter": c.report.bits_per_parameter,
                    "output_error": self.error(c),
                    "output_error_by_kind": {k: self.error(c, k) for k in self.shown_kinds},
                    "weight_error": self.error(c, outputs=False),
                    "evaluation": None if c.evaluation is None else c.evaluation.to_dict(),
                }
                for c in self.checkpoints
            ],
        }

    @property
    def shown_kinds(self) -> list[str]:
        """Kinds of layers, in the order of the model."""
        return list(dict.fromkeys(self.kinds.values()))

    @property
    def of_outputs(self) -> bool:
        """Whether the errors of any are those of outputs; if not, all are those of weights."""
        return any(self.error(c) is not None for c in self.checkpoints)

    def error(self, of: Compared, kind: str | None = None, *, outputs: bool = True) -> float | None:
        """The mean error of the common layers of a kind, or of all; None where it is not known."""
        rows = of.rows(self.common, outputs=outputs)
        return mean(r.error for r in rows if kind is None or self.kinds[r.layer] == kind)

    def tables(self) -> tuple[Table, ...]:
        """One: a column for every checkpoint."""
        every = self.checkpoints
        rows = [
            ("format", *(" + ".join(c.report.formats) for c in every)),
            ("scheme", *(_joined(r.scheme for r in c.report.layers) for c in every)),
            ("algorithm", *(_joined(r.algorithm or "–" for r in c.report.layers) for c in every)),
            ("rotation", *(_joined(_rotation(r) for r in c.report.layers) for c in every)),
            ("dialect", *(c.report.dialect for c in every)),
            ("size of tensors", *(size(c.report.bytes) for c in every)),
            ("bits per quantized weight", *(f"{c.report.bits_per_weight:.2f}" for c in every)),
            ("bits per parameter", *(f"{c.report.bits_per_parameter:.2f}" for c in every)),
        ]
        for outputs, what in ((True, "output error"), (False, "weight error")):
            if all(self.error(c, outputs=outputs) is None for c in every):
                continue
            means = (number(self.error(c, outputs=outputs), 3) for c in every)
            rows.append((f"{what}, mean", *means))
            for kind in self.shown_kinds:
                found = (number(self.error(c, kind, outputs=outputs), 3) for c in every)
                rows.append((f"· {kind}", *found))
        notes = [
            f"errors: means over the {len(self.common)} layers that all have, ‖(W - Ŵ)X‖² / ‖WX‖² "
            "on each run's text; of weights where none was read"
        ]
        measured = [c.evaluation for c in every if c.evaluation is not None]
        if measured:
            rows += _evaluations([c.evaluation for c in every])
            e = measured[0]
            notes.append(
                f"{e.text}: {e.tokens} predictions in windows of {e.seq_len} tokens; nats per "
                "token" + (f"; reference {e.reference}" if e.reference else "")
            )
        else:
            notes.append("no perplexity or KL: ptq eval MODEL --reference ORIGINAL --keep adds it")
        return (
            Table(
                title=f"{len(every)} checkpoints",
                columns=("", *(c.name for c in every)),
                rows=tuple(rows),
                notes=tuple(notes),
            ),
        )


def _joined(words) -> str:
    return " + ".join(sorted(set(words)))


def _rotation(row: LayerRow) -> str:
    return str(row.rotation) if row.rotation > 1 else "none"


def _evaluations(found: Sequence[Evaluation | None]) -> list[tuple[str, ...]]:
    def cells(name: str, show=number) -> tuple[str, ...]:
        return tuple("–" if e is None else show(getattr(e, name)) for e in found)

    return [
        ("perplexity", *cells("perplexity")),
        ("KL to the reference", *cells("kl")),
        (f"KL top {TOP}", *cells("kl_top25")),
        ("same top-1", *cells("top1_agreement", percent)),
    ]


def compare_checkpoints(paths: Sequence[Path]) -> Comparison:
    """Describe checkpoints beside each other.

    Raises:
        ValueError: fewer than two, one that is damaged or no checkpoint, or layers of different
            models.
        FileNotFoundError: no such directory, or files missing.
    """
    if len(paths) < 2:
        raise ValueError("give two checkpoints or more: ptq compare A B")
    reports = [inspect(path) for path in paths]
    first = {row.layer: row.shape for row in reports[0].layers}
    common = frozenset(first).intersection(*({r.layer for r in o.layers} for o in reports[1:]))
    for path, report in zip(paths[1:], reports[1:], strict=True):
        other = next((r for r in report.layers if first.get(r.layer, r.shape) != r.shape), None)
        if other is not None:
            raise ValueError(
                f"{path} is of another model than {paths[0]}: {other.layer} has the shape "
                f"{list(other.shape)} and not {list(first[other.layer])}; compare checkpoints of "
                "one model"
            )
    if not common:
        raise ValueError(
            f"no layer is quantized in all of {', '.join(map(str, paths))}: compare checkpoints of "
            "one model"
        )
    kept = [kept_evaluations(path) for path in paths]
    chosen = _same_text(kept)
    return Comparison(
        checkpoints=tuple(
            Compared(name=name, report=report, evaluation=evaluation)
            for name, report, evaluation in zip(_names(paths), reports, chosen, strict=True)
        ),
        common=common,
        kinds=kinds(row.layer for row in reports[0].layers if row.layer in common),
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of paths where these differ, else all of each."""
    short = [path.resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def _same_text(kept: Sequence[Sequence[Evaluation]]) -> list[Evaluation | None]:
    """Of each checkpoint the last evaluation on the text, windows and reference that most have;
    of equals, the one that was kept last."""
    counts: dict[tuple[object, ...], int] = {}
    for found in kept:
        for key in dict.fromkeys(map(_conditions, found)):
            counts[key] = counts.get(key, 0) + 1
    if not counts:
        return [None for _ in kept]
    most = max(counts.values())
    wanted = [key for key, count in counts.items() if count == most][-1]
    return [next((e for e in reversed(found) if _conditions(e) == wanted), None) for found in kept]


def _conditions(of: Evaluation) -> tuple[object, ...]:
    """What two evaluations must share to be compared."""
    return of.text, of.reference, of.tokens, of.seq_len
