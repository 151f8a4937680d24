"""What ``import ptq`` shows: names, signatures and help, the same for people and type checkers."""

import ast
import inspect
import pydoc
from pathlib import Path
from typing import get_type_hints

import pytest

import ptq
from ptq.api.arguments import LoadOptions, QuantizeOptions

CALLS = ["analyze", "convert", "evaluate", "forecast", "inspect", "load", "quantize", "verify"]
UNPACKED = {"quantize": QuantizeOptions, "load": LoadOptions}


def test_dir_is_what_is_offered():
    assert dir(ptq) == sorted(dir(ptq)) and set(dir(ptq)) == set(ptq.__all__)
    assert all(getattr(ptq, name) is not None for name in dir(ptq))
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = ptq.quantise


def test_type_checkers_and_programs_see_the_same(root: Path):
    """Names under TYPE_CHECKING are those that are found lazily, in the same modules."""
    tree = ast.parse((root / "ptq" / "__init__.py").read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {
        alias.asname or alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == ptq._LAZY
    assert set(told) | {"__version__"} == set(ptq.__all__)


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_is_documented(name: str):
    call = getattr(ptq, name)
    parameters = inspect.signature(call).parameters.values()
    wanted = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    wanted |= set(UNPACKED[name].__annotations__) if name in UNPACKED else set()
    about = call.__doc__ or ""
    arguments = about.partition("Args:")[2].partition("Returns:")[0].partition("Raises:")[0]
    named = {
        word.strip("*` ")
        for line in arguments.splitlines()
        for head in line.split(";")
        for word in head.partition(":")[0].split(",")
    }
    assert wanted - named == set()
    assert "Raises:" in about


def test_help_lists_calls_and_results():
    text = pydoc.plain(pydoc.render_doc(ptq))
    for name in CALLS:
        assert f"    {name}(" in text
    assert "class Recipe" in text and "import_module" not in text


def test_hints_resolve():
    for name in CALLS:
        assert get_type_hints(getattr(ptq, name))["return"] is not None
