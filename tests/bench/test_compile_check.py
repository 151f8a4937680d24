"""Ahead-of-time compilation for sm_80, 90, 100 and 120: the gate that stands in for a GPU where
there is none.

Kernels are compiled in a process of their own (here they are interpreted) by ``python -m
ptq.bench.compile_check``. Shared memory, spills, the tensor-core instruction and flush-to-zero are
judged there; instructions per weight are judged here, against what the memory of a GPU leaves and
against the values in ``instructions.json`` (8 %), which are rewritten by

    python tests/bench/test_compile_check.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STORED = Path(__file__).with_name("instructions.json")
ARCHITECTURES = (80, 90, 100, 120)
# Lane-instructions per weight that a GPU of the architecture has while it streams 4.5-bit weights
# at full bandwidth. sm_100: 2.7 by arithmetic, NVINT4 is at 2.76.
BUDGET = {80: 6.3, 90: 4.4, 100: 2.8, 120: 18.4}
# The same per element of the quantizer (2 bytes in, 0.56 out). The law of rounding takes NVFP4 past
# it on sm_90: known.
QUANTIZER = {80: 28.5, 90: 28.5, 100: 16.0, 120: 84.0}
# four_six rounds every element twice more and sums its squares: bound by arithmetic but on sm_120.
TWO_SCALES = {80: 58.0, 90: 58.0, 100: 39.0, 120: 84.0}


def compile_all(*arguments: str) -> dict[str, dict]:
    """The results of ``ptq.bench.compile_check`` by "sm_90 name"."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[2]
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(root), environment.get("PYTHONPATH")])
    )
    command = [sys.executable, "-m", "ptq.bench.compile_check", *arguments, "--json"]
    run = subprocess.run(
        command,
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    results = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert results, run.stderr[-2000:]
    return {f"sm_{r['architecture']} {r['name']}": r for r in results}


@pytest.fixture(scope="session")
def compiled() -> dict[str, dict]:
    """One case per kernel and format, for all architectures."""
    pytest.importorskip("triton")
    return compile_all(*map(str, ARCHITECTURES))


def version() -> tuple[int, ...]:
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def problems(results: dict[str, dict]) -> dict[str, list[str]]:
    return {name: result["problems"] for name, result in results.items() if result["problems"]}


def test_everything_compiles_fits_and_uses_its_tensor_core_instruction(compiled) -> None:
    assert not problems(compiled)
    assert {result["architecture"] for result in compiled.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_decoding_leaves_the_memory_as_the_bottleneck(compiled, arch: int) -> None:
    if arch == 100 and version() < (3, 9):
        pytest.skip("before Triton 3.9 the assembler lacks the conversion from E2M1 to bf16")
    per_weight = {
        name: r["per_item"] for name, r in compiled.items() if name.startswith(f"sm_{arch} w4a16")
    }
    assert len(per_weight) >= 3 and not {
        name: n for name, n in per_weight.items() if n > BUDGET[arch]
    }


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_quantizer_divides_once_per_group_and_fuses_nothing(compiled, arch: int) -> None:
    quantizers = {n: r for n, r in compiled.items() if n.startswith(f"sm_{arch} quantize")}
    assert len(quantizers) == 4
    for name, result in quantizers.items():
        budget = TWO_SCALES if "four_six" in name else QUANTIZER
        assert result["per_item"] <= budget[arch], name
        assert not result["div_full"], f"{name}: approximate division"
        assert result["fused_multiply_adds"] <= 4 * 24, (
            f"{name}: products contracted with additions that round"
        )
    powers = {n: r["fused_multiply_adds"] for n, r in quantizers.items() if "mxfp4" in n}
    assert powers and not any(powers.values()), "powers of two need no division"


def test_weights_in_fragment_order_never_pass_through_shared_memory(compiled) -> None:
    """On sm_90: no ldmatrix in the loop, and stores to shared memory for the inputs alone (8 per
    trip at 16 tokens)."""
    loops = {name: r["loop"] for name, r in compiled.items() if name.startswith("sm_90 w4a16")}
    assert len(loops) >= 3
    for name, loop in loops.items():
        assert loop["LDSM"] == 0 and loop["STS"] + loop["STSM"] <= 8, name


def test_matmuls_per_expert_use_fp4_tensor_cores_and_no_others() -> None:
    """On sm_100 few tokens must be the right operand, or Triton falls back to bf16; 16 × 128 tiles
    have few."""
    pytest.importorskip("triton")
    results = compile_all("100", "120", "--all", "--only", "grouped w4a4 nvfp4 16x128")
    assert not problems(results) and {r["architecture"] for r in results.values()} == {100, 120}
    for result in results.values():
        assert result["mma"] and all("kind::mxf4nvf4" in name for name in result["mma"])


def test_no_loop_waits_for_the_scales_of_wide_tiles() -> None:
    """Two bytes for each thread, of real sizes; of one token in a row of 2880, which is no multiple
    of four groups."""
    pytest.importorskip("triton")
    results = compile_all("90", "--all", "--only", "w4a16 mxfp4 128x6144x4096")
    results |= compile_all("90", "--all", "--only", "w4a16 mxfp4 1x5120x2880")
    assert len(results) == 2 and not problems(results)
    assert all(r["plain_loads"] == 0 and r["loop_instructions"] > 0 for r in results.values())
    assert all(r["resident"] >= 1 and r["waves"] > 0 for r in results.values())


def test_instructions_are_those_that_were_recorded(compiled) -> None:
    major, minor = version()
    stored = json.loads(STORED.read_text(encoding="utf-8")).get(f"{major}.{minor}")
    if stored is None:
        pytest.skip(
            f"no instruction counts recorded for Triton {major}.{minor}; python "
            f"{Path(__file__).name} records them"
        )
    counts = {name: result["per_item"] for name, result in compiled.items()}
    assert set(counts) == set(stored), "cases came or went: record them anew"
    off = {
        name: (counts[name], stored[name])
        for name in stored
        if abs(counts[name] / stored[name] - 1) > 0.08
    }
    assert not off, "measured and recorded instructions differ: (now, recorded)"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_row_of_the_tables_and_every_variant(arch: int) -> None:
    pytest.importorskip("triton")
    assert not problems(compile_all(str(arch), "--all"))


@pytest.mark.slow
def test_the_cousins_that_share_a_table_compile_too() -> None:
    pytest.importorskip("triton")
    cousins = (
        ("89", "103", "121") if version() >= (3, 9) else ("89",)
    )  # 3.6 cannot disassemble the others
    assert not problems(compile_all(*cousins))


if __name__ == "__main__":
    recorded = json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {}
    results = compile_all(*map(str, ARCHITECTURES))
    recorded["{}.{}".format(*version())] = {
        name: result["per_item"] for name, result in results.items()
    }
    STORED.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(problems(results) or f"{len(results)} cases recorded")
