"""Processes of the tools: which Python runs them, in which versions, and what they cost."""

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from peers.methods import TOOLS

import ptq

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENTS = ROOT / ".peers"


@dataclass(frozen=True)
class Cost:
    """Of a process and of those that it waited for."""

    code: int
    cpu_seconds: float
    peak_gb: float


# A process of few pages between the two: what starts a program counts as memory of it.
BETWEEN = """
import json, os, sys
child = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, used = os.wait4(child, 0)
said = [os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss]
json.dump(said, open(sys.argv[1], "w"))
"""


def measured(command: Sequence[str], cwd: Path, env: Mapping[str, str], log: Path) -> Cost:
    """Run a command to its end, what it says going to ``log``. ``command`` starts with the path of
    a program."""
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as said:
        result = Path(folder) / "cost.json"
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", BETWEEN, str(result), *command],
            cwd=cwd, env=dict(env), stdin=subprocess.DEVNULL, stdout=said, stderr=said,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        code, seconds, peak = json.loads(result.read_text("utf-8"))
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return Cost(code, seconds, peak * unit / 1e9)


def environment(tool: str, threads: int) -> dict[str, str]:
    """The variables of a tool's processes: nothing of ptq's for others, and no hub."""
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    variables |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    return variables | ({"PYTHONPATH": str(ROOT / "scripts" / "path")} if tool == "ptq" else {})


def python_of(tool: str) -> Path:
    return Path(sys.executable) if tool == "ptq" else ENVIRONMENTS / tool / "bin" / "python"


def installed(tool: str) -> bool:
    return tool == "ptq" or (ENVIRONMENTS / tool / ".ready").is_file()


def versions_of(tool: str) -> dict[str, str]:
    """The versions of a tool's packages, its own first; of ptq the commit too."""
    packages = TOOLS[tool].packages
    if tool == "ptq":
        others = {name: version(name) for name in packages[1:]}
        return {packages[0]: ptq.__version__, "commit": commit(), **others}
    asked = (
        "import json, sys, importlib.metadata as m; "
        "print(json.dumps([m.version(p) for p in sys.argv[1:]]))"
    )
    done = subprocess.run(
        [str(python_of(tool)), "-c", asked, *packages], capture_output=True, text=True, check=True
    )
    return dict(zip(packages, json.loads(done.stdout), strict=True))


def commit() -> str:
    """The last one of this checkout that changed ptq; ``+`` behind it where files are others."""
    git, watched = ["git", "-C", str(ROOT)], ("ptq", "calib", "kernels")
    name = subprocess.run(
        [*git, "log", "-1", "--format=%h", "--abbrev=10", "--", *watched],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if name.returncode or not name.stdout.strip():
        return "unknown"
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *watched], check=False)
    return name.stdout.strip() + ("+" if changed.returncode else "")


def machine() -> str:
    """The processor, how many of it, and the memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB"
