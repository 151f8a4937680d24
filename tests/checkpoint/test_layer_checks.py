"""What no quantized layer can be is refused, by name, and what any writer makes is not."""

import math

import pytest
import torch
from torch import Tensor

from ptq.checkpoint.layer_checks import check_layer, check_numbers
from ptq.checkpoint.quantization_config import LayerInfo
from ptq.checkpoint.reader import to_disk
from ptq.numerics.formats import FORMATS
from ptq.numerics.rotation import Rotation
from ptq.numerics.rtn import rtn
from ptq.numerics.scales import Grid
from ptq.runtime.quant_linear import QuantLinear

E4M3 = [name for name, fmt in FORMATS.items() if fmt.has_global_scale]
E8M0 = [name for name, fmt in FORMATS.items() if fmt.powers_of_two]


def layer(name: str) -> tuple[dict[str, Tensor], LayerInfo]:
    """A layer of random numbers with quantized inputs and a bias, as it lies on disk."""
    fmt = FORMATS[name]
    columns = max(64, 2 * fmt.size(32))
    weight = torch.randn(8, columns)
    t = fmt.global_scale(weight.abs().amax(), 1.5)
    quantized = QuantLinear.from_quantized(
        rtn(weight, torch.eye(columns), Grid(fmt, t, "absmax")),
        Rotation(1),
        torch.randn(8).bfloat16(),
        quantize_inputs=True,
        input_global_scale=fmt.global_scale(torch.tensor(9.0), 2.0)
        if fmt.has_global_scale
        else None,
    )
    tensors = {f"q.{leaf}": tensor for leaf, tensor in quantized.state_dict().items()}
    stored = to_disk(tensors, {"q": quantized.info})
    return {name.removeprefix("q."): tensor for name, tensor in stored.items()}, quantized.info


def refused(name: str, leaf: str, value: Tensor) -> str:
    """What is said of a layer with another tensor in the place of one."""
    tensors, info = layer(name)
    assert leaf in tensors or leaf == "weight_global_scale"
    with pytest.raises(ValueError) as caught:
        check_layer(tensors | {leaf: value}, info, "a.q")
    message = str(caught.value)
    assert message.startswith(("a.q", "the tensor a.q")) and "\n" not in message
    return message


def with_bits(name: str, bits: int) -> Tensor:
    scale = layer(name)[0]["weight_scale"].clone()
    scale.view(FORMATS[name].bits_dtype)[5, min(1, scale.shape[1] - 1)] = bits
    return scale


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_passes(name: str) -> None:
    tensors, info = layer(name)
    check_layer(tensors, info, "a.q")
    for scale in (FORMATS[name].encode_scale(torch.tensor(s)) for s in (0.0, 1e-30, 1.0)):
        check_layer(tensors | {"weight_scale": with_bits(name, int(scale))}, info, "a.q")


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (0.0, "0 (bits 0x0000"),
        (-0.5, "-0.5 (bits 0xBF00"),
        (1e-39, "1.01019e-39 (bits 0x000B"),
        (math.nan, "NaN (bits 0x7FC0"),
        (-math.inf, "NaN (bits 0xFF80"),
    ],
)
def test_a_bfloat16_scale_is_a_positive_normal_number(scale: float, said: str) -> None:
    bits = int(torch.tensor(scale).bfloat16().view(torch.int16))
    message = refused("int4-g32", "weight_scale", with_bits("int4-g32", bits))
    assert message.startswith(f"a.q.weight_scale holds {said}, row 5, group 1)")
    large = int(torch.tensor(2.0**64).bfloat16().view(torch.int16))
    assert "overflow" in refused("int4-g32", "weight_scale", with_bits("int4-g32", large))


@pytest.mark.parametrize("name", E4M3)
def test_every_byte_of_an_e4m3_scale_is_a_positive_number_or_refused(name: str) -> None:
    for byte in range(256):
        number = torch.tensor([byte], dtype=torch.uint8).view(torch.float8_e4m3fn).float().item()
        tensors, info = layer(name)
        tensors["weight_scale"] = with_bits(name, byte)
        if number > 0:
            check_layer(tensors, info, "a.q")
        else:
            said = "NaN" if math.isnan(number) else f"{number:g}"
            with pytest.raises(ValueError) as caught:
                check_layer(tensors, info, "a.q")
            where = f"a.q.weight_scale holds {said} (byte 0x{byte:02X}, row 5, group 1)"
            assert str(caught.value).startswith(where)


@pytest.mark.parametrize("name", E8M0)
def test_bytes_of_an_e8m0_scale_that_are_nan_or_overflow_are_refused(name: str) -> None:
    assert "weight_scale holds NaN (byte 0xFF" in refused(
        name, "weight_scale", with_bits(name, 255)
    )
    for byte in (191, 254):  # 2^64 and beyond
        assert "overflow" in refused(name, "weight_scale", with_bits(name, byte))
    for byte in (0, 1, 127, 170):
        tensors, info = layer(name)
        check_layer(tensors | {"weight_scale": with_bits(name, byte)}, info, "a.q")


@pytest.mark.parametrize("leaf", ["weight_global_scale", "input_global_scale"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, -math.inf, 1e-40, 3e38])
def test_a_global_scale_is_a_positive_normal_number(leaf: str, value: float) -> None:
    message = refused("nvfp4", leaf, torch.tensor([value]))
    assert message.startswith(f"a.q.{leaf} is ") and "must be positive" in message


def test_global_scales_of_weights_that_overflow_are_refused() -> None:
    assert "whose products overflow" in refused(
        "nvfp4", "weight_global_scale", torch.tensor([2.0**-100])
    )
    # E8M0 scales with a factor, as other writers have it
    assert "is 0 and must" in refused("mxfp4", "weight_global_scale", torch.tensor([0.0]))


@pytest.mark.parametrize(
    ("leaf", "value", "said"),
    [
        ("weight_packed", torch.zeros(8, 31, dtype=torch.uint8), "do not belong together"),
        ("weight_packed", torch.zeros(9, 32, dtype=torch.uint8), "do not belong together"),
        ("weight_packed", torch.zeros(256, dtype=torch.uint8), "do not belong together"),
        ("weight_packed", torch.zeros(8, 32, dtype=torch.int8), "is torch.int8"),
        ("weight_global_scale", torch.ones(2), "should be one number"),
        ("weight_global_scale", torch.empty(0), "should be one number"),
        ("weight_global_scale", torch.ones(1, dtype=torch.float16), "is torch.float16"),
        ("input_global_scale", torch.ones(1, 1), "should be one number"),
        ("input_global_scale", torch.ones(1).bfloat16(), "is torch.bfloat16"),
        ("bias", torch.ones(7).bfloat16(), "for 8 outputs"),
        ("bias", torch.ones(8, dtype=torch.int32), "is torch.int32"),
        ("bias", torch.tensor([math.nan] * 8), "holds NaN"),
        ("bias", torch.full((8,), 2.0**100), "beyond"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(
    leaf: str, value: Tensor, said: str
) -> None:
    assert said in refused("nvfp4", leaf, value)


@pytest.mark.parametrize("name", [n for n, fmt in FORMATS.items() if not fmt.packed])
def test_bytes_that_are_no_codes_are_refused(name: str) -> None:
    """Of 6 bits there are 64 codes, and E4M3 has two NaN: all others stand for numbers."""
    element = FORMATS[name].element
    for byte in range(256):
        tensors, info = layer(name)
        tensors["weight_packed"][2, 3] = byte
        if byte < len(element.values) and not math.isnan(element.values[byte]):
            check_layer(tensors, info, "a.q")
        else:
            with pytest.raises(ValueError, match=rf"holds 0x{byte:02X} \(row 2, column 3\)"):
                check_layer(tensors, info, "a.q")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_nan_and_infinity_are_seen_wherever_they_lie(dtype: torch.dtype, size: int) -> None:
    check_numbers(torch.empty(0, dtype=dtype), "x")
    for place in {0, size // 2, size - 1}:
        for bad in (math.nan, math.inf, -math.inf):
            tensor = torch.zeros(size, dtype=dtype)
            tensor[place] = bad
            with pytest.raises(ValueError, match="x holds NaN, infinity"):
                check_numbers(tensor, "x")
