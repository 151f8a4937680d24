#!/usr/bin/env python
"""The numbers of the layout: how much code, how deep, how wide its functions, what a run touches.

    python scripts/house.py            # of this checkout
    python scripts/house.py PATH       # of another one, such as an older version

Counts are of library code: ``ptq``, ``kernels`` and ``calib``, each file once.
"""

import ast
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median, quantiles
from typing import TypedDict

Function = ast.FunctionDef | ast.AsyncFunctionDef
PROBE = """
import json, sys
from importlib import import_module
from pathlib import Path
import ptq
assert Path(ptq.__file__).is_relative_to(sys.argv[2]), f"{ptq.__file__} is imported instead"
for name in ("ptq.pipeline.recipe", "ptq.recipe"):
    try:
        recipe = import_module(name).Recipe
        break
    except ImportError:
        continue
calls, original = [], recipe.for_module
recipe.for_module = lambda self, *names: (calls.append(names[0]), original(self, *names))[1]
from ptq.__main__ import main
sys.argv = ["ptq", "quantize", "--model", "demo", "--format", "nvfp4", "--samples", "8",
            "--seq-len", "128", "--device", "cpu", "--quiet", "--out", sys.argv[1]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
used = {name for name in sys.modules if name.split(".")[0] == "ptq"}
print(json.dumps({"calls": len(calls), "layers": len(set(calls)), "modules": sorted(used)}))
"""


class Run(TypedDict):
    """What ``ptq quantize --model demo`` does: calls of ``Recipe.for_module``, for how many layers,
    and the modules of ptq that it imports."""

    calls: int
    layers: int
    modules: list[str]


def modules(root: Path) -> dict[str, Path]:
    """The files of the library by the name of their module."""
    result = {}
    for folder, prefix in (("ptq", "ptq"), ("kernels", "ptq.kernels"), ("calib", "ptq.calib")):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            if (root / "ptq" / parts[0]).is_symlink() and folder == "ptq":
                continue
            parts = parts[:-1] if parts and parts[-1] == "__init__" else parts
            result[".".join((prefix, *parts))] = path
    return result


def functions(tree: ast.AST) -> Iterator[Function]:
    """All functions that are no Triton kernels."""
    for node in ast.walk(tree):
        kernel = any("jit" in ast.unparse(d) for d in getattr(node, "decorator_list", ()))
        if isinstance(node, Function) and not kernel:
            yield node


def width(function: Function) -> int:
    """How many parameters it has, ``self`` and ``cls`` apart."""
    a = function.args
    names = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def floors(files: dict[str, Path]) -> int:
    """How many modules lie on the longest chain of imports; imports inside functions count too."""
    imports: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        tree = ast.parse(path.read_text("utf-8"))
        for node in (n for part in tree.body if not _for_types(part) for n in ast.walk(part)):
            if isinstance(node, ast.ImportFrom) and node.module:
                targets = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                continue
            # a package stands for nothing if one of its modules is what is meant
            known = [target for target in targets if target in files]
            imports[name] |= {t for t in known if not any(k.startswith(f"{t}.") for k in known)}
        imports[name] -= {name, "ptq"}  # the root names what is lazily imported from everywhere

    @cache
    def height(name: str) -> int:
        return 1 + max((height(other) for other in imports[name]), default=0)

    return max(map(height, files))


def _for_types(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test)


def layers(root: Path) -> int:
    """How many layers the contracts in ``pyproject.toml`` put above one another."""
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    return sum(len(c["layers"]) for c in contracts if c["type"] == "layers")


def probe(root: Path, out: Path) -> Run:
    """Run ``ptq quantize`` of the checkout at ``root``, in a process of its own.

    Raises:
        RuntimeError: the run failed, or was one of another copy of ptq.
    """
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", PROBE, str(out), str(root)]
    done = subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def report(root: Path, run: Run) -> list[tuple[str, str]]:
    """(what, figure) of a checkout."""
    files = modules(root)
    texts = {name: path.read_text("utf-8") for name, path in files.items()}
    lines = {name: text.splitlines() for name, text in texts.items()}
    every = [line for text in lines.values() for line in text]
    pairs = [(name, f) for name, text in texts.items() for f in functions(ast.parse(text))]
    inside = [width(f) for name, f in pairs if name.startswith("ptq.kernels")]
    outside = [width(f) for name, f in pairs if not name.startswith("ptq.kernels")]
    lengths = [(f.end_lineno or 0) - f.lineno + 1 for _, f in pairs]
    on_path = [name for name in run["modules"] if name in files and lines[name]]

    def share(wide: list[int], more_than: int) -> str:
        count = sum(w > more_than for w in wide)
        return f"{count} of {len(wide)} ({count / max(len(wide), 1):.1%})"

    long = sum(len(line) > 100 for line in every)
    cuts = quantiles(lengths, n=100)
    size = sum(len(lines[name]) for name in on_path)
    return [
        ("files, lines", f"{len(files)}, {len(every)}"),
        ("floors of the import graph", str(floors(files))),
        ("layers in the contract", str(layers(root))),
        ("modules on the main path, lines", f"{len(on_path)}, {size}"),
        ("Recipe.for_module calls in a run, layers", f"{run['calls']}, {run['layers']}"),
        ("functions with more than 7 parameters, kernels", share(inside, 7)),
        ("functions with more than 7 parameters, rest", share(outside, 7)),
        ("functions with more than 12 parameters", share(inside + outside, 12)),
        ("lines over 100 characters", f"{long} ({long / len(every):.1%})"),
        (
            "function lines: median, p99, max",
            f"{median(lengths):.0f}, {cuts[98]:.0f}, {max(lengths)}",
        ),
    ]


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else __file__).resolve()
    root = root if root.is_dir() else root.parent.parent
    with tempfile.TemporaryDirectory() as folder:
        run = probe(root, Path(folder) / "out")
    for what, figure in report(root, run):
        print(f"{what:50} {figure}")


if __name__ == "__main__":
    main()
