"""Laws of the second moments of what layers read (G1-G3)."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from ptq.calib.hessian import Hessian, full_precision

FEATURES = 24


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, FEATURES, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mean_is_the_token_average_of_outer_products(dtype: torch.dtype):
    parts = [tokens(3, 50, seed=i).to(dtype) * 10**i for i in range(3)]
    hessian = Hessian(FEATURES)
    for part in parts:
        hessian.update(part)
    x = torch.cat([p.reshape(-1, FEATURES) for p in parts]).double()
    exact = x.T @ x / len(x)
    assert hessian.tokens == 450
    assert (hessian.mean() - exact).norm() <= 1e-6 * exact.norm()
    assert torch.equal(hessian.mean(), hessian.mean().T)


def test_sums_are_double_up_to_4096_features_on_the_cpu():
    narrow, wide = Hessian(8), Hessian(4097)
    narrow.update(torch.ones(1, 8))
    wide.update(torch.ones(1, 4097))
    assert narrow.mean().dtype == torch.float64
    assert wide.mean().dtype == torch.float32


def test_every_token_counts_the_same_whatever_the_batch():
    x = tokens(6, 10)
    together, apart = Hessian(FEATURES), Hessian(FEATURES)
    together.update(x)
    for sequence in x:
        apart.update(sequence)
    torch.testing.assert_close(together.mean(), apart.mean(), rtol=1e-6, atol=1e-6)


def test_observed_tensors_are_not_changed():
    x = tokens(4, 10)
    before = x.clone()
    Hessian(FEATURES).update(x)
    assert torch.equal(x, before)


def test_no_tokens_is_an_error_not_a_zero_matrix():
    hessian = Hessian(FEATURES)
    hessian.update(torch.empty(0, FEATURES))
    with pytest.raises(ValueError, match="no tokens reached"):
        hessian.mean()
    assert torch.equal(hessian.total(), torch.zeros(FEATURES, FEATURES, dtype=torch.float64))


def test_precision_flags_are_off_inside_and_restored_after():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with full_precision():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_reduce_is_a_no_op_on_one_process():
    hessian = Hessian(FEATURES)
    hessian.update(tokens(5))
    before = hessian.mean()
    hessian.reduce()
    assert hessian.tokens == 5
    assert torch.equal(hessian.mean(), before)


def _reduce_on_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    seen, unseen_on_one = Hessian(FEATURES), Hessian(FEATURES)
    seen.update(tokens(3 + rank, seed=rank))
    if rank == 1:
        unseen_on_one.update(tokens(7, seed=9))
    for hessian in (seen, unseen_on_one):
        hessian.reduce()
    torch.save([(h.tokens, h.mean()) for h in (seen, unseen_on_one)], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_reduce_gives_every_rank_the_sum_over_ranks(tmp_path: Path):
    # by path: a process of its own cannot import a test module by name
    code = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('worker', "
        "sys.argv[1]); "
        "worker = importlib.util.module_from_spec(spec); spec.loader.exec_module(worker); "
        "worker._reduce_on_rank(int(sys.argv[2]), sys.argv[3])"
    )
    with subprocess.Popen([sys.executable, "-c", code, __file__, "1", str(tmp_path)]) as worker:
        try:
            _reduce_on_rank(0, str(tmp_path))  # here: a process that imports torch takes seconds
            assert worker.wait(120) == 0
        finally:
            worker.kill()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    expected = Hessian(FEATURES)
    expected.update(tokens(3, seed=0))
    expected.update(tokens(4, seed=1))
    for rank in range(2):
        (count, mean), (other_count, other) = torch.load(tmp_path / f"{rank}.pt")
        assert (count, other_count) == (7, 7)
        assert torch.equal(mean, expected.mean())
        assert other.trace() > 0
