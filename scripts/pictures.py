"""Draw the pictures of README and docs, light and dark, as SVG without fonts or scripts of its own.

python scripts/pictures.py            # write docs/loop-*.svg
python scripts/pictures.py --check    # exit 1 if one is out of date
"""

import argparse
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path

from ptq.drawing import style
from ptq.drawing.style import FONT, SERIES

DOCS = Path(__file__).resolve().parent.parent / "docs"
THEMES = {
    theme: {"ink": of["ink"], "faint": of["soft"], "line": of["line"], "ours": SERIES[theme][0]}
    for theme, of in style.THEMES.items()
}
WIDTH = 760
Theme = dict[str, str]


def text(x: float, y: float, words: str, fill: str, **style: str) -> str:
    attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
    return f'<text x="{x:g}" y="{y:g}" fill="{fill}"{attributes}>{escape(words)}</text>'


def picture(height: int, title: str, parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="{FONT}" font-size="13" role="img" '
        f'aria-label="{escape(title, quote=True)}">'
    )
    return "\n".join([head, f"<title>{escape(title)}</title>", *parts, "</svg>\n"])


# The loop: (x, y, width, words); arrows join boxes by their numbers, the last one goes back.
BOXES = (
    (0, 40, 132, ("model on disk", "one block at a time")),
    (157, 40, 132, ("balance", "outliers into weights")),
    (314, 40, 132, ("observe", "Hessian of inputs")),
    (471, 40, 132, ("solve", "scales and codes")),
    (628, 40, 132, ("install", "QuantLinear")),
    (0, 132, 132, ("text", "windows of tokens")),
    (471, 132, 289, ("packed block on disk", "an interrupted run goes on here")),
)
ARROWS = ((0, 1), (1, 2), (2, 3), (3, 4))


def loop(theme: Theme) -> str:
    """The loop over decoder blocks."""
    parts = [
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="{theme["faint"]}"/>'
        "</marker></defs>"
    ]
    for x, y, width, (first, second) in BOXES:
        parts.append(
            f'<rect x="{x + 0.5}" y="{y + 0.5}" width="{width - 1}" height="47" rx="6" '
            f'fill="none" stroke="{theme["line"]}"/>'
        )
        middle = x + width / 2
        style = {"text_anchor": "middle"}
        parts.append(text(middle, y + 20, first, theme["ink"], font_weight="600", **style))
        parts.append(text(middle, y + 38, second, theme["faint"], font_size="12", **style))
    for a, b in ARROWS:
        x, y, width, _ = BOXES[a]
        parts.append(arrow(theme, f"M{x + width} {y + 24} H{BOXES[b][0] - 1}"))
    parts.append(arrow(theme, "M132 156 H223 V90"))
    parts.append(arrow(theme, "M694 88 V131"))
    parts.append(arrow(theme, "M694 40 V18 H66 V39"))
    back = "the next block reads what the quantized block computes"
    parts.append(text(380, 13, back, theme["faint"], text_anchor="middle", font_size="12"))
    return picture(184, "The loop over decoder blocks", parts)


def arrow(theme: Theme, path: str) -> str:
    return (
        f'<path d="{path}" fill="none" stroke="{theme["faint"]}" stroke-width="1.3" '
        'marker-end="url(#tip)"/>'
    )


PICTURES: dict[str, Callable[[Theme], str]] = {"loop": loop}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether they are current")
    check = parser.parse_args().check
    for name, draw in PICTURES.items():
        for theme, colours in THEMES.items():
            file, drawn = DOCS / f"{name}-{theme}.svg", draw(colours)
            if not check:
                file.write_text(drawn, "utf-8")
            elif not file.exists() or file.read_text("utf-8") != drawn:
                sys.exit(f"{file} is out of date: run python scripts/pictures.py")


if __name__ == "__main__":
    main()
