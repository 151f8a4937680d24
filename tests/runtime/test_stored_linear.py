"""A StoredLinear lies as on disk, computes as a QuantLinear, and saves what it loaded."""

import pytest
import torch
from torch import Tensor

from ptq.checkpoint.compressed_tensors_formats import CT_FORMATS
from ptq.checkpoint.compressed_tensors_int4 import fold_int4, fold_nvint4
from ptq.checkpoint.quantization_config import LayerInfo
from ptq.numerics.formats import FORMATS
from ptq.numerics.rotation import Rotation
from ptq.numerics.scales import Grid, round_to
from ptq.reading.safetensors_layout import Entry
from ptq.runtime.quant_linear import QuantLinear
from ptq.runtime.stored_linear import DTYPES, StoredLinear

OUT, IN = 48, 128


def memory(name: str, rotation: int = 16) -> QuantLinear:
    """Rounded to nearest, with a global scale that is a power of two."""
    torch.manual_seed(0)
    fmt, weight = FORMATS[name], Rotation(rotation).exact(torch.randn(OUT, IN))
    grid = Grid(fmt, torch.tensor(2.0**-10 if fmt.has_global_scale else 1.0), "absmax")
    return QuantLinear.from_quantized(
        round_to(weight, grid.scales(weight)),
        Rotation(rotation),
        torch.randn(OUT),
        quantize_inputs=False,
        input_global_scale=None,
    )


def on_disk(layer: QuantLinear) -> dict[str, Tensor]:
    """The tensors of the ``ptq`` dialect: scales in their own dtype, a divisor of one element."""
    scale = layer.weight_scale
    tensors = {
        "weight_packed": layer.weight_packed,
        "weight_scale": scale
        if layer.format.powers_of_two
        else scale.view(layer.format.scale_dtype),
        "bias": layer.bias,
    }
    if layer.weight_global_scale is not None:
        tensors["weight_global_scale"] = (1 / layer.weight_global_scale).reshape(1)
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def stored(name: str, *, tensors: dict[str, Tensor]) -> StoredLinear:
    """Loaded with ``tensors``, converted where compressed-tensors has others."""
    layer = StoredLinear(
        LayerInfo(format=name, rotation=16, bias=True), IN, OUT, torch.get_default_dtype()
    )
    if "weight_shape" in tensors:
        conversion = CT_FORMATS[name].conversion
        assert conversion is not None
        names = {dtype: short for short, dtype in DTYPES.items()}
        entries = {
            leaf: Entry(file=None, dtype=names[t.dtype], shape=tuple(t.shape), offset=0, bytes=0)  # pyright: ignore[reportArgumentType]
            for leaf, t in tensors.items()
            if leaf in conversion.types
        }
        layer.expect(conversion, entries)
    for leaf, tensor in tensors.items():
        layer._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    layer.settle("layer")
    return layer


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "nvint4", "int4-g128", "int4-g32"])
def test_it_computes_what_a_layer_in_memory_computes(name: str) -> None:
    layer = memory(name)
    tensors = on_disk(layer)
    x = torch.randn(3, IN)
    copy = stored(name, tensors=tensors)
    assert torch.equal(copy(x), layer(x))
    assert copy.state_dict().keys() == tensors.keys()


@pytest.mark.parametrize(("name", "fold"), [("nvint4", fold_nvint4), ("int4-g128", fold_int4)])
def test_int4_is_converted_and_saved_as_it_was(name: str, fold) -> None:
    layer = memory(name)
    tensors = fold(on_disk(layer))
    copy = stored(name, tensors=tensors)
    x = torch.randn(3, IN)
    torch.testing.assert_close(copy(x), layer(x))
    assert copy.weight_packed.dtype == torch.uint8
    saved = copy.state_dict()
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[leaf], tensors[leaf]) for leaf in tensors)


def test_scales_keep_their_dtype_when_the_model_is_cast() -> None:
    layer = memory("int4-g128")
    for copy in (stored("int4-g128", tensors=on_disk(layer)), layer):
        before = copy.quantized_weight().dequantize()
        for dtype in (torch.float16, torch.float32):
            assert torch.equal(copy.to(dtype).quantized_weight().dequantize(), before)


def test_a_dense_copy_is_rotated_back() -> None:
    layer = memory("mxfp4")
    linear = stored("mxfp4", tensors=on_disk(layer)).dense(torch.float32)
    x = torch.randn(3, IN)
    torch.testing.assert_close(linear(x), layer(x), atol=1e-5, rtol=1e-5)


def test_what_is_damaged_or_away_is_named() -> None:
    tensors = on_disk(memory("nvfp4"))
    tensors["weight_scale"].view(torch.uint8).fill_(0x7F)  # NaN
    with pytest.raises(ValueError, match=r"layer\.weight_scale"):
        stored("nvfp4", tensors=tensors)
    folded = fold_nvint4(on_disk(memory("nvint4")))
    away = {leaf: tensor.to("meta") for leaf, tensor in folded.items()}
    with pytest.raises(ValueError, match="nvint4 of compressed-tensors cannot be offloaded"):
        stored("nvint4", tensors=away)
    layer = StoredLinear(LayerInfo(format="nvint4", bias=True), IN, OUT, torch.float32)
    conversion = CT_FORMATS["nvint4"].conversion
    assert conversion is not None
    with pytest.raises(ValueError, match="has no weight_packed"):
        layer.expect(conversion, {})
