"""Compile kernels for an architecture without a GPU, and read speed out of the result.

``triton.compile`` needs neither a GPU nor a CUDA toolkit; the assembler and disassembler ship in
Triton's wheel. What can be known so: registers, spills, shared memory, the tensor-core instruction,
and the number of instructions per weight in the main loop, which decides on a GPU whose memory
leaves four instructions per weight. What cannot: time.
"""

import contextlib
import io
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes of shared memory that a program may use.
SHARED_MEMORY = {
    80: 166912,
    86: 101376,
    87: 166912,
    89: 101376,
    90: 232448,
    100: 232448,
    103: 232448,
    120: 101376,
    121: 101376,
}
# Of a multiprocessor: registers, bytes of shared memory (each program takes 1 KiB more than it asks
# for), warps and programs, as the CUDA C++ programming guide lists them by compute capability.
REGISTERS = 65536
SHARED_MEMORY_OF_ALL = {capability: size + 1024 for capability, size in SHARED_MEMORY.items()}
WARPS = {80: 64, 86: 48, 87: 48, 89: 48, 90: 64, 100: 64, 103: 64, 120: 48, 121: 48}
PROGRAMS = {80: 32, 86: 16, 87: 16, 89: 24, 90: 32, 100: 32, 103: 32, 120: 24, 121: 24}

_INSTRUCTION = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Z0-9_]+)*)"
)
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_BRANCH = re.compile(r"BRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?(?:`\()?(\.L_x_\d+)")
_CONDITION = re.compile(r"@!?U?P\w+\s+[A-Z]|BRA(?:\.\w+)*\s+!?U?P\w+,|BRA\.DIV")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_MMA = re.compile(r"\b(wgmma\.mma_async\S*|tcgen05\.mma\S*|mma\.sync\S*)")


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One kernel, compiled for one architecture.

    Attributes:
        spill: bytes of stack and local memory per thread.
        mma: the tensor-core instructions in the PTX.
        instructions: SASS instructions of the whole kernel, by name.
        loop: those of its longest loop that multiplies matrices; empty where there is none.
    """

    architecture: int
    registers: int
    spill: int
    shared: int
    warps: int
    mma: tuple[str, ...]
    instructions: Counter[str]
    loop: Counter[str]
    ptx: str

    def per(self, items: int, *, loop: bool) -> float:
        """Instructions per item, where a program handles ``items`` of them (per trip of the loop,
        or in all)."""
        return sum((self.loop if loop else self.instructions).values()) * 32 * self.warps / items

    def count(self, family: str, *, loop: bool = True) -> int:
        """Instructions whose name begins with ``family``, for instance ``STS`` or ``LDSM``."""
        counter = self.loop if loop else self.instructions
        return sum(n for name, n in counter.items() if name.split(".")[0] == family)

    @property
    def plain_loads(self) -> int:
        """Loads in the main loop that go to registers: the loop waits for each of them, where
        copies to shared memory are made some trips ahead."""
        return self.count("LDG")

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor holds at a time, by registers (given to a warp in pieces
        of 256), shared memory, warps and their own number."""
        of_a_warp = -(-self.registers * 32 // 256) * 256
        return min(
            REGISTERS // (of_a_warp * self.warps),
            SHARED_MEMORY_OF_ALL[self.architecture] // (self.shared + 1024),
            WARPS[self.architecture] // self.warps,
            PROGRAMS[self.architecture],
        )

    def problems(self, mma: str = "", *, spill: int = 0, plain_loads: int = 0) -> list[str]:
        """What disqualifies the kernel: shared memory, more spilled bytes than ``spill``, more than
        so many plain loads in the main loop, another MMA, flushing."""
        limit, problems = SHARED_MEMORY[self.architecture], []
        if self.shared > limit:
            problems.append(f"shared memory {self.shared} > {limit}")
        if self.plain_loads > plain_loads:
            problems.append(f"{self.plain_loads} plain loads in the main loop")
        if self.spill > spill:
            problems.append(f"spills {self.spill} bytes")
        if mma and not any(mma in name for name in self.mma):
            problems.append(f"no {mma} but {', '.join(self.mma) or 'no tensor-core instruction'}")
        if ".ftz" in self.ptx:
            problems.append("flushes subnormals to zero")
        return problems


def compile_for(
    architecture: int,
    kernel: triton.JITFunction,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    *,
    warps: int,
    stages: int,
    fp_fusion: bool = True,
) -> Compiled:
    """Compile a ``@triton.jit`` function as a launch with these arguments would.

    Args:
        signature: the type of every run-time argument, e.g. ``"*bf16"`` or ``"i32"``; a trailing
            ``:16`` says "divisible by 16", which pointers always are.
        constants: the constexpr arguments.

    Raises:
        RuntimeError: kernels are being interpreted (``TRITON_INTERPRET`` was set when they were
            imported), or an argument has neither a type nor a value.
    """
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(
            "kernels imported under TRITON_INTERPRET=1 cannot be compiled; use another process"
        )
    names = kernel.arg_names
    missing = [name for name in names if name not in signature and name not in constants]
    if missing or set(constants) - set(names):
        raise RuntimeError(
            f"{kernel.__name__}: missing {missing}, unknown {sorted(set(constants) - set(names))}"
        )
    types = {
        name: "constexpr" if name in constants else signature[name].removesuffix(":16")
        for name in names
    }
    aligned = [
        n
        for n in names
        if n not in constants and (signature[n].startswith("*") or signature[n].endswith(":16"))
    ]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fp_fusion}
    # on an assembler error Triton prints the whole PTX
    with contextlib.redirect_stdout(io.StringIO()):
        built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    counts = _USAGE.search(usage)
    assert counts, usage
    return Compiled(
        architecture=architecture,
        registers=int(counts[1]),
        spill=int(counts[2]) + int(counts[4]),
        shared=built.metadata.shared,
        warps=built.metadata.num_warps,
        mma=tuple(sorted(set(_MMA.findall(built.asm["ptx"])))),
        instructions=_count(sass.splitlines()),
        loop=_count(_main_loop(sass)),
        ptx=built.asm["ptx"],
    )


def _run(tool: str, *arguments: str) -> str:
    result = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


def _count(lines: list[str]) -> Counter[str]:
    return Counter(match[1] for line in lines if (match := _INSTRUCTION.search(line)))


def _main_loop(sass: str) -> list[str]:
    """The instructions of the longest natural loop that holds an MMA.

    Text between a label and a branch back to it will not do: waits on barriers spin in blocks of
    their own behind the end of the kernel and jump back, which on sm_100 makes half the kernel look
    like a loop and leaves out the loop itself.
    """
    blocks, successors = _control_flow(sass)
    predecessors: dict[int, set[int]] = {i: set() for i in range(len(blocks))}
    for i, targets in successors.items():
        for target in targets:
            predecessors[target].add(i)
    dominators = _dominators(len(blocks), predecessors)
    bodies: dict[int, set[int]] = {}
    for i, targets in successors.items():
        for header in targets & dominators[i]:  # an edge back to a block that dominates it
            body, todo = {header}, [i]
            while todo:
                block = todo.pop()
                if block not in body:
                    body.add(block)
                    todo += predecessors[block]
            bodies.setdefault(header, set()).update(body)
    loops = [[line for i in sorted(body) for line in blocks[i]] for body in bodies.values()]
    return max((loop for loop in loops if any("MMA" in line for line in loop)), key=len, default=[])


def _control_flow(sass: str) -> tuple[list[list[str]], dict[int, set[int]]]:
    """Basic blocks of the disassembly, and where each may continue."""
    blocks: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    # block → (target of its branch, whether it may fall through)
    ends: dict[int, tuple[str | None, bool]] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            if blocks[-1]:
                blocks.append([])
            labels[label[1]] = len(blocks) - 1
            continue
        if not (instruction := _INSTRUCTION.search(line)):
            continue
        blocks[-1].append(line)
        name = instruction[1].split(".")[0]
        if name in ("BRA", "EXIT", "RET"):
            conditional = bool(_CONDITION.search(line))
            branch = _BRANCH.search(line)
            ends[len(blocks) - 1] = (
                branch[1] if branch else None,
                conditional or (name == "BRA" and not branch),
            )
            blocks.append([])
    successors: dict[int, set[int]] = {}
    for i in range(len(blocks)):
        target, falls = ends.get(i, (None, True))
        successors[i] = {labels[target]} if target in labels else set()
        if falls and i + 1 < len(blocks):
            successors[i].add(i + 1)
    return blocks, successors


def _dominators(count: int, predecessors: Mapping[int, set[int]]) -> list[set[int]]:
    """For every block the blocks that each path from the entry to it passes; unreachable blocks
    dominate nothing."""
    result = [{0}, *(set(range(count)) for _ in range(count - 1))]
    changed = True
    while changed:
        changed = False
        for i in range(1, count):
            incoming = [result[p] for p in predecessors[i]]
            new = ({i} | set.intersection(*incoming)) if incoming else {i}
            changed |= new != result[i]
            result[i] = new
    return result
