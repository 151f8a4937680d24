"""The installed package: its folders, links and wheel, and what it must not shadow."""

import ast
import importlib.util
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

# Used if there, with another way where they are not; not even an extra asks for them.
OPTIONAL = {"vllm", "gemlite"}
HEAVY = {"torch", "transformers", "triton", "accelerate", "safetensors", "numpy", "rich", "typer"}


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, object]:
    return tomllib.loads((root / "pyproject.toml").read_text())


def sources(root: Path) -> list[Path]:
    """Every Python file below ptq/, links followed."""
    return [
        Path(folder) / name
        for folder, _, names in os.walk(root / "ptq", followlinks=True)
        for name in names
        if name.endswith(".py")
    ]


def test_every_folder_is_a_listed_package(root: Path, project: dict):
    folders = {".".join(path.parent.relative_to(root).parts) for path in sources(root)}
    assert set(project["tool"]["setuptools"]["packages"]) == folders


@pytest.mark.parametrize("name", ["kernels", "calib"])
def test_leaves_are_namespace_packages_behind_relative_links(root: Path, name: str):
    """A top-level package ``kernels`` would hide that of Hugging Face from transformers."""
    link = root / "ptq" / name
    assert link.is_symlink() and os.readlink(link) == f"../{name}"
    assert not (root / name / "__init__.py").exists()
    assert importlib.util.find_spec(f"ptq.{name}") is not None


def test_links_are_links_in_git(root: Path):
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-s", "ptq/kernels", "ptq/calib"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    modes = {line.split("\t")[1]: line.split()[0] for line in listed.stdout.splitlines()}
    if not modes:
        pytest.skip("nothing is committed yet")
    assert modes == {"ptq/kernels": "120000", "ptq/calib": "120000"}


def test_leaves_are_not_imported_under_their_short_names(root: Path):
    """From elsewhere than the checkout ``kernels`` and ``calib`` are not ours; from everywhere
    ``ptq`` is."""
    code = (
        "import importlib.util as u, pathlib, ptq\n"
        f"root = pathlib.Path({str(root)!r})\n"
        "assert pathlib.Path(ptq.__file__).resolve().is_relative_to(root), ptq.__file__\n"
        "for name in ('kernels', 'calib'):\n"
        "    spec = u.find_spec(name)\n"
        "    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or "
        "())]\n"
        "    assert not any(str(root) in str(place) for place in places), spec\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_importing_ptq_imports_nothing_heavy():
    code = f"import sys, ptq; print(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_the_wheel_holds_everything(root: Path, tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    copy = tmp_path / "source"  # a build leaves files beside what it builds
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (copy / name).write_bytes((root / name).read_bytes())
    for name in ("ptq", "kernels", "calib"):
        subprocess.run(["cp", "-R", str(root / name), str(copy)], check=True)
    done = subprocess.run(
        [*command, "-w", str(tmp_path), str(copy)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("ptq-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    wanted = {
        f"ptq/{path.relative_to(root / 'ptq').as_posix()}"
        for folder, _, names in os.walk(root / "ptq", followlinks=True)
        for path in (Path(folder) / name for name in names)
        if path.suffix == ".py" or path.parent == root / "ptq" / "demo" or path.suffix == ".json"
    }
    assert wanted - inside == set()
    assert "ptq/py.typed" in inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    own = {name.split("/")[0] for name in inside}
    assert {name for name in own if not name.endswith(".dist-info")} == {"ptq"}


def test_every_third_party_import_is_declared(root: Path, project: dict):
    """What the package imports is declared, not there by accident of another's dependencies."""
    from_transformers = {"tokenizers", "numpy", "yaml"}
    extras = project["project"]["optional-dependencies"].values()
    lines = [*project["project"]["dependencies"], *(line for extra in extras for line in extra)]
    names = {line.split(";")[0] for line in lines}
    declared = {
        name.split("[")[0].split(">")[0].split("=")[0].strip().replace("-", "_") for name in names
    }
    imported = set()
    for path in sources(root):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    assert {"torch", "transformers", "typer"} <= imported  # no wing is left out
    foreign = imported - set(sys.stdlib_module_names) - {"ptq"}
    assert foreign - declared - from_transformers - OPTIONAL == set()


def test_nothing_in_the_repository_is_large(root: Path):
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True
    ).stdout.split("\0")
    sizes = {
        name: (root / name).stat().st_size for name in listed if name and (root / name).is_file()
    }
    large = {
        name: size
        for name, size in sizes.items()
        if size > 250_000 and not name.startswith("ptq/demo/")
    }
    assert large == {}
    assert sum(size for name, size in sizes.items() if name.startswith("ptq/demo/")) < 14_000_000


@pytest.mark.parametrize("script", ["scripts/setup", "scripts/test", "scripts/demo", ".ci/run"])
def test_scripts_are_executable_and_valid(root: Path, script: str):
    assert os.access(root / script, os.X_OK)
    done = subprocess.run(["bash", "-n", str(root / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readme_is_short_and_its_tables_are_current(root: Path):
    assert len((root / "README.md").read_text("utf-8").splitlines()) <= 200
    done = subprocess.run(
        [sys.executable, str(root / "scripts" / "readme_tables.py"), "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
