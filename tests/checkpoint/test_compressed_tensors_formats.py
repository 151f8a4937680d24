"""How compressed-tensors stores formats: MXFP8 as E4M3; and who reads mixtures."""

import pytest
import torch

from ptq.checkpoint.compressed_tensors_formats import (
    CT_FORMATS,
    ct_opens,
    name_e4m3,
    unname_e4m3,
)
from ptq.checkpoint.engines import Verdict
from ptq.checkpoint.quantization_config import LayerInfo
from ptq.numerics.formats import FORMATS


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


def test_scales_of_whole_rows_are_kept_where_they_are_bfloat16_numbers():
    conversion = CT_FORMATS["fp8-channel"].conversion
    assert conversion is not None
    scale = torch.tensor([[0.3], [7.0]]).bfloat16()
    layer = {"weight_packed": torch.full((2, 5), 0x38, dtype=torch.uint8), "weight_scale": scale}
    stored = conversion.write(layer)
    assert torch.equal(stored["weight"].float(), torch.ones(2, 5))
    for dtype in (torch.bfloat16, torch.float32):  # vLLM and llm-compressor have both
        again = conversion.read(stored | {"weight_scale": scale.to(dtype)})
        assert again.keys() == layer.keys()
        assert all(torch.equal(again[leaf], layer[leaf]) for leaf in layer)
    with pytest.raises(ValueError, match="float32 scales are no bfloat16 numbers"):
        conversion.read(stored | {"weight_scale": torch.full((2, 1), 1 / 3)})


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
