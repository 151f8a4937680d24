"""The hash of a tensor is that of its bytes."""

import hashlib

import pytest
import torch

from ptq.model.tensor_digest import digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool])
def test_it_is_that_of_the_bytes(dtype: torch.dtype):
    tensor = torch.arange(12.0).reshape(3, 4).to(dtype)
    raw = tensor.view(torch.uint8).numpy().tobytes()
    assert digest(tensor) == hashlib.blake2b(raw, digest_size=16).hexdigest()
    assert digest(tensor.T.contiguous().T) == digest(tensor)


def test_any_bit_counts():
    tensor = torch.zeros(5)
    seen = {digest(tensor)}
    for bit in range(32):
        changed = tensor.clone()
        changed.view(torch.int32)[3] ^= 1 << bit if bit < 31 else -(1 << 31)
        seen.add(digest(changed))
    assert len(seen) == 33
    assert digest(torch.empty(0)) == digest(torch.empty(0, 3, dtype=torch.bfloat16))
    assert digest(torch.tensor(1.5)) == digest(torch.tensor([1.5]))
