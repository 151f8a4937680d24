"""The script that counts, on a small tree."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def house(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("house", root / "scripts" / "house.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_of_a_small_tree(house: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "ptq" / "wing").mkdir(parents=True)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "ptq" / "kernels").symlink_to("../kernels")
    (tmp_path / "ptq" / "__init__.py").write_text("from ptq.wing.top import f\n")
    (tmp_path / "ptq" / "wing" / "top.py").write_text(
        "from ptq.wing import middle\n\n\ndef f(a, b, c, d, e, f, g, h):\n    return a\n"
    )
    (tmp_path / "ptq" / "wing" / "middle.py").write_text("import ptq.kernels.low\n")
    (tmp_path / "kernels" / "low.py").write_text(
        "@triton.jit\ndef k(a, b):\n    pass\n" + "#" * 101
    )
    files = house.modules(tmp_path)
    assert set(files) == {"ptq", "ptq.wing.top", "ptq.wing.middle", "ptq.kernels.low"}
    assert house.floors(files) == 4  # ptq, top, middle, low
    (tmp_path / "pyproject.toml").write_text(
        '[[tool.importlinter.contracts]]\ntype = "layers"\nlayers = ["a", "b | c"]\n'
        '[[tool.importlinter.contracts]]\ntype = "forbidden"\n'
    )
    run = {"calls": 30, "layers": 28, "modules": ["ptq.wing.top", "elsewhere"]}
    (tmp_path / "kernels" / "more.py").write_text("def g(a):\n    pass\n\n\ndef h(a):\n    pass\n")
    figures = dict(house.report(tmp_path, run))
    assert figures["files, lines"] == "5, 17"
    assert figures["layers in the contract"] == "2"
    assert figures["modules on the main path, lines"] == "1, 5"
    assert figures["Recipe.for_module calls in a run, layers"] == "30, 28"
    assert figures["functions with more than 7 parameters, rest"] == "1 of 1 (100.0%)"
    assert figures["functions with more than 7 parameters, kernels"] == "0 of 2 (0.0%)"
    assert figures["lines over 100 characters"].startswith("1 (")
