"""The reference product: chunks in order, the same bits kept and remade, by any thread."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from ptq.numerics.formats import FORMATS, NVFP4, Format
from ptq.numerics.tensor import Scales, dequantize_packed
from ptq.runtime import reference_product
from ptq.runtime.reference_product import FEW_TOKENS, chunk_rows, few, product, remade

CPU = torch.device("cpu")
OUT, IN = 40, 128


def weight(fmt: Format = NVFP4, seed: int = 0) -> tuple[Tensor, Scales]:
    generator = torch.Generator().manual_seed(seed)
    width = IN // 2 if fmt.packed else IN
    packed = torch.randint(0, 64, (OUT, width), generator=generator, dtype=torch.uint8)
    steps = torch.rand(OUT, IN // fmt.size(IN), generator=generator) + 0.5
    return packed, Scales(fmt.encode_scale(steps), torch.tensor(0.3), fmt)


@pytest.fixture(params=[1, 7, 16, OUT], autouse=True)
def rows_at_a_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CHUNK_BYTES", "CHUNK_BYTES_FEW"):
        monkeypatch.setattr(reference_product, name, request.param * 4 * IN)


@pytest.mark.parametrize("tokens", [1, FEW_TOKENS, FEW_TOKENS + 1])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_chunks_are_the_weight_row_by_row(fmt: Format, tokens: int) -> None:
    packed, scales = weight(fmt)
    chunks = [chunk.clone() for chunk in remade(packed, scales, tokens)]
    assert torch.equal(torch.cat(chunks), dequantize_packed(packed, scales))
    size = chunk_rows(OUT, IN, tokens, CPU)
    assert [len(chunk) for chunk in chunks] == [
        min(size, OUT - start) for start in range(0, OUT, size)
    ]


@pytest.mark.parametrize("tokens", [0, 1, FEW_TOKENS, FEW_TOKENS + 1, 200])
def test_a_kept_weight_gives_the_bits_of_one_that_is_remade(tokens: int) -> None:
    packed, scales = weight()
    x = torch.randn(tokens, IN, generator=torch.Generator().manual_seed(2))
    whole = dequantize_packed(packed, scales)
    kept = list(whole.split(chunk_rows(OUT, IN, tokens, CPU)))
    y = product(x, remade(packed, scales, tokens), OUT)
    assert y.shape == (tokens, OUT) and torch.equal(y, product(x, kept, OUT))
    exact = x.double() @ whole.double().T
    magnitude = x.abs().double() @ whole.abs().double().T  # sums of IN products in float32
    assert bool(((y - exact).abs() <= IN * 2.0**-24 * magnitude).all())


def test_few_tokens_are_a_matter_of_the_cpu() -> None:
    assert few(FEW_TOKENS, CPU) and not few(FEW_TOKENS + 1, CPU)
    assert not few(1, torch.device("meta"))


def test_threads_do_not_write_into_each_others_chunks() -> None:
    weights = [weight(seed=seed) for seed in range(4)]
    x = torch.eye(IN)[:FEW_TOKENS]
    expected = [product(x, remade(*w, len(x)), OUT) for w in weights]

    def often(index: int) -> bool:
        return all(
            torch.equal(product(x, remade(*weights[index], len(x)), OUT), expected[index])
            for _ in range(50)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(often, range(4)))
