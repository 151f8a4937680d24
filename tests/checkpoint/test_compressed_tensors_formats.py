"""How compressed-tensors stores formats: NVINT4 as int4, MXFP8 as E4M3; and who reads mixtures."""

import pytest
import torch

from ptq.checkpoint.compressed_tensors_formats import (
    CT_FORMATS,
    ct_opens,
    fold_int4,
    name_e4m3,
    unfold_int4,
    unname_e4m3,
)
from ptq.checkpoint.engines import Verdict
from ptq.checkpoint.quantization_config import LayerInfo
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
    folded = fold_int4(stored(tensor))
    assert {k: v.dtype for k, v in folded.items()} == {
        "weight_packed": torch.int32,
        "weight_scale": torch.bfloat16,
        "weight_shape": torch.int64,
        "bias": torch.float32,
    }
    assert folded["weight_shape"].tolist() == [8, 32]
    assert torch.equal(folded["weight_scale"].float(), tensor.scales.step())
    again = unfold_int4(folded)
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
    folded = fold_int4(stored(QuantizedTensor(codes, scales)))
    words = [int(w) & 0xFFFFFFFF for w in folded["weight_packed"].flatten()]
    assert [f"{w:08X}" for w in words] == ["FEBA9871", "88888888"]
    assert folded["weight_scale"].tolist() == [[1.0]]


def test_folding_never_rounds():
    with pytest.raises(ValueError, match="not a power of two"):
        fold_int4(stored(int4()) | {"weight_global_scale": torch.tensor([3.0])})
    folded = fold_int4(stored(int4()))
    folded["weight_scale"][0, 0] = 1 + 2**-7
    with pytest.raises(ValueError, match="not NVINT4"):
        unfold_int4(folded)


@pytest.mark.parametrize("shape", [[8, 16], [4, 32], [8], [8, 32, 1]])
def test_shapes_that_do_not_belong_together_are_refused(shape):
    folded = fold_int4(stored(int4())) | {"weight_shape": torch.tensor(shape)}
    with pytest.raises(ValueError, match="weight_shape is"):
        unfold_int4(folded)


def test_codes_of_mxfp8_are_the_bytes_of_e4m3():
    codes = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    stored = name_e4m3({"weight_packed": codes, "bias": torch.ones(2)})
    assert stored.keys() == {"weight", "bias"} and stored["weight"].dtype == torch.float8_e4m3fn
    numbers = FORMATS["mxfp8"].element.decode(codes)
    assert torch.equal(stored["weight"].float().nan_to_num(1e9), numbers.nan_to_num(1e9))
    again = unname_e4m3(stored)
    assert torch.equal(again["weight_packed"], codes) and again.keys() == {"weight_packed", "bias"}
    conversion = CT_FORMATS["mxfp8"].conversion
    assert conversion is not None and conversion.packed == "weight"


def test_what_engines_make_of_a_mixture():
    four, eight = LayerInfo(format="nvfp4"), LayerInfo(format="mxfp8")
    openings = ct_opens({"a.o_proj": four, "a.down_proj": eight})
    verdicts = {engine: opening.verdict for engine, opening in openings.items()}
    assert verdicts == {
        "transformers": Verdict.RIGHT,
        "vLLM": Verdict.RIGHT,
        "SGLang": Verdict.UNKNOWN,
        "TensorRT-LLM": Verdict.UNKNOWN,
    }
    assert "quantizes inputs to MXFP8 too" in openings["vLLM"].note
    assert "several formats" in str(ct_opens({"a": four, "b": LayerInfo(format="mxfp4")})["SGLang"])
    experts = {"m.experts.0.w1": eight, "m.experts.0.w2": eight}
    assert ct_opens(experts)["transformers"].verdict is Verdict.IMPORT
