"""Laws of the block Hadamard rotation (G6, G7, G11)."""

import pytest
import torch

from ptq.numerics.rotation import Rotation, hadamard, largest_rotation

sizes = pytest.mark.parametrize("size", [1, 2, 16, 32, 64, 128, 256])


@sizes
def test_the_matrix_is_sylvesters(size: int) -> None:
    expected = [[(-1) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]
    assert hadamard(size).tolist() == expected


@sizes
def test_a_rotation_is_orthogonal_and_its_own_inverse(size: int) -> None:
    x = torch.randn(5, 256, dtype=torch.float64)
    y = Rotation(size).rotate(x)
    torch.testing.assert_close(Rotation(size).rotate(y), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(y.square().sum(-1), x.square().sum(-1))


@sizes
def test_rotating_inputs_and_weights_keeps_their_product(size: int) -> None:
    x, w = torch.randn(7, 256), torch.randn(9, 256)
    rotation = Rotation(size)
    error = rotation.rotate(x) @ rotation.rotate(w).T - x @ w.T
    assert float(error.norm() / (x @ w.T).norm()) < 1e-5


@sizes
def test_the_rotated_hessian_is_the_hessian_of_rotated_inputs(size: int) -> None:
    x, rotation = torch.randn(300, 256, dtype=torch.float64), Rotation(size)
    h = rotation.rotate_hessian(x.T @ x)
    torch.testing.assert_close(h, rotation.rotate(x).T @ rotation.rotate(x), rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(h.diagonal().mean(), (x.T @ x).diagonal().mean())


def test_low_precision_inputs_are_rotated_in_float32_and_rounded_once() -> None:
    x = torch.randn(4, 64).bfloat16()
    exact = Rotation(32).exact(x)
    assert exact.dtype == torch.float32
    torch.testing.assert_close(exact.double(), Rotation(32).exact(x.double()), rtol=1e-6, atol=1e-6)
    assert torch.equal(Rotation(32).rotate(x), exact.bfloat16())


def test_no_rotation_returns_the_tensor_itself() -> None:
    x = torch.randn(3, 5)
    assert Rotation(1).rotate(x) is x


@pytest.mark.parametrize("size", [0, 3, 48, -2])
def test_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        Rotation(size)
    with pytest.raises(ValueError, match="power of two"):
        hadamard(size)


def test_blocks_that_straddle_rows_are_refused_with_the_largest_that_fits() -> None:
    with pytest.raises(ValueError, match=r"rotation of 128 does not divide 192 .* is 64"):
        Rotation(128).rotate(torch.randn(2, 192))
    assert [largest_rotation(n) for n in (172, 192, 256, 14336)] == [4, 64, 256, 256]
