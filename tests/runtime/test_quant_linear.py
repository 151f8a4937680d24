"""QuantLinear: the reference forward of a quantized layer."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ptq.runtime.reference_product
from ptq.checkpoint.quantization_config import LayerInfo
from ptq.kernels import gpu
from ptq.numerics.activations import quantize_inputs
from ptq.numerics.formats import FORMATS
from ptq.numerics.rotation import Rotation
from ptq.numerics.rtn import rtn
from ptq.numerics.scales import Grid, round_to
from ptq.numerics.tensor import QuantizedTensor, Scales
from ptq.runtime.quant_linear import QuantLinear, stored_layer
from ptq.runtime.transformers_plugin import StoredLinear

OUT, IN = 24, 128
formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


def make(fmt, *, rotation=16, bias=True, inputs=False, static=True, seed=0) -> QuantLinear:
    generator = torch.Generator().manual_seed(seed)
    weight = Rotation(rotation).exact(torch.randn(OUT, IN, generator=generator))
    grid = Grid(fmt, fmt.global_scale(weight.abs().amax()), "absmax")
    static = inputs and static and fmt.has_global_scale
    return QuantLinear.from_quantized(
        rtn(weight, torch.eye(IN), grid),
        Rotation(rotation),
        torch.randn(OUT, generator=generator) if bias else None,
        quantize_inputs=inputs,
        input_global_scale=fmt.global_scale(torch.tensor(5.0), 2.0) if static else None,
    )


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_forward_is_its_formula_rounded_once(fmt, dtype, bias):
    layer, x = make(fmt, bias=bias), torch.randn(2, 5, IN).to(dtype)
    rotated = layer.rotation.rotate(x)
    assert rotated.dtype == dtype
    expected = F.linear(rotated.float(), layer.quantized_weight().dequantize())
    expected = expected + layer.bias if layer.bias is not None else expected
    result = layer(x)
    assert result.shape == (2, 5, OUT) and result.dtype == dtype
    assert torch.equal(result, expected.to(dtype))


@formats
@pytest.mark.parametrize("static", [True, False])
def test_quantized_inputs_come_from_the_unrounded_rotation(fmt, static):
    layer, x = make(fmt, inputs=True, static=static), torch.randn(7, IN).to(torch.bfloat16)
    rounded = quantize_inputs(x, fmt, layer.rotation, layer.input_global_scale, None).dequantize()
    expected = F.linear(rounded, layer.quantized_weight().dequantize()) + layer.bias
    assert torch.equal(layer(x), expected.to(torch.bfloat16))
    assert (layer.input_global_scale is not None) == (static and fmt.has_global_scale)


def test_the_rotated_layer_approximates_the_unrotated_one():
    x, weight = (
        torch.randn(32, IN),
        torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)),
    )
    layer = make(FORMATS["mxfp8"], bias=False)
    assert (layer(x) - F.linear(x, weight)).norm() < 0.05 * F.linear(x, weight).norm()


@formats
def test_its_weight_is_that_of_a_linear_layer_that_computes_the_same(fmt):
    layer, x = make(fmt, rotation=16), torch.randn(5, IN)
    assert layer.weight.dtype == torch.float32 and layer.weight.shape == (OUT, IN)
    torch.testing.assert_close(F.linear(x, layer.weight, layer.bias), layer(x))


@formats
@pytest.mark.parametrize("chunk_rows", [1, 7, OUT])
def test_a_cached_weight_gives_the_same_bits(fmt, chunk_rows, monkeypatch):
    for name in ("CHUNK_BYTES", "CHUNK_BYTES_FEW"):
        monkeypatch.setattr(ptq.runtime.reference_product, name, chunk_rows * 4 * IN)
    layer, x = make(fmt), torch.randn(9, IN)
    expected = layer(x)
    layer.cache = True
    assert torch.equal(layer(x), expected) and torch.equal(layer(x), expected)
    layer.load_state_dict(make(fmt, seed=1).state_dict())
    other = layer(x)
    layer.cache = False
    assert torch.equal(layer(x), other) and not torch.equal(other, expected)


def test_inputs_and_weights_are_not_modified():
    layer, x = make(FORMATS["nvfp4"], inputs=True), torch.randn(3, IN)
    before, state = x.clone(), {k: v.clone() for k, v in layer.state_dict().items()}
    layer(x)
    assert torch.equal(x, before)
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("inputs", [True, False])
def test_no_tokens_give_no_rows(inputs):
    assert make(FORMATS["nvfp4"], inputs=inputs)(torch.empty(0, IN)).shape == (0, OUT)


def test_autocast_and_global_precision_change_nothing():
    layer, x, mkldnn = make(FORMATS["nvfp4"]), torch.randn(64, IN), torch.backends.mkldnn.matmul
    expected = layer(x)
    before = mkldnn.fp32_precision
    mkldnn.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(x), expected)
        assert mkldnn.fp32_precision == "bf16"
    finally:
        mkldnn.fp32_precision = before


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.type(torch.bfloat16),
        lambda m: m.to(device="cpu", dtype=torch.float16),
    ],
    ids=["to", "half", "double", "type", "both"],
)
def test_only_the_bias_changes_its_dtype(move):
    layer = make(FORMATS["nvfp4"], inputs=True)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    move(layer)
    for name, tensor in layer.state_dict().items():
        if name == "bias":
            assert tensor.dtype != torch.float32
        else:
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name


def test_the_state_is_the_schema():
    keys = {"weight_packed", "weight_scale", "bias"}
    assert make(FORMATS["mxfp4"]).state_dict().keys() == keys
    assert make(FORMATS["nvfp4"]).state_dict().keys() == keys | {"weight_global_scale"}
    every = make(FORMATS["nvfp4"], inputs=True).state_dict()
    assert every.keys() == keys | {"weight_global_scale", "input_global_scale"}
    assert every["weight_packed"].shape == (OUT, IN // 2) and every["weight_scale"].shape == (
        OUT,
        IN // 16,
    )
    assert every["weight_global_scale"].shape == () == every["input_global_scale"].shape
    assert make(FORMATS["mxint6"]).weight_packed.shape == (OUT, IN)


def test_a_factor_besides_e8m0_scales_is_kept():
    fmt, weight = FORMATS["mxfp4"], make(FORMATS["mxfp4"], bias=False).quantized_weight()
    scaled = QuantizedTensor(weight.codes, Scales(weight.scales.bits, torch.tensor(0.5), fmt))
    layer = QuantLinear.from_quantized(
        scaled, Rotation(1), None, quantize_inputs=False, input_global_scale=None
    )
    assert layer.weight_global_scale is not None
    assert torch.equal(layer.quantized_weight().dequantize(), weight.dequantize() / 2)
    plain = nn.Linear(IN, OUT, bias=False)
    again = stored_layer(plain, layer.info, layer.state_dict(), "x")
    assert torch.equal(again(torch.eye(IN)), layer(torch.eye(IN)))


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_copies_compute_the_same_and_carry_no_cache(duplicate):
    layer, x = make(FORMATS["nvint4"], inputs=True), torch.randn(4, IN)
    layer.cache = True
    expected = layer(x)
    twin = duplicate(layer)
    assert twin._dequantized is None and twin.cache and twin.info == layer.info
    assert torch.equal(twin(x), expected)


def test_what_was_made_of_other_weights_is_forgotten():
    layer = make(FORMATS["nvfp4"], inputs=True)
    first = layer.kernel_weight()
    assert layer.kernel_weight() is first, "made once"
    layer.load_state_dict(make(FORMATS["nvfp4"], inputs=True, seed=1).state_dict())
    second = layer.kernel_weight()
    assert second is not first and second.weight.packed is layer.weight_packed
    layer.input_global_scale = torch.tensor(2.0)
    assert layer.kernel_weight().input_scale is layer.input_global_scale


@formats
def test_a_layer_is_its_description_and_its_tensors(fmt):
    layer, x = make(fmt, inputs=True), torch.randn(4, IN)
    again = stored_layer(nn.Linear(IN, OUT), layer.info, layer.state_dict(), "x")
    assert again.info == layer.info and torch.equal(again(x), layer(x))


def test_stored_layers_that_do_not_fit_are_refused_by_name():
    layer = make(FORMATS["nvfp4"], bias=False)
    tensors = dict(layer.state_dict())
    with pytest.raises(
        ValueError, match=r"a\.b is a quantized linear layer in the checkpoint and ReLU"
    ):
        stored_layer(nn.ReLU(), layer.info, tensors, "a.b")
    with pytest.raises(ValueError, match=r"a\.b has no bias"):
        stored_layer(nn.Linear(IN, OUT), layer.info, tensors, "a.b")
    with pytest.raises(ValueError, match=r"a\.b\.weight_packed has shape"):
        stored_layer(nn.Linear(IN, OUT + 1, bias=False), layer.info, tensors, "a.b")
    with pytest.raises(ValueError, match=r"a\.b has no weight_scale"):
        stored_layer(
            nn.Linear(IN, OUT, bias=False),
            layer.info,
            {"weight_packed": tensors["weight_packed"]},
            "a.b",
        )


@pytest.mark.parametrize(
    ("features", "fmt", "rotation"), [(48, "mxfp4", 1), (48, "nvfp4", 32), (40, "nvfp4", 8)]
)
def test_features_that_form_no_blocks_are_refused(features, fmt, rotation):
    with pytest.raises(ValueError, match=str(features)):
        QuantLinear(features, 8, LayerInfo(format=fmt, rotation=rotation))


def test_a_new_layer_is_on_meta_and_says_what_it_is():
    layer = QuantLinear(IN, OUT, make(FORMATS["nvfp4"], inputs=True).info)
    assert all(b.is_meta for b in layer.buffers())
    text = "in_features=128, out_features=24, bias=True, format=nvfp4, rotation=16, inputs=nvfp4"
    assert text in repr(layer)


@pytest.mark.parametrize(("name", "rotation"), [("nvfp4", 16), ("mxfp4", 32), ("nvint4", 1)])
def test_the_kernel_path_computes_what_the_reference_computes(
    name: str, rotation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Triton's interpreter: the same rotated bf16 inputs, packed weight and bias, to the
    rounding of bf16."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        monkeypatch.setattr(gpu, "available", lambda device: True)
        monkeypatch.setattr(gpu, "architecture", lambda device: 90)
    fmt = FORMATS[name]
    w = torch.randn(64, 128)
    grid = Grid(fmt, fmt.global_scale(w.abs().amax()), "mse")
    layer = QuantLinear.from_quantized(
        round_to(w, grid.scales(w)),
        Rotation(rotation),
        torch.randn(64),
        quantize_inputs=False,
        input_global_scale=None,
    )
    if torch.cuda.is_available():
        layer = layer.cuda()
    x = torch.randn(3, 5, 128, device=layer.weight_packed.device).bfloat16()
    expected = layer(x)
    assert layer.prepare(torch.bfloat16) is None
    measured = layer(x)
    assert measured.shape == expected.shape
    assert measured.dtype == expected.dtype
    assert float((measured.float() - expected.float()).norm() / expected.float().norm()) < 4e-3
    # not the dtype that the kernels were prepared for
    assert layer(x.float()).dtype == torch.float32


def stored(layer: QuantLinear) -> StoredLinear:
    """The layer as transformers keeps it: fp8 scales, global scales that divide."""
    on_disk = StoredLinear(layer.info, layer.in_features, layer.out_features, torch.bfloat16)
    fp8 = layer.format.has_global_scale
    tensors = {
        "weight_packed": layer.weight_packed,
        "weight_scale": layer.weight_scale.view(torch.float8_e4m3fn) if fp8 else layer.weight_scale,
        "weight_global_scale": layer.weight_global_scale,
        "input_global_scale": layer.input_global_scale,
        "bias": None if layer.bias is None else layer.bias.bfloat16(),
    }
    for name, tensor in tensors.items():
        if tensor is not None:
            held = (1 / tensor).reshape(1) if name.endswith("global_scale") else tensor
            setattr(on_disk, name, nn.Parameter(held, requires_grad=False))
    return on_disk


@pytest.mark.parametrize("arch", [100, 120])
@pytest.mark.parametrize("keep", [lambda layer: layer, stored], ids=["memory", "stored"])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_quantized_inputs_meet_the_weight_on_fp4_tensor_cores(
    name: str, keep, arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the interpreter, for few tokens and for so many that sm_100 wants scales in blocks."""
    pytest.importorskip("triton")
    from ptq.kernels import op_matmul, operator

    if not operator.INTERPRETED:
        pytest.skip("for the interpreter; tests/kernels/test_on_gpu.py is for devices")
    if arch == 100 and not op_matmul.NEW_ASSEMBLER:
        pytest.skip("the interpreter of Triton 3.6 fails at run-time loop bounds")
    monkeypatch.setattr(gpu, "available", lambda device: True)
    monkeypatch.setattr(gpu, "architecture", lambda device: arch)
    fmt, w = FORMATS[name], torch.randn(64, 128)
    grid = Grid(fmt, fmt.global_scale(w.abs().amax()), "mse")
    layer = QuantLinear.from_quantized(
        round_to(w, grid.scales(w)),
        Rotation(16),
        torch.randn(64),
        quantize_inputs=True,
        input_global_scale=torch.tensor(0.002) if fmt.has_global_scale else None,
    )
    layer = keep(layer)
    for tokens in (3, 66):
        x = torch.randint(-8, 9, (tokens, 128)).bfloat16()
        expected = layer(x).float()
        assert layer.prepare(torch.bfloat16) is None
        measured = layer(x).float()
        layer.kernel_dtype = None
        assert float((measured - expected).norm() / expected.norm()) < 4e-3
    assert ("_blocked" in vars(layer.kernel_weight())) == (arch == 100)


def test_the_reference_path_says_why_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(8, 256)
    fmt = FORMATS["nvfp4"]
    quantized = round_to(w, Grid(fmt, fmt.global_scale(w.abs().amax()), "absmax").scales(w))
    layer = QuantLinear.from_quantized(
        quantized, Rotation(256), None, quantize_inputs=True, input_global_scale=None
    )
    if not torch.cuda.is_available():
        assert "do not run on cpu" in str(layer.prepare(torch.bfloat16))
    monkeypatch.setattr(gpu, "available", lambda device: True)
    monkeypatch.setattr(gpu, "multiplies_fp4", lambda device: True)
    assert "rotation of 256" in str(layer.prepare(torch.bfloat16))
    assert layer.kernel_dtype is None


# ---------------------------------------------------------------- weights in units


def in_units(layer: QuantLinear) -> bool:
    """Whether the weight of 64 × 256 lies as Hopper's kernels stream it."""
    return layer.weight_packed.shape == (1, 2, 64, 64)


def kept_as(layer: QuantLinear, keep) -> QuantLinear:
    """The ``layer``, or what transformers keeps of it, in kernels."""
    layer = keep(layer).to("cuda" if torch.cuda.is_available() else "cpu")
    assert layer.prepare(torch.bfloat16) is None
    if not gpu.reads_units(layer.weight_packed.device):
        pytest.skip("this device reads rows")
    assert in_units(layer)
    return layer


@pytest.fixture(params=[lambda layer: layer, stored], ids=["memory", "stored"])
def keep(request: pytest.FixtureRequest):
    """What a layer is: QuantLinear, or transformers' StoredLinear."""
    return request.param


@pytest.fixture
def rows() -> QuantLinear:
    """A layer of whole units that no kernel was prepared for."""
    fmt, w = FORMATS["nvfp4"], torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    grid = Grid(fmt, fmt.global_scale(w.abs().amax()), "absmax")
    return QuantLinear.from_quantized(
        round_to(w, grid.scales(w)),
        Rotation(16),
        torch.ones(64),
        quantize_inputs=False,
        input_global_scale=None,
    )


def same_state(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    assert one.keys() == other.keys()
    return all(
        one[k].dtype == other[k].dtype and torch.equal(one[k].cpu(), other[k].cpu()) for k in one
    )


def test_the_state_of_units_is_rows(kernels, rows, keep) -> None:
    plain, layer = keep(rows), kept_as(copy.deepcopy(rows), keep)
    assert same_state(layer, plain)
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes["weight_packed"] == (64, 128) and shapes["weight_scale"] == (64, 16)
    assert torch.equal(layer.weight.cpu(), plain.weight)
    assert torch.equal(layer.scales.bits.cpu(), rows.weight_scale), "in rows for whoever asks"


@pytest.mark.parametrize("assign", [False, True])
def test_rows_are_loaded_into_units(kernels, rows, keep, assign: bool) -> None:
    layer, other = kept_as(copy.deepcopy(rows), keep), keep(copy.deepcopy(rows))
    for name in ("weight_packed", "weight_scale"):  # other numbers
        tensor = other.get_parameter(name) if name in other._parameters else other.get_buffer(name)
        tensor.data = tensor.data.flip(0)
    tensors = {k: t.to(layer.weight_packed.device) for k, t in other.state_dict().items()}
    before = {k: t.clone() for k, t in tensors.items()}
    layer.load_state_dict(tensors, assign=assign)
    assert in_units(layer) and same_state(layer, other)
    assert all(torch.equal(tensors[k], before[k]) for k in before), "what was given is untouched"
    x = torch.randn(3, 256).bfloat16().to(layer.weight_packed.device)
    found, expected = layer(x).float().cpu(), other(x.cpu()).float()
    assert float((found - expected).norm() / expected.norm()) < 4e-3


def test_scales_that_kernels_cannot_read_take_a_loaded_layer_out_of_units(kernels) -> None:
    fmt, w = FORMATS["mxfp4"], torch.randn(64, 256)
    grid = Grid(fmt, fmt.global_scale(w.abs().amax()), "absmax")
    layer = kept_as(
        QuantLinear.from_quantized(
            round_to(w, grid.scales(w)),
            Rotation(1),
            None,
            quantize_inputs=False,
            input_global_scale=None,
        ),
        lambda layer: layer,
    )
    tensors = layer.state_dict()
    tensors["weight_scale"][3, 1] = 200
    layer.load_state_dict(tensors)
    assert layer.kernel_dtype is None and layer.weight_packed.shape == (64, 128)
    assert torch.equal(layer.weight_scale, tensors["weight_scale"])


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to("cpu").to("cuda" if torch.cuda.is_available() else "cpu"),
        lambda m: m.float(),
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
    ],
    ids=["moved", "float", "half", "bfloat16", "deepcopy", "pickle"],
)
def test_units_go_wherever_a_layer_goes(kernels, rows, keep, move, request) -> None:
    layer = kept_as(copy.deepcopy(rows), keep)
    if "stored-pickle" in request.node.name:
        pytest.skip("torch does not pickle float8, the dtype of its scales")
    x = torch.randn(3, 256).bfloat16().to(layer.weight_packed.device)
    expected, moved = layer(x), move(layer)
    assert in_units(moved)
    state, before = moved.state_dict(), keep(rows).state_dict()
    for name in ("weight_packed", "weight_scale"):
        assert torch.equal(state[name].cpu(), before[name]), name
    y = moved(x.to(moved.kernel_dtype))
    assert float((y.float() - expected.float()).norm() / expected.float().norm()) < 4e-3


def test_a_layer_leaves_its_units_where_kernels_do_not_run(
    kernels, rows, keep, monkeypatch
) -> None:
    plain, layer = keep(copy.deepcopy(rows)), kept_as(copy.deepcopy(rows), keep)
    pickled = pickle.dumps(kept_as(copy.deepcopy(rows), lambda layer: layer))
    monkeypatch.setattr(gpu, "available", lambda device: False)
    for other in (layer, pickle.loads(pickled)):
        other.cpu()
        assert other.weight_packed.shape == (64, 128) and other.kernel_dtype is None
        if other is not layer:
            plain = rows
        assert same_state(other, plain)
        x = torch.randn(3, 256).bfloat16()
        assert torch.equal(other(x), plain(x))


def test_the_tensors_that_a_layer_was_made_of_stay_rows(kernels, rows) -> None:
    tensors = {k: t.clone() for k, t in rows.state_dict().items()}
    before = {k: t.clone() for k, t in tensors.items()}
    layer = stored_layer(nn.Linear(256, 64), rows.info, tensors, "x")
    layer.prepare(torch.bfloat16)
    assert all(torch.equal(tensors[k], before[k]) for k in before)


def test_a_cached_weight_is_dropped_with_the_rows_it_was_made_of(kernels, rows) -> None:
    rows.cache = True
    x = torch.randn(3, 256)
    expected = rows(x)  # float32: the reference path
    kept_as(rows, lambda layer: layer)
    assert rows._dequantized is None and torch.equal(
        rows(x.to(rows.weight_packed.device)).cpu(), expected
    )
