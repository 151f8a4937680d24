"""float32 products as written."""

import torch

from ptq.runtime.precision import as_written, full_precision, many_products


def test_neither_autocast_nor_a_lower_precision_enters_a_product() -> None:
    a, b, mkldnn = torch.randn(40, 64), torch.randn(64, 24), torch.backends.mkldnn.matmul
    expected, before = a @ b, mkldnn.fp32_precision
    mkldnn.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), full_precision(a.device):
            product = a @ b
        assert product.dtype == torch.float32 and torch.equal(product, expected)
        assert mkldnn.fp32_precision == "bf16", "what the process allows is as it was"
    finally:
        mkldnn.fp32_precision = before


def test_less_precision_is_noticed_wherever_it_was_allowed() -> None:
    cpu, mkldnn = torch.device("cpu"), torch.backends.mkldnn.matmul
    assert as_written(cpu)
    before = mkldnn.fp32_precision
    mkldnn.fp32_precision = "bf16"
    try:
        assert not as_written(cpu)
        with full_precision(cpu):
            assert as_written(cpu)
    finally:
        mkldnn.fp32_precision = before
    torch.set_float32_matmul_precision("medium")
    try:
        assert not as_written(cpu)
    finally:
        torch.set_float32_matmul_precision("highest")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not as_written(cpu)
        with full_precision(cpu):
            assert as_written(cpu)


def test_products_of_many_tokens_are_float32_whatever_is_allowed() -> None:
    generator, mkldnn = torch.Generator().manual_seed(0), torch.backends.mkldnn.matmul
    x, rows = (torch.randn(n, 256, generator=generator) for n in (300, 48))
    exact, sizes = x.double() @ rows.double().T, x.abs().double() @ rows.abs().double().T
    expected, before = many_products(x, rows), mkldnn.fp32_precision
    assert bool(((expected - exact).abs() <= 256 * 2.0**-24 * sizes).all())
    mkldnn.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), full_precision(x.device):
            assert torch.equal(many_products(x, rows), expected)
    finally:
        mkldnn.fp32_precision = before
