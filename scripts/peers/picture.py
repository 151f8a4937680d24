"""The picture of a comparison: bars by tool and method."""

from collections.abc import Sequence

from peers.page import Data, Row, number, rows, text_names
from pictures import WIDTH, Theme, picture, text

ROW, LABEL, SCALE = 26, 330, 320


def draw(theme: Theme, told: Data) -> str:
    """A panel for each format at W4A4, a bar for each tool and method: KL on the first text; a ring
    on the second, and the CPU seconds of the run. A shorter bar is better.
    """
    first, *others = text_names(told)
    parts, y = [], 24.0
    for fmt in ("nvfp4", "mxfp4"):
        if not (found := rows(told, fmt, "w4a4")):
            continue
        title = f"{fmt.upper()}, W4A4: KL to the original, nats per token"
        parts.append(text(0, y, title, theme["ink"], font_weight="600", font_size="14"))
        parts.append(text(WIDTH, y, "CPU time", theme["faint"], text_anchor="end"))
        y += 12
        parts.append(
            f'<line x1="{LABEL}" y1="{y:g}" x2="{LABEL}" y2="{y + ROW * len(found):g}" '
            f'stroke="{theme["line"]}"/>'
        )
        unit = SCALE / max(max(row.kl.values()) for row in found)
        for row in found:
            parts += _bar(theme, y, row, unit, [first, *others[:1]])
            y += ROW
        y += 30
    parts.append(text(0, y - 10, _legend(first, others), theme["faint"], font_size="12"))
    about = f"{told['settings']['model']}, W4A4, beside other tools: {_legend(first, others)}"
    return picture(round(y), about, parts)


def _legend(first: str, others: Sequence[str]) -> str:
    ring = f", ring: on {others[0]}" if others else ""
    return f"lower is better; bar and number: on {first}{ring}"


def _bar(theme: Theme, y: float, row: Row, unit: float, names: Sequence[str]) -> list[str]:
    weight = "600" if row.best else "400"
    ink = theme["ink"] if row.ours else theme["faint"]
    fill = theme["ours"] if row.best else theme["faint"]
    middle, length = y + ROW / 2, unit * row.kl[names[0]]
    style = {"font_weight": weight}
    end, parts = length, list[str]()
    for name in names[1:]:
        x = unit * row.kl[name]
        end = max(end, x + 5)
        parts.append(
            f'<circle cx="{LABEL + x:.1f}" cy="{middle:g}" r="4" fill="none" stroke="{ink}" '
            'stroke-width="1.5"/>'
        )
    return [
        text(LABEL - 10, middle + 4.5, row.name, ink, text_anchor="end", **style),
        f'<rect x="{LABEL}" y="{y + 4:g}" width="{length:.1f}" height="{ROW - 8}" rx="2" '
        f'fill="{fill}" fill-opacity="{1 if row.ours else 0.55}"/>',
        *parts,
        text(LABEL + end + 8, middle + 4.5, number(row.kl[names[0]]), ink, **style),
        text(WIDTH, middle + 4.5, f"{row.cpu_seconds:.0f} s", theme["faint"], text_anchor="end"),
    ]
