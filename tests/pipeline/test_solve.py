"""One input group: shared scales, chosen rotations, escalated damping, honest reports."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ptq.numerics.algorithms import (
    ALGORITHMS,
    Prepared,
    Problem,
    prepare_gptq,
    prepare_rtn,
)
from ptq.numerics.errors import output_error
from ptq.numerics.nested import drop
from ptq.numerics.rotation import Rotation
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.solve import Job, solve


def job(recipe: Recipe, *, outliers: bool = False, outs: tuple[int, ...] = (48, 16)) -> Job:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2048, 128, generator=generator) @ torch.randn(128, 128, generator=generator) / 8
    if outliers:
        x = x * torch.exp(1.5 * torch.randn(128, generator=generator))
    weights = tuple(torch.randn(o, 128, generator=generator) * (i + 1) for i, o in enumerate(outs))
    fit, kept = x[:1536].double(), x[1536:].double()
    return Job(
        names=tuple(f"block.layer{i}" for i in range(len(outs))),
        weights=weights,
        hessian=fit.T @ fit / len(fit),
        holdout=kept.T @ kept / len(kept),
        amax={k: Rotation(k).exact(x).abs().amax() for k in (1, 16, 32, 64, 128)},
        sample=x[:512],
        tokens=len(fit),
        recipe=recipe,
    )


def error_of(job: Job, index: int, approximation: Tensor, hessian: Tensor) -> float:
    return float(output_error(job.weights[index], approximation, hessian))


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4", "nvint4", "mxint6", "mxfp8"])
@pytest.mark.parametrize("rotation", [1, 32])
def test_reports_are_the_errors_of_what_is_returned(fmt: str, rotation: int) -> None:
    """On the calibration Hessian and on tokens kept aside, in the basis that was not rotated."""
    given = job(Recipe.default(fmt, rotation=rotation))
    for index, result in enumerate(solve(given)):
        approximation = Rotation(rotation).rotate(result.weight.dequantize())  # R undoes itself
        assert result.report.error == pytest.approx(
            error_of(given, index, approximation, given.hessian), rel=1e-4
        )
        assert given.holdout is not None
        assert result.report.held_out_error == pytest.approx(
            error_of(given, index, approximation, given.holdout), rel=1e-4
        )
        assert result.report.error < result.report.rtn_error
        assert 0.5 < result.report.held_out_error / result.report.error < 2


def test_layers_of_a_group_share_global_scale_and_rotation() -> None:
    first, second = solve(job(Recipe.default("nvfp4", rotation="auto")))
    assert torch.equal(first.weight.scales.global_scale, second.weight.scales.global_scale)
    assert first.rotation == second.rotation


def test_rows_are_those_of_the_layers() -> None:
    given = job(Recipe.default("mxfp4"))
    alone = [
        solve(replace(given, names=(given.names[i],), weights=(given.weights[i],)))[0]
        for i in range(2)
    ]
    for one, together in zip(alone, solve(given), strict=True):  # MX formats have no shared scale
        assert (one.weight.codes != together.weight.codes).any(1).float().mean() < 0.1


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
def test_auto_takes_the_rotation_of_least_held_out_loss(fmt: str, outliers: bool) -> None:
    recipe = Recipe.default(fmt, rotation="auto", scheme="w4a4")
    chosen = solve(job(recipe, outliers=outliers))

    def loss(results) -> float:
        return (
            sum(r.report.held_out_error for r in results) / len(results)
            + results[0].report.input_error
        )

    fixed = {
        k: loss(solve(job(replace(recipe, rotation=k), outliers=outliers)))
        for k in recipe.rotations(128)
    }
    assert len(fixed) == 3
    assert loss(chosen) == pytest.approx(min(fixed.values()))


def test_damping_escalates_and_is_reported() -> None:
    given = job(replace(Recipe.default("nvfp4"), damping=0.001))
    shift = 0.05 * given.hessian.diagonal().mean()
    indefinite = given.hessian - shift * torch.eye(128, dtype=torch.float64)
    results = solve(replace(given, hessian=indefinite, holdout=None))
    assert results[0].report.damping == pytest.approx(0.1)
    hopeless = given.hessian - 3 * given.hessian.diagonal().mean() * torch.eye(
        128, dtype=torch.float64
    )
    hopeless.diagonal().clamp_(min=0.01)
    with pytest.raises(
        ValueError, match=r"block\.layer0: the damped Hessian is not positive definite"
    ):
        solve(replace(given, hessian=hopeless))


def test_what_is_not_finite_is_named() -> None:
    given = job(Recipe.default("nvfp4"))
    bad = given.weights[1].clone()
    bad[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"block\.layer1 .*NaN"):
        solve(replace(given, weights=(given.weights[0], bad)))


def test_a_result_worse_than_rounding_to_nearest_is_not_kept() -> None:
    """G23: with one sweep column order reversed by a Hessian that GPTQ's damping drowns, RTN wins
    on the true loss."""
    given = job(replace(Recipe.default("nvfp4", scales="mse"), damping=1e-9, descent=0))
    exact = torch.zeros_like(given.hessian)
    exact[0, 0] = (
        1.0  # one live input: its column alone matters, and RTN rounds it as well as anything can
    )
    for result in solve(replace(given, hessian=exact, holdout=None)):
        assert result.report.error <= result.report.rtn_error
        assert result.report.algorithm == "rtn"


def test_static_input_scales_leave_room() -> None:
    given = job(Recipe.default("nvfp4", scheme="w4a4", rotation=16))
    scale = solve(given)[0].input_scale
    assert scale is not None
    assert float(scale) * 448 * 6 == pytest.approx(2 * float(given.amax[16]), rel=1e-5)
    assert (
        solve(job(Recipe.default("nvfp4", scheme="w4a4", input_scale="token")))[0].input_scale
        is None
    )
    assert solve(job(Recipe.default("mxfp4", scheme="w4a4")))[0].input_scale is None


def test_rtn_is_the_same_pipeline() -> None:
    for result in solve(job(Recipe.default("nvfp4", algorithm="rtn"))):
        assert result.report.error == result.report.rtn_error
        assert result.report.damping == 0


def test_a_new_row_of_the_table_is_really_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table was once a list of names: a new one was accepted, and GPTQ or nothing was run."""
    problems: list[Problem] = []

    def toward_zero(problem: Problem) -> Prepared:
        problems.append(problem)
        return Prepared(name="toward_zero", solve=lambda rows: prepare_rtn(problem).solve(rows * 0))

    monkeypatch.setitem(ALGORITHMS, "toward_zero", toward_zero)
    results = solve(job(Recipe(format="nvfp4", algorithm="toward_zero", scales="mse")))
    assert len(problems) == 1  # once for all layers of the group
    for result in results:  # worse than rounding to nearest, and therefore not kept
        assert result.report.algorithm == "rtn" and result.report.error == result.report.rtn_error

    def better(problem: Problem) -> Prepared:
        return replace(prepare_gptq(problem), name="better")

    monkeypatch.setitem(ALGORITHMS, "toward_zero", better)
    results = solve(job(Recipe(format="nvfp4", algorithm="toward_zero", scales="mse")))
    assert {result.report.algorithm for result in results} == {"better"}


def test_refined_rounding_is_not_called_rounding_to_nearest() -> None:
    plain = solve(job(Recipe(format="nvfp4", algorithm="rtn")))
    refined = solve(job(Recipe(format="nvfp4", algorithm="rtn", descent=4)))
    for before, after in zip(plain, refined, strict=True):
        assert (before.report.algorithm, after.report.algorithm) == ("rtn", "rtn+descent")
        assert after.report.error < before.report.error == after.report.rtn_error


@pytest.mark.parametrize("fmt", ["nvfp4", "nvint4", "mxfp4"])
def test_a_tiny_layer_does_not_drown_beside_its_siblings(fmt: str) -> None:
    """One global scale for a layer and one 1e-8 of its size left nothing of the latter."""
    whole = job(Recipe.default(fmt, rotation=1))
    tiny = replace(
        whole,
        names=("m.q_proj", "m.router_like"),
        weights=(whole.weights[0], whole.weights[1] * 1e-8),
    )
    large, small = solve(tiny)
    assert (large.name, small.name) == tiny.names
    assert small.report.error == pytest.approx(solve(whole)[1].report.error, rel=0.2)


def test_layers_that_engines_fuse_share_a_global_scale_whatever_their_size() -> None:
    whole = job(Recipe.default("nvfp4"))
    fused = replace(
        whole,
        names=("m.gate_proj", "m.up_proj"),
        weights=(whole.weights[0], whole.weights[1] * 1e-3),
    )
    gate, up = solve(fused)
    assert torch.equal(gate.weight.scales.global_scale, up.weight.scales.global_scale)


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_errors_of_nested_codes_are_those_of_both_widths(algorithm: str) -> None:
    given = job(Recipe.default("mxint8", nested=4, algorithm=algorithm))
    alone = solve(replace(given, recipe=Recipe.default("mxint4", algorithm=algorithm)))
    for index, (result, narrow) in enumerate(zip(solve(given), alone, strict=True)):
        report = result.report
        assert torch.equal(drop(result.weight, 4).codes, narrow.weight.codes)
        assert (report.error, report.held_out_error, report.rtn_error, report.algorithm) == (
            narrow.report.error,
            narrow.report.held_out_error,
            narrow.report.rtn_error,
            narrow.report.algorithm,
        )
        wide = result.rotation.rotate(result.weight.dequantize())
        assert report.wide_error == pytest.approx(
            error_of(given, index, wide, given.hessian), rel=1e-4
        )
        assert report.wide_error < report.error / 4 and narrow.report.wide_error is None


@pytest.mark.parametrize("elements", [1 << 24, 48 * 128, 16 * 128], ids=["group", "layer", "part"])
def test_layers_with_costs_are_solved_alike_however_many_rows_fit(
    elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All layers in step, one after the other, or some blocks of costs at a time."""
    generator = torch.Generator().manual_seed(6)
    gradients = [torch.randn(400, 16, generator=generator) for _ in range(4)]
    blocks = [g.T @ g @ torch.diag(torch.logspace(0, -3, 16)) for g in gradients]
    blocks = [block @ block.T for block in blocks]
    given = replace(
        job(Recipe.default("nvfp4", fisher=4)), costs=(tuple(blocks[:3]), tuple(blocks[3:]))
    )
    whole = solve(given)
    monkeypatch.setattr("ptq.pipeline.solve.PART_ELEMENTS", elements)
    for result, same in zip(solve(given), whole, strict=True):
        assert result.report.algorithm == "gptq"
        assert (result.weight.codes != same.weight.codes).float().mean() < 0.02
        assert result.report.error == pytest.approx(same.report.error, rel=0.02)
    usual = solve(replace(given, costs=()))
    assert any((a.weight.codes != b.weight.codes).any() for a, b in zip(whole, usual, strict=True))
