"""The registered operators: schemas, fakes, torch.compile. On the CPU they run the kernels in the
interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton")

from ptq.kernels import experts, ops, register
from ptq.kernels.quantize import swizzle_scales
from ptq.numerics.formats import FORMATS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not ops.launch.INTERPRETED:
    pytest.skip("kernels were imported without TRITON_INTERPRET=1", allow_module_level=True)
TESTS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture
def layer(random_weight):
    """(packed codes, scale bytes, global scale) of a 40 × 128 NVFP4 weight."""
    weight, packed = random_weight(FORMATS["nvfp4"], 40, 128)
    return packed.to(DEVICE), weight.scales.bits.to(DEVICE), weight.scales.global_scale.to(DEVICE)


def test_every_operator_passes_opcheck(layer) -> None:
    packed, bits, t = layer
    x = torch.randn(3, 128).bfloat16().to(DEVICE)
    bias = torch.randn(40).bfloat16().to(DEVICE)
    gain = torch.ones(128).bfloat16().to(DEVICE)
    tokens = torch.full((3, 1), 0.1, device=DEVICE)
    offsets = torch.tensor([0, 2, 3], dtype=torch.int32, device=DEVICE)
    both = (offsets, packed.repeat(2, 1, 1), bits.repeat(2, 1, 1), t.repeat(2))  # two experts
    rows = torch.tensor([2, 0, 1], dtype=torch.int32, device=DEVICE)
    assert experts.__all__ == ["grouped_w4a4", "grouped_w4a16"]  # importing it registers them
    x4 = ops.rotate_quantize(x, 16, "e2m1", "e4m3", t)
    calls = [
        (
            torch.ops.ptq.rotate_quantize,
            (x, 16, None, "e2m1", "e4m3", t, "theta", "none", None, 0.0, False),
        ),
        (
            torch.ops.ptq.rotate_quantize,
            (x, 16, None, "e2m1", "e4m3", tokens, "theta", "none", None, 0.0, False),
        ),
        (
            torch.ops.ptq.rotate_quantize,
            (x, 32, None, "e2m1", "e4m3", None, "theta", "rms_norm", gain, 1e-5, False),
        ),
        (torch.ops.ptq.rotate, (x, 32, None, "none", None, 0.0)),
        (torch.ops.ptq.rotate, (x, 32, None, "silu_mul", None, 0.0)),
        (torch.ops.ptq.rotate_fp8, (x, 32, None, "none", None, 0.0)),
        (torch.ops.ptq.dequantize, (packed, bits, t, "e2m1", "e4m3", torch.bfloat16)),
        (torch.ops.ptq.w4a16_matmul, (x, packed, bits, t, bias, "e2m1", "e4m3")),
        (torch.ops.ptq.w4a16_matmul, (x, packed, bits, t, None, "e2m1", "e4m3")),
        (torch.ops.ptq.w4a4_matmul, (*x4, packed, bits, t, None, "e4m3", torch.bfloat16)),
        (torch.ops.ptq.grouped_w4a16, (x, *both, None, None, "e2m1", "e4m3")),
        (torch.ops.ptq.grouped_w4a4, (*x4, *both, None, rows, "e4m3", torch.bfloat16)),
    ]
    for operator, arguments in calls:
        if DEVICE == "cuda" and "w4a4" in str(operator) and not ops.dispatch.multiplies_fp4(DEVICE):
            continue
        torch.library.opcheck(operator.default, arguments, test_utils=TESTS)


def test_fakes_have_the_shapes_and_dtypes_of_the_results(layer) -> None:
    _, bits, t = layer
    x = torch.randn(130, 128).bfloat16().to(DEVICE)
    for given in (t, None):
        for swizzle in (False, True):
            arguments = (x, 16, None, "e2m1", "e4m3", given, "theta", "none", None, 0.0, swizzle)
            real = torch.ops.ptq.rotate_quantize(*arguments)
            fake = torch.ops.ptq.rotate_quantize(
                *(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments)
            )
            assert [(r.shape, r.dtype, r.stride()) for r in real] == [
                (f.shape, f.dtype, f.stride()) for f in fake
            ]
    assert swizzle_scales(bits).shape == (1, 2, 32, 4, 4)


def test_a_layer_compiles_into_one_graph_for_every_number_of_tokens(layer) -> None:
    packed, bits, t = layer

    def forward(x: torch.Tensor) -> torch.Tensor:
        return ops.w4a16_matmul(ops.rotate(x, 32), packed, bits, t, "e2m1", "e4m3").relu() + 1

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


def test_quantized_inputs_pass_through_a_compiled_graph(layer) -> None:
    """Through AOT autograd too: fakes, no aliasing of inputs, a NamedTuple across the operator."""
    t = layer[2]

    def forward(x: torch.Tensor) -> torch.Tensor:
        inputs = ops.rotate_quantize(x, 16, "e2m1", "e4m3", t)
        return inputs.packed.sum(dtype=torch.int32) + inputs.scale_bits.sum(dtype=torch.int32)

    torch._dynamo.reset()
    x = torch.randn(4, 128).bfloat16().to(DEVICE)
    assert torch.equal(torch.compile(forward, fullgraph=True, backend="aot_eager")(x), forward(x))


def test_kernels_launch_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, whatever its arguments are on."""
    entered: list[torch.device] = []

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        entered.append(chosen)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    run = register.on_device(lambda x, size: (len(entered), size))
    assert run(torch.empty(2, device="meta"), 4) == (1, 4)
    assert entered == [torch.device("meta")]
