"""Reading speed out of machine code: which loop is the main one, and what disqualifies a kernel."""

from collections import Counter
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from ptq.bench.compile_without_gpu import Compiled, _count, _main_loop

# a loop of three instructions with an MMA, one without, and a wait that spins behind the end
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E R2, [R4] ;
        /*0020*/                   HMMA.16816.F32 R8, R2, R4, R8 ;
        /*0030*/                   @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0040*/                   IADD3 R1, R1, R2, R3 ;
        /*0050*/                   IADD3 R1, R1, R2, R3 ;
        /*0060*/                   IADD3 R1, R1, R2, R3 ;
        /*0070*/                   @!P1 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   NANOSLEEP 0x20 ;
        /*00a0*/                   BRA `(.L_x_0) ;
"""
FINE = Compiled(
    architecture=90,
    registers=128,
    spill=0,
    shared=1024,
    warps=4,
    mma=("wgmma.mma_async.sync",),
    instructions=Counter({"LDG.E": 4, "STS.128": 2, "STSM": 1}),
    loop=Counter({"LDGSTS.E": 2, "STS": 1}),
    ptx="",
)


def test_the_main_loop_is_the_one_that_multiplies() -> None:
    counts = _count(_main_loop(SASS))
    assert counts == {"LDG.E": 1, "HMMA.16816.F32": 1, "BRA": 1}
    assert _main_loop(SASS.replace("HMMA", "FFMA")) == []


def test_instructions_are_counted_per_item_and_by_family() -> None:
    assert FINE.per(64, loop=True) == 3 * 32 * 4 / 64
    assert FINE.per(64, loop=False) == 7 * 32 * 4 / 64
    assert FINE.count("STS", loop=False) == 2 and FINE.count("STSM", loop=False) == 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"shared": 1 << 20}, "shared memory"),
        ({"spill": 8}, "spills 8 bytes"),
        ({"mma": ()}, "no wgmma but no tensor-core instruction"),
        ({"mma": ("mma.sync",)}, "no wgmma but mma.sync"),
        ({"ptx": "mul.ftz.f32"}, "flushes subnormals"),
        ({"loop": Counter({"LDG.E.U8": 1, "LDGSTS.E": 2})}, "1 plain loads in the main loop"),
    ],
)
def test_what_disqualifies_a_kernel_is_named(change: dict[str, object], problem: str) -> None:
    assert not FINE.problems("wgmma")
    problems = replace(FINE, **change).problems("wgmma")
    assert len(problems) == 1 and problem in problems[0]
    assert "spill" not in change or not replace(FINE, **change).problems("wgmma", spill=8)
    assert "loop" not in change or not replace(FINE, **change).problems("wgmma", plain_loads=1)


@pytest.mark.parametrize(
    ("change", "programs"),
    [
        ({}, 4),  # 128 registers of 128 threads: a quarter of 65536
        ({"registers": 129}, 3),  # warps get registers in pieces of 256
        ({"shared": 70 * 1024}, 3),
        ({"registers": 32, "warps": 32}, 2),
        ({"registers": 16, "warps": 1}, 32),
        ({"architecture": 120, "shared": 40 * 1024}, 2),
    ],
)
def test_how_many_programs_a_multiprocessor_holds(change: dict[str, object], programs: int) -> None:
    assert replace(FINE, **change).resident == programs
