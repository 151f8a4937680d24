"""Laws that comments cite are written down, and what is written down is relied on."""

import re
import subprocess
from pathlib import Path

import pytest

# A citation stands in brackets, in a list of them, or at the start of a docstring.
CITED = re.compile(r"\b([FGKCA]\d{1,2})\b(?!\s*=|\w)")
DOCUMENTS = re.compile(r"\b(kernels|interop|accuracy|design|formats|gptq|study|peers)\.md\b")


@pytest.fixture(scope="module")
def sources(root: Path) -> dict[str, str]:
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=root, capture_output=True, text=True
    ).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    return {
        name: (root / name).read_text("utf-8")
        for name in listed
        if (root / name).is_file() and name != "tests/test_laws.py"
    }


def citations(text: str) -> set[str]:
    """Laws cited in comments and docstrings: in brackets, or at the start of a docstring."""
    places = re.findall(r"\(([^()]*)\)|\"\"\"([FGKCA]\d[^\n]*)|# ([FGKCA]\d+:?)", text)
    inside = " ; ".join(part.rstrip('"') for place in places for part in place if part)
    bare = [piece for piece in re.split(r"[;]", inside) if re.search(r"\b[FGKCA]\d{1,2}\b", piece)]
    found: set[str] = set()
    for piece in bare:
        if '"' in piece or "'" in piece:
            continue
        for first, last in re.findall(r"\b([FGKCA]\d+)[–-]([FGKCA]?\d+)\b", piece):
            low, high = int(first[1:]), int(last.lstrip("FGKCA"))
            found |= {f"{first[0]}{n}" for n in (low, high)}
        found |= set(CITED.findall(piece))
    return found


def test_every_law_that_is_cited_is_written_down(root: Path, sources: dict[str, str]) -> None:
    laws = set(re.findall(r"^\*\*([FGKCA]\d+)\*\*", (root / "docs/laws.md").read_text(), re.M))
    # dtypes of safetensors, instructions and schemes look like laws
    alike = {"F32", "F16", "F64", "F8", "A16", "A4", "A8"} - laws
    cited = {name: citations(text) - alike for name, text in sources.items()}
    missing = {name: sorted(found - laws) for name, found in cited.items() if found - laws}
    assert missing == {}
    used = {law for found in cited.values() for law in found}
    assert sorted(laws - used) == [], (
        "nothing cites these: cite them where they are held, or drop them"
    )


def test_no_comment_sends_the_reader_to_a_document_that_is_not_here(
    sources: dict[str, str],
) -> None:
    sent = {
        f"{name}:{number}"
        for name, text in sources.items()
        for number, line in enumerate(text.splitlines(), 1)
        if DOCUMENTS.search(line)
    }
    assert sent == set()
