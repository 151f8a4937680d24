"""NVINT4 and MXINT4 as int4, exactly."""

import pytest
import torch

from ptq.checkpoint.compressed_tensors_int4 import (
    fold_int4,
    fold_mxint4,
    fold_nvint4,
    unfold_int4,
    unfold_mxint4,
    unfold_nvint4,
)
from ptq.numerics.formats import FORMATS
from ptq.numerics.tensor import QuantizedTensor, Scales, pack, unpack


def int4(exponent: int = -3, rows: int = 8) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(0)
    fmt = FORMATS["nvint4"]
    codes = fmt.element.encode(torch.randint(-7, 8, (rows, 32), generator=generator).float())
    bits = torch.randint(1, 0x7F, (rows, 2), generator=generator).to(torch.uint8)
    bits[0] = torch.tensor([0x01, 0x7E], dtype=torch.uint8)  # the whole range of E4M3: 2^-9 and 448
    return QuantizedTensor(codes, Scales(bits, torch.tensor(2.0**exponent), fmt))


def stored(tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
    return {
        "weight_packed": pack(tensor.codes, tensor.format),
        "weight_scale": tensor.scales.bits.view(torch.float8_e4m3fn),
        "weight_global_scale": (1 / tensor.scales.global_scale).reshape(1),
        "bias": torch.ones(1),
    }


@pytest.mark.parametrize("exponent", [-30, -3, 0, 5])
def test_folded_int4_stands_for_the_same_numbers(exponent):
    tensor = int4(exponent)
    folded = fold_nvint4(stored(tensor))
    assert {k: v.dtype for k, v in folded.items()} == {
        "weight_packed": torch.int32,
        "weight_scale": torch.bfloat16,
        "weight_shape": torch.int64,
        "bias": torch.float32,
    }
    assert folded["weight_shape"].tolist() == [8, 32]
    assert torch.equal(folded["weight_scale"].float(), tensor.scales.step())
    again = unfold_nvint4(folded)
    scales = Scales(
        again["weight_scale"].view(torch.uint8),
        (1 / again["weight_global_scale"]).reshape(()),
        tensor.format,
    )
    assert torch.equal(
        QuantizedTensor(unpack(again["weight_packed"], tensor.format), scales).dequantize(),
        tensor.dequantize(),
    )


def test_int4_words_are_offset_binary_with_element_zero_lowest():
    codes = FORMATS["nvint4"].element.encode(
        torch.tensor([[-7.0, -1, 0, 1, 2, 3, 6, 7, *[0.0] * 8]])
    )
    scales = Scales(torch.tensor([[0x38]], dtype=torch.uint8), torch.tensor(1.0), FORMATS["nvint4"])
    folded = fold_nvint4(stored(QuantizedTensor(codes, scales)))
    words = [int(w) & 0xFFFFFFFF for w in folded["weight_packed"].flatten()]
    assert [f"{w:08X}" for w in words] == ["FEBA9871", "88888888"]
    assert folded["weight_scale"].tolist() == [[1.0]]


def test_folding_never_rounds():
    with pytest.raises(ValueError, match="not a power of two"):
        fold_nvint4(stored(int4()) | {"weight_global_scale": torch.tensor([3.0])})
    folded = fold_nvint4(stored(int4()))
    folded["weight_scale"][0, 0] = 1 + 2**-7
    with pytest.raises(ValueError, match="not NVINT4"):
        unfold_nvint4(folded)


@pytest.mark.parametrize("shape", [[8, 16], [4, 32], [8], [8, 32, 1]])
def test_shapes_that_do_not_belong_together_are_refused(shape):
    folded = fold_nvint4(stored(int4())) | {"weight_shape": torch.tensor(shape)}
    with pytest.raises(ValueError, match="weight_shape is"):
        unfold_nvint4(folded)


def test_mxint4_is_int4_with_scales_that_are_powers_of_two():
    fmt = FORMATS["mxint4"]
    codes = fmt.element.encode(torch.arange(-7, 8).repeat(8)[:96].float().view(1, 96).repeat(3, 1))
    bits = torch.tensor([[1, 127, 254]] * 3, dtype=torch.uint8)  # all of E8M0 that is written
    layer = {"weight_packed": pack(codes, fmt), "weight_scale": bits, "bias": torch.ones(3)}
    folded = fold_mxint4(layer)
    assert folded["weight_scale"].dtype == torch.bfloat16 and folded["weight_shape"].tolist() == [
        3,
        96,
    ]
    assert folded["weight_scale"][0].float().tolist() == [2.0**-126, 1.0, 2.0**127]
    again = unfold_mxint4(folded)
    assert again.keys() == layer.keys()
    assert all(torch.equal(again[leaf], layer[leaf]) for leaf in layer)


@pytest.mark.parametrize("name", ["int4-g128", "int4-g32"])
def test_free_scales_are_stored_as_they_are(name: str):
    fmt = FORMATS[name]
    columns = 2 * fmt.group_size
    codes = fmt.element.encode(torch.arange(3 * columns).remainder(15).sub(7.0).view(3, columns))
    scales = torch.tensor([[0.3, 3e-5], [1.7, 2.0**-126], [100.0, 1.0]]).bfloat16()
    layer = {"weight_packed": pack(codes, fmt), "weight_scale": scales, "bias": torch.ones(3)}
    folded = fold_int4(layer)
    assert folded["weight_packed"].dtype == torch.int32
    assert folded["weight_shape"].tolist() == [3, columns]
    assert torch.equal(folded["weight_scale"], scales)
    again = unfold_int4(folded)
    assert again.keys() == layer.keys()
    assert all(torch.equal(again[leaf], layer[leaf]) for leaf in layer)


def test_scales_of_another_dtype_are_read_where_they_are_bfloat16_numbers():
    fmt = FORMATS["int4-g32"]
    packed = torch.zeros(1, fmt.group_size // 2, dtype=torch.uint8)
    folded = fold_int4({"weight_packed": packed, "weight_scale": torch.ones(1, 1).bfloat16()})
    for dtype in (torch.float16, torch.float32):
        scale = torch.tensor([[0.75]], dtype=dtype)
        assert unfold_int4(folded | {"weight_scale": scale})["weight_scale"].item() == 0.75
        wide = torch.tensor([[1 + 2**-9]], dtype=dtype)
        with pytest.raises(ValueError, match=f"{str(dtype)[6:]} scales are no bfloat16 numbers"):
            unfold_int4(folded | {"weight_scale": wide})


@pytest.mark.parametrize("scale", [1.5, 0.0, -2.0, float("nan"), float("inf")])
def test_int4_of_other_scales_is_no_mxint4(scale: float):
    fmt = FORMATS["mxint4"]
    layer = {
        "weight_packed": torch.zeros(1, 16, dtype=torch.uint8),
        "weight_scale": torch.tensor([[127]], dtype=torch.uint8),
    }
    folded = fold_mxint4(layer)
    assert fmt.group_size == 32
    folded["weight_scale"][0, 0] = scale
    with pytest.raises(ValueError, match="int4, but not MXINT4"):
        unfold_mxint4(folded)
