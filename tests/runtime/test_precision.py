"""float32 products as written."""

import torch

from ptq.runtime.precision import full_precision


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
