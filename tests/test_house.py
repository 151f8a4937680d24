"""The plan of the house: contracts that hold and are seen to fail, and what no linter checks."""

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

WINGS = {
    "reading": "ptq/reading",
    "numerics": "ptq/numerics",
    "model": "ptq/model",
    "text": "ptq/text",
    "calib": "calib",
    "checkpoint": "ptq/checkpoint",
    "runtime": "ptq/runtime",
    "pipeline": "ptq/pipeline",
    "bench": "ptq/bench",
    "drawing": "ptq/drawing",
    "kernels": "kernels",
    "cli": "ptq/cli",
    "api": "ptq/api",
}
# (contract, module that breaks it, what it imports)
VIOLATIONS = [
    ("seven layers", "ptq/cli/commands.py", "ptq.api.runs"),
    ("seven layers", "ptq/runtime/load.py", "ptq.pipeline.recipe"),
    ("seven layers", "ptq/pipeline/plan.py", "ptq.bench.shapes"),
    ("seven layers", "ptq/checkpoint/writer.py", "ptq.calib.hessian"),
    ("seven layers", "ptq/model/structure.py", "ptq.text.builtin"),
    ("seven layers", "ptq/reading/schema.py", "ptq.model.source"),
    ("a checkpoint runs without what made it", "ptq/runtime/evaluate.py", "ptq.calib.hessian"),
    ("calibration knows models, and nothing else of ptq", "calib/fold.py", "ptq.numerics.scales"),
    ("numerics is pure", "ptq/numerics/gptq.py", "json"),
    ("numerics is pure", "ptq/numerics/gptq.py", "tempfile"),
    ("numerics is pure", "ptq/numerics/formats.py", "ptq.model.source"),
    ("pictures are drawn of numbers, and of nothing that ptq knows", "ptq/drawing/svg.py", "torch"),
    ("kernels stand alone", "kernels/tiles.py", "ptq.numerics.formats"),
    ("transformers in model, text, runtime and pipeline only", "calib/walk.py", "transformers"),
    ("vLLM in runtime only", "ptq/checkpoint/engines.py", "vllm"),
    ("only the command line prints", "ptq/pipeline/run.py", "rich"),
    ("only the command line prints", "ptq/text/windows.py", "typer"),
]
# Modules whose tests are elsewhere; this list only shrinks.
TESTED_ELSEWHERE = {
    "kernels/dequantize": "by the operator that launches it",
    "kernels/epilogue": "by the operators that launch it",
    "kernels/grouped": "by the operator that launches it",
    "kernels/quantize": "by the operator that launches it",
    "kernels/w4a16": "by the operator that launches it",
    "kernels/w4a4": "by the operator that launches it",
    "model/source": "a Protocol: by its two classes",
    "checkpoint/dialect": "a record: by every dialect",
}
# Test files of no module of their name.
WITHOUT_MODULE = {"kernels/test_on_gpu", "checkpoint/test_golden"}


def modules(root: Path) -> dict[str, Path]:
    return {
        f"{wing}/{path.stem}": path
        for wing, folder in WINGS.items()
        for path in sorted((root / folder).glob("*.py"))
        if path.stem != "__init__"
    }


@pytest.fixture(scope="module")
def trees(root: Path) -> dict[str, ast.Module]:
    """Every file of the library by its path without suffix, ``ptq/hf`` and ``kernels/tiles``."""
    return {
        str(path.relative_to(root).with_suffix("")): ast.parse(path.read_text("utf-8"))
        for folder in ("ptq", "kernels", "calib")
        for path in sorted((root / folder).rglob("*.py"))
        if not path.is_relative_to(root / "ptq" / "kernels")
        and not path.is_relative_to(root / "ptq" / "calib")
    }


@pytest.fixture(scope="module")
def copy(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library without its model, and pyproject.toml."""
    target = tmp_path_factory.mktemp("house")
    for name in ("ptq", "kernels", "calib"):
        shutil.copytree(
            root / name,
            target / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("demo", "__pycache__"),
        )
    shutil.copy(root / "pyproject.toml", target)
    return target


def broken(folder: Path) -> list[str]:
    """The contracts that do not hold for the code in ``folder``."""
    command = [
        sys.executable, "-c",
        "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command; "
        "sys.argv = ['lint-imports', '--no-cache']; lint_imports_command()",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert any(" KEPT" in line or " BROKEN" in line for line in lines), done.stdout + done.stderr
    return [line.partition(" BROKEN")[0] for line in lines if " BROKEN" in line]


def test_all_contracts_hold(copy: Path) -> None:
    assert broken(copy) == []


@pytest.mark.parametrize(("contract", "module", "imported"), VIOLATIONS)
def test_a_planted_violation_breaks_its_contract(
    copy: Path, contract: str, module: str, imported: str
) -> None:
    file = copy / module
    before = file.read_text("utf-8")
    try:
        file.write_text(f"{before}\nimport {imported}\n", "utf-8")
        assert contract in broken(copy)
    finally:
        file.write_text(before, "utf-8")


@pytest.mark.parametrize("file", ["ptq/attic.py", "ptq/attic/__init__.py"])
def test_a_module_of_no_layer_breaks_the_layers(copy: Path, file: str) -> None:
    """A new wing gets a place among the layers before it gets code."""
    attic = copy / file
    attic.parent.mkdir(exist_ok=True)
    try:
        attic.write_text("", "utf-8")
        assert broken(copy) == ["seven layers"]
    finally:
        attic.unlink()
        if attic.parent.name == "attic":
            attic.parent.rmdir()


def test_every_contract_has_a_planted_violation(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    names = {contract["name"] for contract in project["tool"]["importlinter"]["contracts"]}
    assert names == {contract for contract, _, _ in VIOLATIONS}


def test_every_wing_is_looked_at(root: Path) -> None:
    folders = {path.name for path in (root / "ptq").iterdir() if any(path.glob("*.py"))}
    assert folders == WINGS.keys()


def test_every_module_says_what_it_is_for(root: Path, trees: dict[str, ast.Module]) -> None:
    scripts = {
        f"{folder}/{path.stem}": ast.parse(path.read_text("utf-8"))
        for folder in ("scripts", "examples")
        for path in (root / folder).glob("*.py")
    }
    assert [name for name, tree in (trees | scripts).items() if not ast.get_docstring(tree)] == []


def test_tests_mirror_modules(root: Path) -> None:
    names = set(modules(root))
    tests = {
        f"{path.parent.name}/{path.stem}"
        for wing in WINGS
        for path in (root / "tests" / wing).glob("test_*.py")
    }
    expected = {f"{name.split('/')[0]}/test_{name.split('/')[1]}" for name in names}
    assert tests - expected == WITHOUT_MODULE
    untested = {t.replace("/test_", "/") for t in expected - tests}
    assert untested - TESTED_ELSEWHERE.keys() == set(), "give these a test file"
    assert TESTED_ELSEWHERE.keys() - untested == set(), "these have one now: shorten the list"


Function = ast.FunctionDef | ast.AsyncFunctionDef


def decorated(function: Function, word: str) -> bool:
    return any(word in ast.unparse(decorator) for decorator in function.decorator_list)


def test_no_function_has_more_than_twelve_parameters(trees: dict[str, ast.Module]) -> None:
    """But for Triton kernels, and the commands of the command line, whose parameters are
    options."""
    wide = []
    for name, tree in trees.items():
        spared = "guarded" if name.startswith("ptq/cli/") else "triton.jit"
        for node in ast.walk(tree):
            if not isinstance(node, Function) or decorated(node, spared):
                continue
            arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            if len([a for a in arguments if a.arg not in ("self", "cls")]) > 12:
                wide.append(f"{name}.{node.name}")
    assert wide == []


def test_only_the_command_line_prints(trees: dict[str, ast.Module]) -> None:
    printing = [
        f"{name}:{node.lineno}"
        for name, tree in trees.items()
        # the compile check is a program of its own
        if not name.startswith("ptq/cli/") and name != "ptq/bench/compile_check"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert printing == []


def test_numerics_reads_and_writes_no_files(trees: dict[str, ast.Module]) -> None:
    """What needs no import to do so; imports are the contract's."""
    reading = [
        f"{name}:{node.lineno}"
        for name, tree in trees.items()
        if name.startswith("ptq/numerics/")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("open", "torch.load", "torch.save", "input")
    ]
    assert reading == []


def test_nothing_compares_with_the_name_of_a_format(trees: dict[str, ast.Module]) -> None:
    """What differs between formats is in their records, and in tables that are keyed by them."""
    from ptq.numerics.formats import FORMATS

    spared = (
        # which cases the compile check covers is a list of names
        "ptq/bench/compile_cases",
        "ptq/bench/compile_check",
        # gpt-oss says "mxfp4" for its own packing: quant_method of a source, no format of ours
        "ptq/model/checkpoint_source",
    )
    compared = [
        f"{name}:{node.lineno}"
        for name, tree in trees.items()
        if name not in spared
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and part.value in FORMATS
    ]
    assert compared == []
