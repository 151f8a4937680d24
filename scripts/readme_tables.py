"""Write the table of formats into README.md, from the code that the formats are.

python scripts/readme_tables.py            # rewrite
python scripts/readme_tables.py --check    # exit 1 if the README is out of date
"""

import argparse
import sys
from pathlib import Path

import torch

from ptq.numerics.formats import FORMATS, Format
from ptq.pipeline.recipe import Recipe

README = Path(__file__).resolve().parent.parent / "README.md"
SCALES = {
    torch.float8_e8m0fnu: "power of two (E8M0)",
    torch.float8_e4m3fn: "E4M3, and one fp32 factor a tensor",
    torch.bfloat16: "bfloat16",
}
BEGIN, END = "<!-- formats: written by scripts/readme_tables.py -->", "<!-- /formats -->"


def row(fmt: Format) -> str:
    element = fmt.element
    values = sorted({abs(v) for v in element.written})
    kind = SCALES[fmt.scale_dtype]
    shown = (
        ", ".join(f"{v:g}" for v in values)
        if len(values) <= 8
        else f"{len(values)} magnitudes up to {element.max:g}"
    )
    rotation = Recipe.default(fmt.name).rotation
    cells = (
        f"`{fmt.name}`",
        f"{element.name.upper()}: {shown}",
        str(fmt.group_size) if fmt.group_size else "a row",
        kind,
        f"{fmt.bits_per_weight:g}",
        "none" if rotation == 1 else str(rotation),
    )
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """The formats in markdown, one row each."""
    head = (
        "| format | element, magnitudes | group | scale of a group | bits per weight "
        "| default rotation |"
    )
    return "\n".join([head, "|---|---|---|---|---|---|", *(row(fmt) for fmt in FORMATS.values())])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="only say whether the README is current"
    )
    check = parser.parse_args().check
    text = README.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        print(f"error: {README.name} lacks the markers {BEGIN} … {END}", file=sys.stderr)
        return 2
    fresh = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if check and fresh != text:
        print(
            "error: the table of formats is out of date: run python scripts/readme_tables.py",
            file=sys.stderr,
        )
        return 1
    if fresh != text:
        README.write_text(fresh, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
