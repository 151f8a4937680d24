"""What errors of outputs cost, from gradients."""

import pytest
import torch
from torch import Tensor

from ptq.calib.hidden_states import HiddenStates
from ptq.calib.output_costs import OutputCosts, shrunk


def added(gradients: list[Tensor], where: str = "ram") -> tuple[Tensor, ...] | None:
    """G of a layer in blocks of at most four rows."""
    with HiddenStates(where, torch.device("cpu")) as kept:
        costs = OutputCosts(
            kept, lambda rows: [slice(i, min(i + 4, rows)) for i in range(0, rows, 4)]
        )
        costs.add("a", gradients)
        assert costs.of("b") is None
        return costs.of("a")


def relative(blocks: tuple[Tensor, ...] | None) -> list[Tensor]:
    """Only the proportions of costs within a layer matter."""
    assert blocks is not None
    total = sum(float(block.diagonal().sum()) for block in blocks)
    return [block / total for block in blocks]


def mixed(tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    return torch.randn(tokens, 6, generator=generator) @ mix


def test_blocks_are_those_of_the_second_moment() -> None:
    gradients = [mixed(2000, seed) for seed in range(4)]
    gradients = [g / g.norm(dim=1, keepdim=True) for g in gradients]  # of one size
    whole = torch.cat(gradients)
    exact = whole.T @ whole / len(whole)
    found = added(gradients)
    assert [tuple(g.shape) for g in found or ()] == [(4, 4), (2, 2)]
    for block, rows in zip(relative(found), (slice(0, 4), slice(4, 6)), strict=True):
        assert torch.allclose(block.diagonal(), exact[rows, rows].diagonal(), rtol=1e-4)
        assert torch.allclose(block, exact[rows, rows], atol=0.002)
    again = added(gradients, "disk")
    assert found and again and all(torch.equal(*pair) for pair in zip(found, again, strict=True))


def test_no_token_counts_for_more_than_the_median_one() -> None:
    gradients = [mixed(200, seed) for seed in range(2)]
    loud = [g.clone() for g in gradients]
    loud[0][0] *= 1e4
    quiet, noisy = relative(added(gradients)), relative(added(loud))
    assert torch.allclose(quiet[0], noisy[0], rtol=0.05, atol=0.05 * float(quiet[0].max()))


def test_correlations_that_one_half_does_not_know_of_vanish() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(40, 64, generator=generator) for _ in range(2))
    noise = shrunk(one.T @ one, other.T @ other)
    both = one.T @ one + other.T @ other
    off = ~torch.eye(64, dtype=torch.bool)
    assert torch.equal(noise.diagonal(), both.diagonal())
    assert float(noise[off].norm()) < 0.2 * float(both[off].norm())
    known = shrunk(one.T @ one, one.T @ one)
    assert torch.allclose(known, 2 * one.T @ one, rtol=1e-4, atol=1e-3)


def test_a_layer_that_nothing_depends_on_costs_nothing() -> None:
    assert added([]) is None
    (found, rest) = added([torch.zeros(5, 6)] * 2) or ()
    assert not found.any() and not rest.any()
    (alone, _) = added([mixed(50, 0)]) or ()  # one half knows nothing: no correlations
    assert torch.equal(alone, alone.diagonal().diag())


@pytest.mark.parametrize("size", [1e-25, 1e18])
def test_the_size_of_gradients_does_not_matter(size: float) -> None:
    gradients = [mixed(100, seed) for seed in range(2)]
    usual, scaled = relative(added(gradients)), relative(added([g * size for g in gradients]))
    assert torch.allclose(scaled[0], usual[0], rtol=1e-3, atol=1e-6)
