"""The installed package: its folders, links and wheel, and what it must not shadow."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

# Used if there, with another way where they are not; not even an extra asks for them.
OPTIONAL = {"vllm", "gemlite", "IPython"}
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
        ["git", "ls-files", "-s", "ptq/kernels", "ptq/calib", "scripts/path"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    modes = {line.split("\t")[1]: line.split()[0] for line in listed.stdout.splitlines()}
    if not modes:
        pytest.skip("nothing is committed yet")
    assert modes == dict.fromkeys(("ptq/kernels", "ptq/calib", "scripts/path/ptq"), "120000")


def test_importing_ptq_imports_nothing_heavy():
    code = f"import sys, ptq; print(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def run(*command: object, **options) -> str:
    """The stdout of a program that ends well, without what leads Python to the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        **options,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that a package is built of, in a folder called ptq: a build leaves others beside
    them."""
    copy = tmp_path_factory.mktemp("above") / "ptq"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        (copy / name).write_bytes((root / name).read_bytes())
    for name in ("ptq", "kernels", "calib", "scripts"):
        run("cp", "-R", root / name, copy)
    return copy


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python in an environment of its own, in which nothing is installed, and which finds what this
    one has."""
    place = tmp_path_factory.mktemp("empty")
    venv.create(place, symlinks=True)
    found = sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)})
    (Path(found) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin" / "python"


PIP = ("-m", "pip", "--disable-pip-version-check")
OFFLINE = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index")


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    run(sys.executable, "-c", build, cwd=clone)
    (sdist,) = out.glob("ptq_llm-*.tar.gz")
    run(sys.executable, *PIP, "wheel", *OFFLINE, "-w", out, sdist)
    (wheel,) = out.glob("ptq_llm-*-py3-none-any.whl")
    return wheel


def test_the_wheel_of_the_sdist_holds_everything(root: Path, wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    wanted = {
        f"ptq/{path.relative_to(root / 'ptq').as_posix()}"
        for folder, _, names in os.walk(root / "ptq", followlinks=True)
        for path in (Path(folder) / name for name in names)
        if path.suffix == ".py"
        or path.parent == root / "ptq" / "demo"
        or path.suffix in (".json", ".html")
    }
    assert wanted - inside == set()
    assert "ptq/py.typed" in inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    own = {name.split("/")[0] for name in inside}
    assert {name for name in own if not name.endswith(".dist-info")} == {"ptq"}


def test_the_wheel_installs_and_runs_from_anywhere(empty: Path, wheel: Path, tmp_path: Path):
    """Its own files alone: the bundled model is quantized where no checkout is near."""
    run(empty, *PIP, "install", *OFFLINE, "--ignore-installed", wheel)
    command = empty.parent / "ptq"
    assert run(command, "--version", cwd=tmp_path).startswith("ptq ")
    options = ["--format", "nvfp4", "--algorithm", "rtn", "--samples", "2", "--seq-len", "64"]
    report = run(command, "quantize", "demo", "--out", "q", *options, "--json", cwd=tmp_path)
    assert json.loads(report)["formats"] == ["nvfp4"]
    where = run(empty, "-c", "import ptq; print(ptq.__file__)", cwd=tmp_path)
    assert Path(where).is_relative_to(empty.parent.parent)


def test_an_editable_install_is_found_from_everywhere_and_hides_nothing(clone: Path, empty: Path):
    """Above a clone, the folder itself would be a namespace package, empty, if its finder came
    after the path; and ``kernels`` and ``calib`` are names of others."""
    run(empty, *PIP, "install", *OFFLINE, "--ignore-installed", "-e", clone)
    code = (
        "import importlib.util as u, ptq, ptq.kernels.tiles\n"
        "print(ptq.__version__)\n"
        "for name in ('kernels', 'calib'):\n"
        "    spec = u.find_spec(name)\n"
        "    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or "
        "())]\n"
        f"    assert not any({str(clone)!r} in str(place) for place in places), spec\n"
    )
    for place in (clone.parent, Path("/")):
        assert run(empty, "-c", code, cwd=place).strip()


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


def test_the_workflow_tries_the_oldest_of_what_is_declared(root: Path, project: dict):
    """And every Python from the oldest on."""
    text = (root / ".github" / "workflows" / "ci.yml").read_text()
    least = dict(re.findall(r"([\w-]+)>=([\d.]+)", " ".join(project["project"]["dependencies"])))
    tried = dict(re.findall(r"(\w+)==([\d.]+)", text))
    tried["torch"] = re.findall(r'torch: "([\d.]+)"', text)[0]
    for name, version in tried.items():
        assert f"{version}.".startswith(f"{least[name]}."), name
    assert {"torch", "transformers", "triton"} <= tried.keys()
    pythons = re.findall(r'python: "3\.(\d+)"', text)
    first = project["project"]["requires-python"].removeprefix(">=3.")
    newest = max(map(int, pythons))
    assert set(map(int, pythons)) == set(range(int(first), newest + 1))
