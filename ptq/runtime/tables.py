"""Results as tables: text on a terminal, HTML in a notebook."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

DIM = '<tr style="opacity:.6">'


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as they are shown; the first column stands on the left, figures on the right.

    Attributes:
        rows: of as many cells as there are columns.
        dim: indices of rows that are there for comparison.
        notes: lines below.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    dim: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Columns two blanks apart, a rule below their names; no line ends in blanks."""
        lines = [self.columns, *self.rows]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        shown = [
            "  ".join(
                cell.rjust(width) if index else cell.ljust(width)
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
        body = [shown[0], rule, *shown[1:]] if self.rows else []
        return "\n".join([*([self.title] if self.title else []), *body, *self.notes])

    def html(self) -> str:
        """A table element, every cell escaped, with its notes as paragraphs."""
        head = "".join(f"<th{_side(i)}>{escape(name)}</th>" for i, name in enumerate(self.columns))
        body = "".join(
            (DIM if index in self.dim else "<tr>")
            + "".join(f"<td{_side(i)}>{escape(cell)}</td>" for i, cell in enumerate(row))
            + "</tr>"
            for index, row in enumerate(self.rows)
        )
        title = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        notes = "".join(f"<p><small>{escape(note)}</small></p>" for note in self.notes)
        rows = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>" if self.rows else ""
        return f"<table>{title}{rows}</table>{notes}"


def _side(column: int) -> str:
    return ' style="text-align:right"' if column else ' style="text-align:left"'


class Tabular:
    """A result that shows itself as tables: ``print(result)``, a line of a notebook, or the prompt
    of an interpreter."""

    def tables(self) -> Sequence[Table]:
        """What is shown, in order."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n\n".join(table.text() for table in self.tables())

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """What Jupyter shows."""
        return "".join(table.html() for table in self.tables())
