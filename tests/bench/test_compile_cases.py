"""The cases that stand for all launches: named apart, and the short list a part of the long one."""

import pytest

pytest.importorskip("triton")

from ptq.bench.compile_cases import PARTS, cases
from ptq.kernels import tiles

ARCHITECTURES = (80, 90, 100, 120)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_names_tell_cases_apart(arch: int) -> None:
    long = [case.name for case in cases(arch, all_rows=True)]
    short = [case.name for case in cases(arch, all_rows=False)]
    assert len(long) == len(set(long)) and len(short) == len(set(short))
    assert set(short) < set(long)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_case_has_a_type_or_a_value_for_every_argument(arch: int) -> None:
    for case in cases(arch, all_rows=True):
        names = [*case.signature, *case.constants]
        assert sorted(names) == sorted(case.kernel.arg_names), case.name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_tile_of_the_tables_is_compiled(arch: int) -> None:
    compiled = {
        (case.kernel.fn.__name__, case.name.split(" ")[-1])
        for case in cases(arch, all_rows=True)
        if "odd" not in case.name and "fp16" not in case.name
    }
    for row in tiles.table(arch).rows:
        if row.operation in ("w4a16", "grouped") and row.tile.kernel != "dense":
            tile, prefix = row.tile, "grouped_" if row.operation == "grouped" else ""
            size = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
            assert (f"{prefix}w4a16_kernel", size) in compiled
    assert set(PARTS) == {row.format for row in tiles.table(arch).rows}
