"""Predictions of what tuning needs."""

from dataclasses import replace
from pathlib import Path

import pytest

from ptq.pipeline.forecast import forecast
from ptq.pipeline.plan import Plan
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.tuning_cost import Shapes, tuning_bytes, tuning_flops

SHAPES = Shapes(
    blocks=[10**6] * 4, outside=10**6, tuned=39 * 10**5, hidden=256, vocabulary=4096, itemsize=4
)


def plan(tune: int, codes: str = "latents") -> Plan:
    recipe = Recipe.default("nvfp4", tune=tune, tune_codes=codes, samples=16, seq_len=512)
    return Plan(layers={}, recipe=recipe, head=None, samples=16, seq_len=512, foreign=None)


def test_latents_and_states_go_to_disk() -> None:
    ram, disk = (tuning_bytes(plan(100), SHAPES, where) for where in ("ram", "disk"))
    states = (100 * 2048 + 8192 + 5 * 2048) * 256 * 4
    assert ram - disk == pytest.approx(8 * SHAPES.tuned + states)
    jumps = [tuning_bytes(plan(100, "pv"), SHAPES, where) for where in ("ram", "disk")]
    # latents are 4 bytes a code, and once more while they are saved
    fewer = [pytest.approx(count * 4 * SHAPES.tuned) for count in (2, 1)]
    assert [ram - jumps[0], disk - jumps[1]] == fewer
    larger = replace(SHAPES, tuned=2 * SHAPES.tuned, blocks=SHAPES.blocks * 2)
    assert tuning_bytes(plan(100), larger, "disk") < 1.3 * disk  # one block at a time


def test_operations_grow_with_the_steps() -> None:
    assert tuning_flops(plan(0), SHAPES) == 0
    few, many = (tuning_flops(plan(steps), SHAPES) for steps in (100, 200))
    step = 2 * 2048 * (5 * 4 * 10**6 + 3 * 4096 * 256)
    assert many - few == pytest.approx(100 * step)


def test_a_forecast_has_it(tiny_llama: Path) -> None:
    plain, tuned = (forecast(tiny_llama, Recipe.default("nvfp4", tune=n)) for n in (0, 10_000))
    assert plain.tuning == 0 and tuned.tuning > tuned.program
    assert tuned.peak_bytes >= tuned.tuning and plain.peak_bytes < tuned.peak_bytes
    assert tuned.seconds and plain.seconds and tuned.seconds > 2 * plain.seconds
    assert "10000 steps of tuning" in tuned.levers
    (table,) = tuned.tables()
    assert "tuning, afterwards" in dict(table.rows)
