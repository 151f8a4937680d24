"""Laws of merged task vectors, in float64."""

import pytest
import torch
from torch import Tensor

from ptq.numerics.merging import arithmetic, outlier_weights, rank_shares, singular

TIGHT = {"rtol": 1e-7, "atol": 1e-9}


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator).double()).Q


def low_rank(shape: tuple[int, int], rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape[0], rank, generator=generator).double() @ (
        torch.randn(rank, shape[1], generator=generator).double()
    )


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_one_task_with_all_ranks_is_itself(shape: tuple[int, int]) -> None:
    delta = low_rank(shape, min(shape), 0)
    torch.testing.assert_close(singular([delta]), delta, **TIGHT)
    assert torch.equal(arithmetic([delta]), delta)


def test_a_task_merged_with_itself_is_counted_once() -> None:
    delta = low_rank((24, 40), 8, 0)
    torch.testing.assert_close(singular([delta, delta]), delta, **TIGHT)
    torch.testing.assert_close(arithmetic([delta, delta]), 2 * delta, **TIGHT)


def test_tasks_in_orthogonal_spaces_are_added() -> None:
    left, right = orthonormal(24, 12, 0), orthonormal(40, 12, 1)
    one = left[:, :6] @ torch.diag(torch.arange(1.0, 7).double()) @ right[:, :6].T
    two = left[:, 6:] @ torch.diag(torch.arange(3.0, 9).double()) @ right[:, 6:].T
    torch.testing.assert_close(singular([one, two]), one + two, **TIGHT)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_singular_values_are_those_that_were_kept(shape: tuple[int, int]) -> None:
    """Whatever the spaces: vectors are orthonormal, so that no task raises what another wrote."""
    deltas = [low_rank(shape, 24, seed) for seed in (0, 1)]
    kept = [torch.linalg.svdvals(delta)[:12] for delta in deltas]
    expected = torch.cat([3 * kept[0], 0.5 * kept[1]]).sort(descending=True).values
    merged = singular(deltas, weights=[3.0, 0.5])
    torch.testing.assert_close(torch.linalg.svdvals(merged), expected, rtol=1e-6, atol=1e-9)


def test_small_singular_values_are_left_out() -> None:
    left, right = orthonormal(16, 8, 0), orthonormal(16, 8, 1)
    values = torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1]).double()
    delta = (left * values) @ right.T
    other = torch.zeros_like(delta)
    merged = singular([delta, other], shares=[4 / 16, 12 / 16])
    torch.testing.assert_close(merged, (left[:, :4] * values[:4]) @ right[:, :4].T, **TIGHT)


def test_the_vectors_are_the_nearest_orthonormal_ones() -> None:
    """Against the polar factor, by a singular value decomposition."""
    deltas = [low_rank((20, 30), 10, seed) for seed in (0, 1)]
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    factors = []
    for vectors in ([p[0][:, :10] for p in parts], [p[2][:10].T for p in parts]):
        u, _, vh = torch.linalg.svd(torch.cat(vectors, 1), full_matrices=False)
        factors.append(u @ vh)
    values = torch.cat([p[1][:10] for p in parts])
    expected = (factors[0] * values) @ factors[1].T
    torch.testing.assert_close(singular(deltas), expected, rtol=1e-6, atol=1e-8)


def test_weights_follow_outliers_and_ranks_follow_density() -> None:
    generator = torch.Generator().manual_seed(0)
    drift = torch.randn(64, 64, generator=generator)
    purpose = drift.clone()
    purpose[:2] *= 10
    weights = outlier_weights([drift, purpose])
    assert weights[1] > 3 * weights[0] and sum(weights) == pytest.approx(2)
    shares = rank_shares([drift, purpose])
    assert shares[0] > shares[1] and sum(shares) == pytest.approx(1)
    # neither depends on how large the change is
    assert outlier_weights([drift, 100 * purpose]) == pytest.approx(weights)
    assert rank_shares([drift, 100 * purpose]) == pytest.approx(shares)
    one = torch.zeros(4, 4)
    one[0, 0] = 1.0
    assert rank_shares([one, torch.ones(4, 4)]) == pytest.approx([1 / 17, 16 / 17])


def test_tasks_that_change_nothing_are_no_error() -> None:
    nothing = torch.zeros(8, 16)
    assert outlier_weights([nothing, nothing]) == [1.0, 1.0]
    assert rank_shares([nothing, nothing]) == [0.5, 0.5]
    assert not singular([nothing, nothing]).any()
