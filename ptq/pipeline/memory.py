"""How much memory there is, and how much of it the statistics of experts may take."""

import os
from pathlib import Path

import torch

# Of what is free once a block has its weights; the rest is for solving, for results, and for
# others.
SHARE = 0.5
CGROUP = Path("/sys/fs/cgroup")  # version 2, as containers have it
MEMINFO = Path("/proc/meminfo")
STATM = Path("/proc/self/statm")
PROGRAM = 530_000_000  # measured, where a system does not say it


def machine_bytes(device: torch.device) -> int:
    """Memory of the device that would compute; of the host, or what this process may use of it, for
    the CPU and where the GPU asked for is not here."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).total_memory
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(host, _number(CGROUP / "memory.max", host))


def free_bytes(device: torch.device) -> int:
    """What is not in use of :func:`machine_bytes`."""
    if device.type == "cuda" and torch.cuda.is_available():
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    total = machine_bytes(device)
    lines = (line.split() for line in _text(MEMINFO).splitlines())
    available = next((int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:"), total)
    return min(available, total - _number(CGROUP / "memory.current", 0))


def held_bytes() -> int:
    """Memory that this process holds now: Python, its libraries, and what they made at start."""
    fields = _text(STATM).split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else PROGRAM


def statistics_limit(device: torch.device, asked: float | None, free: float | None = None) -> float:
    """Bytes that the statistics of a block's experts may take at a time on one process.

    Args:
        asked: by the user; None is ``SHARE`` of what is free, which processes on one host share
            (``LOCAL_WORLD_SIZE``) unless each has its GPU.
        free: bytes; None asks the system.
    """
    if asked is not None:
        return asked
    sharing = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return SHARE * max(free_bytes(device) if free is None else free, 0) / sharing


def _number(path: Path, otherwise: int) -> int:
    text = _text(path).strip()
    return int(text) if text.isdigit() else otherwise


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
