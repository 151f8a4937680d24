"""Results as tables: text on a terminal, HTML in a notebook."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

DIM = '<tr style="opacity:.6">'


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as they are shown; words stand on the left, figures on the right.

    Attributes:
        rows: of as many cells as there are columns.
        words: indices of columns of words, beside the first one.
        dim: indices of rows that are there for comparison.
        notes: lines below.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: frozenset[int] = frozenset()
    dim: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()

    def left(self, column: int) -> bool:
        """Whether a column stands on the left."""
        return not column or column in self.words

    def text(self) -> str:
        """Columns two blanks apart, a rule below their names; no line ends in blanks."""
        lines = [self.columns, *self.rows]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        shown = [
            "  ".join(
                cell.ljust(width) if self.left(index) else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
        body = [shown[0], rule, *shown[1:]] if self.rows else []
        return "\n".join([*([self.title] if self.title else []), *body, *self.notes])

    def html(self) -> str:
        """A table element, every cell escaped, with its notes as paragraphs."""
        sides = [
            f' style="text-align:{"left" if self.left(i) else "right"}"'
            for i in range(len(self.columns))
        ]
        head = "".join(
            f"<th{side}>{escape(name)}</th>" for side, name in zip(sides, self.columns, strict=True)
        )
        body = "".join(
            (DIM if index in self.dim else "<tr>")
            + "".join(
                f"<td{side}>{escape(cell)}</td>" for side, cell in zip(sides, row, strict=True)
            )
            + "</tr>"
            for index, row in enumerate(self.rows)
        )
        title = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        notes = "".join(f"<p><small>{escape(note)}</small></p>" for note in self.notes)
        rows = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>" if self.rows else ""
        return f"<table>{title}{rows}</table>{notes}"


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
