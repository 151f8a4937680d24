"""README and docs say what is: commands parse, options and arguments exist, links lead somewhere,
what is generated is current."""

import ast
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.main import get_command

import ptq
from ptq.api.arguments import AnalyzeOptions, LoadOptions, QuantizeOptions
from ptq.cli.commands import UsageError, app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
COMMANDS = get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue] - a group
UNPACKED = {
    "analyze": AnalyzeOptions, "quantize": QuantizeOptions, "forecast": QuantizeOptions,
    "load": LoadOptions,
}  # fmt: skip
# Options of other programs, where the text says so.
FOREIGN = {"--nproc-per-node", "--max-model-len", "--install-completion", "--help"}
FOREIGN |= {"--quantization", "--enable-expert-parallel"}  # of vLLM


def blocks(page: Path, language: str) -> Iterator[str]:
    """Fenced blocks of a language."""
    text = page.read_text("utf-8")
    yield from re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(page: Path) -> Iterator[list[str]]:
    """Lines of blocks without a language, comments taken off, as words."""
    text = re.sub(r"^```\w+\n.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    lines = "\n".join(re.findall(r"^```\n(.*?)^```", text, re.M | re.S))
    lines += "\n" + "\n".join(re.findall(r"^    (ptq .*)", text, re.M))
    for line in lines.splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def arguments(words: list[str]) -> list[str] | None:
    """What follows ``ptq`` in a command; None for one of another program."""
    if "-m" in words and words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    if words[0] != "ptq":
        return None
    return words[1 : words.index(">")] if ">" in words else words[1:]


def options_of(name: str) -> set[str]:
    return {o for p in COMMANDS[name].params for o in (*p.opts, *p.secondary_opts)} | {"--model"}


def test_there_are_commands_to_look_at():
    found = [words for page in PAGES for words in commands(page) if arguments(words)]
    assert {words[0] for words in map(arguments, found) if words} >= {
        *("quantize", "eval", "chat", "serve", "analyze", "merge", "convert", "verify", "inspect"),
    }


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_parses(page: Path):
    for words in commands(page):
        rest = arguments(words)
        if rest is None:
            program = ROOT / (words[1] if words[0] == "python" else words[0])
            if words[0] not in ("pip", "pytest", "torchrun", "vllm"):
                assert program.is_file(), f"{page.name}: {' '.join(words)}"
                script = program.read_text("utf-8")
                assert all(w.split("=")[0] in script for w in words[2:] if w.startswith("--"))
            continue
        try:
            COMMANDS[rest[0]].make_context(rest[0], list(rest[1:]))
        except (UsageError, KeyError, typer.BadParameter) as error:
            pytest.fail(f"{page.name}: {' '.join(words)}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_what_is_to_be_quantized_is_a_recipe(ptq, page: Path, tmp_path: Path):
    """Values of choices, too: each command prints its recipe."""
    for words in commands(page):
        rest = arguments(words)
        if rest and rest[0] == "quantize" and "--recipe" not in rest:
            result = ptq(*rest, "--show-recipe")
            assert result.code == 0, f"{page.name}: {' '.join(words)}: {result.err}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_option_that_is_named_exists(page: Path):
    """In code within sentences: ``ptq verify DIR``, ``--eight-bit 10%``."""
    known = set().union(*map(options_of, COMMANDS)) | FOREIGN
    scripts = "".join(path.read_text("utf-8") for path in (ROOT / "scripts").glob("*.py"))
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    for code in re.findall(r"`([^`\n]+)`", text):
        words = code.replace("…", " ").split()
        used = {w.split("=")[0].rstrip(",;.") for w in words if re.match(r"--[a-z]", w)}
        if words[:1] == ["ptq"] and len(words) > 1 and not words[1].startswith("-"):
            assert words[1] in COMMANDS, f"{page.name}: {code}"
            assert used <= options_of(words[1]) | FOREIGN, f"{page.name}: {code}"
        else:
            unknown = {option for option in used - known if option not in scripts}
            assert unknown == set(), f"{page.name}: {code}"


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_leads_somewhere(page: Path):
    text = page.read_text("utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text.replace("]\n(", "]("))
    links += re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_calls_what_there_is(page: Path):
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if not (isinstance(node, ast.Attribute) and ast.unparse(node.value) == "ptq"):
                continue
            assert node.attr in ptq.__all__, f"{page.name}: ptq.{node.attr}"
        for call in (n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call)):
            owner, _, name = ast.unparse(call.func).rpartition(".")
            if owner == "ptq" and not name[0].isupper():
                names = set(inspect.signature(getattr(ptq, name)).parameters)
                names |= UNPACKED[name].__annotations__.keys() if name in UNPACKED else set()
                given = {k.arg for k in call.keywords if k.arg}
                assert given <= names, f"{page.name}: {ast.unparse(call)}"


def test_the_index_lists_every_page():
    text = (ROOT / "docs" / "index.md").read_text("utf-8")
    unlisted = [p.name for p in PAGES[1:] if p.name != "index.md" and f"({p.name})" not in text]
    assert unlisted == []


def test_every_choice_is_explained():
    """The table of docs/recipes.md has all options that change the numbers."""
    text = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    recipe = {
        p.opts[0]
        for p in COMMANDS["quantize"].params
        if getattr(p, "rich_help_panel", None) == "Recipe: what changes the numbers"
    }
    assert len(recipe) > 10
    assert sorted(o for o in recipe if f"`{o}`" not in text and f"{o} " not in text) == []


@pytest.mark.parametrize("script", ["api_reference", "pictures", "readme_tables"])
def test_what_scripts_write_is_current(script: str):
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
