"""The gate against slow or broken kernels without a GPU: compile what the tables launch, and judge
it (K2).

    python -m ptq.bench.compile_check 90                     # registers, spills, instructions
    python -m ptq.bench.compile_check 80 90 100 120 --all --json

Exit code 1 on a problem. Without ``--all`` one case per kernel and format. Instructions are counted
per weight in the main loop of matmuls, per element in the other kernels. Kernels must not be
interpreted: run it in a process of its own.
"""

import argparse
import json
import re
import sys
import time
from dataclasses import dataclass

import triton

from ptq.bench.compile_cases import Case, cases
from ptq.bench.compile_without_gpu import SHARED_MEMORY, Compiled, compile_for
from ptq.kernels.gpu import FAMILIES, MULTIPROCESSORS

# Spills that are known and bearable, in bytes per thread, by (architecture, case): masks for the
# end of 2880 columns take registers. But for the first they are of Triton 3.6 alone.
SPILLS = {
    (80, "grouped nvint4 32x5120x2880 by 32x128x128 split 1"): 16,
    (80, "grouped nvfp4 32x5120x2880 by 32x128x128 split 1"): 8,
    (100, "w4a4 mxfp4 64x5120x2880 by 64x128x256 split 2"): 24,
    (120, "grouped mxfp4 1x5120x2880 by 16x128x128 split 1"): 8,
    (120, "w4a4 mxfp4 64x5120x2880 by 64x128x256 split 2"): 24,
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was compiled, and what is wrong with it.

    Attributes:
        compiled: None where the compiler failed.
        per_item: instructions per weight or element, see ``Case.items``.
        waves: how often the multiprocessors are filled by the programs of a launch, which run at
            the same time as far as registers and shared memory go; 0 where the case names no
            layer.
    """

    architecture: int
    name: str
    seconds: float
    problems: list[str]
    compiled: Compiled | None = None
    per_item: float = 0.0
    waves: float = 0.0

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON: the counts that tests look at."""
        base: dict[str, object] = {
            "architecture": self.architecture,
            "name": self.name,
            "problems": self.problems,
        }
        if self.compiled is None:
            return base
        families = ("LDS", "LDSM", "STS", "STSM", "BAR")
        return base | {
            "per_item": round(self.per_item, 2),
            "registers": self.compiled.registers,
            "spill": self.compiled.spill,
            "shared": self.compiled.shared,
            "mma": list(self.compiled.mma),
            "resident": self.compiled.resident,
            "waves": round(self.waves, 2),
            "plain_loads": self.compiled.plain_loads,
            "loop_instructions": sum(self.compiled.loop.values()),
            "loop": {family: self.compiled.count(family) for family in families},
            "div_full": "div.full" in self.compiled.ptx,
            "fused_multiply_adds": len(re.findall(r"\bfma\.rn\.f32", self.compiled.ptx)),
            "seconds": round(self.seconds, 2),
        }


def build(arch: int, case: Case) -> Result:
    """Compile a case and judge it; a failure of the compiler is a problem like any other."""
    start = time.perf_counter()
    try:
        compiled = compile_for(
            arch,
            case.kernel,  # pyright: ignore[reportArgumentType] - taken for a method
            case.signature,
            case.constants,
            warps=case.warps,
            stages=case.stages,
            fp_fusion=case.fp_fusion,
        )
    except (RuntimeError, triton.CompilationError) as error:
        last = (str(error).strip().splitlines() or [""])[-1]
        return Result(
            architecture=arch,
            name=case.name,
            seconds=time.perf_counter() - start,
            problems=[f"{type(error).__name__}: {last[:200]}"],
        )
    return Result(
        architecture=arch,
        name=case.name,
        seconds=time.perf_counter() - start,
        problems=judge(arch, case, compiled),
        compiled=compiled,
        per_item=compiled.per(case.items, loop=case.loop or bool(case.programs and compiled.loop)),
        waves=case.programs / (MULTIPROCESSORS[FAMILIES[arch]] * max(1, compiled.resident)),
    )


def judge(arch: int, case: Case, compiled: Compiled) -> list[str]:
    """What is wrong with a compiled case."""
    problems = compiled.problems(
        case.mma, spill=SPILLS.get((arch, case.name), 0), plain_loads=excused_loads(case)
    )
    if arch == 80 and compiled.shared > SHARED_MEMORY[86]:
        problems.append(
            f"shared memory {compiled.shared} is too much for sm_86 and sm_89, which share the "
            "table"
        )
    if case.loop and not compiled.loop:
        problems.append("no loop with a tensor-core instruction was found")
    return problems


def excused_loads(case: Case) -> int:
    """How many plain loads the main loop may have: those of scales that are read by bytes (the
    reason is at ``w4a16_constants``) although rows of them begin at no multiple of four, or a step
    has less than four. At most one for each byte that a thread gets. What has no tensor cores to
    keep busy may read as it likes."""
    if not case.mma:
        return sys.maxsize
    sizes = {name: value for name, value in case.constants.items() if isinstance(value, int)}
    if "ELEMENT" not in case.constants or case.constants.get("SCALE_LOAD") != "bytes":
        return 0
    groups = [sizes[name] // sizes["GROUP"] for name in ("K", "BLOCK_K")]
    whole = not any(count % 4 for count in groups)
    return 0 if whole else sizes["BLOCK_N"] * groups[1] // (32 * case.warps)


def line(result: Result) -> str:
    """A result for people to read."""
    data = result.to_dict()
    named = ("registers", "spill", "shared", "plain_loads", "resident", "waves")
    facts = [f"{key} {data[key]}" for key in named if data.get(key) is not None]
    return "  ".join(
        [
            f"sm_{result.architecture:<3d} {result.name:46s} {result.per_item:6.2f}",
            *facts,
            "; ".join(result.problems),
        ]
    )


def main() -> int:
    """Print the results of the architectures named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("architectures", nargs="+", type=int, choices=sorted(FAMILIES))
    parser.add_argument(
        "--all", action="store_true", help="every row of the tables, odd shapes, biases, prologues"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object to a line")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    bad = 0
    for arch in options.architectures:
        for case in cases(FAMILIES[arch], all_rows=options.all):
            if options.only in case.name:
                result = build(arch, case)
                bad += bool(result.problems)
                text = json.dumps(result.to_dict()) if options.json else line(result)
                print(text, flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
