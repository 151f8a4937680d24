"""Write the reference part of docs/python.md from signatures and docstrings.

python scripts/api_reference.py            # rewrite
python scripts/api_reference.py --check    # exit 1 if it is out of date
"""

import argparse
import inspect
import re
import sys
import textwrap
from pathlib import Path

import ptq

PAGE = Path(__file__).resolve().parent.parent / "docs" / "python.md"
BEGIN, END = "<!-- reference: written by scripts/api_reference.py -->", "<!-- /reference -->"
CALLS = ("analyze", "quantize", "forecast", "load", "evaluate", "inspect", "verify", "convert")
RESULTS = ("Study", "Written", "Forecast", "Evaluation", "Report", "Verdict")
SECTIONS = ("Args", "Returns", "Raises", "Attributes")


def plain(text: str) -> str:
    """Markdown of a docstring: roles and double backticks become single ones."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return text.replace("``", "`")


def markdown(about: str) -> str:
    """A docstring: paragraphs, code, and a list for every section."""
    lines, parts = inspect.cleandoc(about).splitlines(), list[str]()
    body, section = list[str](), None
    for line in [*lines, "Raises:"]:
        name = line.rstrip(":")
        if not (line.endswith(":") and name in SECTIONS):
            body.append(line)
            continue
        parts.append(listed(section, body) if section else paragraphs(body))
        body, section = [], name
    return "\n\n".join(part for part in parts if part)


def paragraphs(lines: list[str]) -> str:
    parts = []
    for part in "\n".join(lines).strip().split("\n\n"):
        if part.startswith("    "):
            parts.append(f"```python\n{textwrap.dedent(part)}\n```")
        elif part:
            parts.append(plain(" ".join(part.split())))
    return "\n\n".join(parts)


def listed(section: str, lines: list[str]) -> str:
    """``name: text`` items, each a line of a list; text without names as it is."""
    items: list[str] = []
    for line in textwrap.dedent("\n".join(lines)).strip().splitlines():
        if line.startswith(" ") and items:
            items[-1] += " " + line.strip()
        else:
            items.append(line.strip())
    if section == "Returns":
        return f"Returns: {plain(' '.join(items))}"
    shown = []
    for item in items:
        names, colon, text = item.partition(": ")
        shown.append(
            f"- {names if '*' in names else f'`{names}`'}: {plain(text)}" if colon else plain(item)
        )
    heading = {"Args": "Arguments", "Attributes": "Fields", "Raises": "Raises"}[section]
    return f"{heading}:\n\n" + "\n".join(shown)


def signature(name: str) -> str:
    """``ptq.name(…)`` without annotations; a star stands for what is by name only."""
    shown = []
    for p in inspect.signature(getattr(ptq, name)).parameters.values():
        if p.kind is p.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        if p.kind is p.VAR_KEYWORD:
            shown.append("…")
        else:
            shown.append(p.name if p.default is p.empty else f"{p.name}={p.default!r}")
    return f"ptq.{name}({', '.join(shown)})"


def reference() -> str:
    parts = []
    for name in CALLS:
        parts.append(f"### `ptq.{name}`\n\n```text\n{signature(name)}\n```")
        parts.append(markdown(getattr(ptq, name).__doc__))
    for name in RESULTS:
        parts.append(f"### `ptq.{name}`")
        parts.append(markdown(getattr(ptq, name).__doc__))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether it is current")
    check = parser.parse_args().check
    page = PAGE.read_text("utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    written = f"{before}{BEGIN}\n\n{reference()}\n\n{END}{after}"
    if not check:
        PAGE.write_text(written, "utf-8")
    elif page != written:
        sys.exit(f"{PAGE} is out of date: run python scripts/api_reference.py")


if __name__ == "__main__":
    main()
