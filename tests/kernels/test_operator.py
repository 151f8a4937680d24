"""The registered operators: schemas, fakes, torch.compile. On the CPU they run the kernels in the
interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ptq.kernels import gpu, op_grouped, operator
from ptq.kernels.op_inputs import rotate, rotate_quantize
from ptq.kernels.op_matmul import w4a16_matmul
from ptq.kernels.operands import Encoding, PackedWeight, Prologue, QuantizedInputs
from ptq.numerics.formats import FORMATS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not operator.INTERPRETED:
    pytest.skip("kernels were imported without TRITON_INTERPRET=1", allow_module_level=True)
TESTS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
OPERATORS = {
    "rotate", "rotate_quantize", "rotate_fp8", "dequantize", "w4a16_matmul", "w4a4_matmul",
    "grouped_w4a16", "grouped_w4a4",
}  # fmt: skip
NVFP4 = Encoding("e2m1", "e4m3")


@pytest.fixture
def weight(random_weight) -> PackedWeight:
    """A 40 × 128 NVFP4 weight."""
    return random_weight(FORMATS["nvfp4"], 40, 128, device=DEVICE)[1]


def test_every_operator_passes_opcheck(weight, stacked) -> None:
    x = torch.randn(3, 128).bfloat16().to(DEVICE)
    bias = torch.randn(40).bfloat16().to(DEVICE)
    tokens = torch.full((3, 1), 0.1, device=DEVICE)
    offsets = torch.tensor([0, 2, 3], dtype=torch.int32, device=DEVICE)
    rows = torch.tensor([2, 0, 1], dtype=torch.int32, device=DEVICE)
    t, two = weight.global_scale, stacked([weight, weight]).flat
    plain, acted = Prologue().flat, Prologue("silu_mul").flat
    normed = Prologue("rms_norm", torch.ones(128).bfloat16().to(DEVICE), 1e-5).flat
    x4 = rotate_quantize(x, 16, NVFP4, t).flat
    calls = [
        ("rotate_quantize", (x, 16, *NVFP4.flat, t, *plain, False)),
        ("rotate_quantize", (x, 16, *NVFP4.flat, tokens, *plain, False)),
        ("rotate_quantize", (x, 32, *NVFP4.flat, None, *normed, False)),
        ("rotate", (x, 32, *plain)),
        ("rotate", (x, 32, *acted)),
        ("rotate_fp8", (x, 32, *plain)),
        ("dequantize", (*weight.flat, torch.bfloat16)),
        ("w4a16_matmul", (x, *weight.flat, bias)),
        ("w4a16_matmul", (x, *weight.flat, None)),
        ("w4a4_matmul", (*x4, *weight.flat, None, torch.bfloat16)),
        ("grouped_w4a16", (x, offsets, *two, None, None)),
        ("grouped_w4a4", (*x4, offsets, *two, None, rows, torch.bfloat16)),
    ]
    assert op_grouped.__name__ and {name for name, _ in calls} == OPERATORS
    for name, arguments in calls:
        if DEVICE == "cuda" and "w4a4" in name and not gpu.multiplies_fp4(DEVICE):
            continue
        overload = getattr(torch.ops.ptq, name).default
        torch.library.opcheck(overload, arguments, test_utils=TESTS)


def test_fakes_have_the_shapes_and_dtypes_of_the_results(weight) -> None:
    x = torch.randn(130, 128).bfloat16().to(DEVICE)
    for t in (weight.global_scale, None):
        for swizzle in (False, True):
            arguments = (x, 16, *NVFP4.flat, t, *Prologue().flat, swizzle)
            real = torch.ops.ptq.rotate_quantize(*arguments)
            fake = torch.ops.ptq.rotate_quantize(
                *(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments)
            )
            assert [(r.shape, r.dtype, r.stride()) for r in real] == [
                (f.shape, f.dtype, f.stride()) for f in fake
            ]


def test_a_layer_compiles_into_one_graph_for_every_number_of_tokens(weight) -> None:
    """Records are made inside of the graph, as layers do, and outside."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        packed, bits, t, element, scale = weight.flat
        inside = PackedWeight(
            packed=packed, scale_bits=bits, global_scale=t, element=element, scale=scale
        )
        return w4a16_matmul(rotate(x, 32), weight) + w4a16_matmul(x, inside).relu() + 1

    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (2, 3, 20):
        x = torch.randn(tokens, 128).bfloat16().to(DEVICE)
        assert torch.equal(compiled(x), forward(x))
    assert len(graphs) == 1


def test_quantized_inputs_pass_through_a_compiled_graph(weight) -> None:
    """Through AOT autograd too: fakes, no aliasing of inputs, a record that an operator returns."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        inputs = rotate_quantize(x, 16, NVFP4, weight.global_scale)
        return inputs.packed.sum(dtype=torch.int32) + inputs.scale_bits.sum(dtype=torch.int32)

    torch._dynamo.reset()
    x = torch.randn(4, 128).bfloat16().to(DEVICE)
    assert torch.equal(torch.compile(forward, fullgraph=True, backend="aot_eager")(x), forward(x))


def test_kernels_launch_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, whatever its arguments are on."""
    entered: list[torch.device] = []

    @contextmanager
    def device(target: torch.device) -> Iterator[None]:
        entered.append(target)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    run = operator.on_device(lambda x, size: (len(entered), size))
    assert run(torch.empty(2, device="meta"), 4) == (1, 4)
    assert entered == [torch.device("meta")]


def test_flat_arguments_become_the_records_of_a_signature() -> None:
    def run(x: Tensor, inputs: QuantizedInputs, encoding: Encoding, bias: Tensor | None) -> tuple:
        return x, inputs, encoding, bias

    def same(x: Tensor, inputs, encoding, bias) -> tuple:
        return x, inputs, encoding, bias

    x, inputs = torch.ones(1), QuantizedInputs(torch.ones(2), torch.ones(3), None)
    flat = (x, *inputs.flat, *NVFP4.flat, None)
    for function in (run, same):
        assert operator.takes_flat(function, like=run)(*flat) == (x, inputs, NVFP4, None)
        with pytest.raises(AssertionError, match="takes 8 values, not 9"):
            operator.takes_flat(function, like=run)(*flat, None)


def test_a_device_without_a_table_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "INTERPRETED", False)
    monkeypatch.setattr(gpu, "architecture", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    with pytest.raises(ValueError, match=r"no kernels for an old GPU; .* 8\.0 or more"):
        operator.tile_for("w4a16", torch.device("cuda"), "e2m1", "e4m3", 1, 64, 64)
