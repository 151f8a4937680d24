"""What only a device can show: the assembly and orders of columns on hardware, graphs, streams,
poisoned outputs."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from ptq.kernels import gpu, op_inputs, workspace
from ptq.kernels.gpu import architecture, multiplies_fp4
from ptq.kernels.op_dequantize import dequantize
from ptq.kernels.op_grouped import grouped_w4a4, grouped_w4a16
from ptq.kernels.op_inputs import rotate, rotate_quantize
from ptq.kernels.op_matmul import launch_w4a16, w4a4_matmul, w4a16_matmul, wants_blocked_scales
from ptq.kernels.operands import Encoding, PackedWeight, QuantizedInputs
from ptq.kernels.quantize import swizzle_scales
from ptq.kernels.tiles import Tile
from ptq.kernels.weight_tiles import tiled
from ptq.numerics.formats import FORMATS, Format

pytestmark = pytest.mark.gpu


def numbers(inputs: QuantizedInputs, encoding: Encoding) -> torch.Tensor:
    """What quantized inputs stand for, fp32; scale bytes in rows."""
    weight = PackedWeight(
        packed=inputs.packed,
        scale_bits=inputs.scale_bits,
        global_scale=torch.ones((), device="cuda"),
        element=encoding.element,
        scale=encoding.scale,
    )
    values = dequantize(weight, torch.float32)
    return values if inputs.global_scale is None else values * inputs.global_scale


def in_range(weight, fmt: Format) -> None:
    """Keep random scale bytes where sums of thousands of products stay finite in bf16."""
    weight.scales.bits.clamp_(
        0x08 if fmt.has_global_scale else 120, 0x50 if fmt.has_global_scale else 130
    )


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("lies", ["rows", "units"])
@pytest.mark.parametrize("order", ["words", "fragments", "natural"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_unit_vector_reads_one_column_exactly(
    fmt: Format, order, lies, block_m, dtype, random_weight
) -> None:
    """x = e_j makes y the j-th column of the weight, exact in 16 bits: a wrong order of rows or
    columns shows."""
    arch = architecture(torch.device("cuda"))
    if (order == "natural" and (arch not in (100, 120) or fmt.element.name == "int4")) or (
        order == "fragments" and arch != 90
    ):
        pytest.skip(f"order {order} is not for sm_{arch} {fmt.element.name}")
    if dtype == torch.float16 and not fmt.has_global_scale:
        pytest.skip("float16 cannot hold E8M0 scales")
    weight, packed = random_weight(fmt, 128, 256, t=1.0, device="cuda")
    if lies == "units":
        packed = tiled(packed)
    tile = Tile(kernel="w4a16", block_m=block_m, block_n=128, order=order, stages=3)
    dense = weight.dequantize().cuda()
    for start in range(0, 256, 16):
        x = torch.zeros(16, 256, dtype=dtype, device="cuda")
        x[torch.arange(16), start + torch.arange(16)] = 1
        y = torch.full((16, 128), torch.nan, dtype=dtype, device="cuda")
        launch_w4a16(x, packed, None, y, tile)
        assert torch.equal(y, dense[:, start : start + 16].T.to(dtype)), f"columns {start} …"


@pytest.mark.parametrize("m", [1, 7, 16, 33, 64, 130, 600])
@pytest.mark.parametrize(
    ("n", "k", "lies"), [(4096, 4096, "rows"), (1000, 4128, "rows"), (4032, 4224, "units")]
)
def test_w4a16_is_as_good_as_the_library_on_the_dense_weight(
    fmt: Format, m, n, k, lies, random_weight, packed_weight
) -> None:
    weight, _ = random_weight(fmt, n, k)
    in_range(weight, fmt)
    packed = packed_weight(weight, "cuda")
    packed = tiled(packed) if lies == "units" else packed
    x = torch.randn(m, k, device="cuda").bfloat16()
    dense = weight.dequantize().cuda()
    reference = x.double() @ dense.double().T
    y = w4a16_matmul(x, packed)
    error = ((y.double() - reference).norm() / reference.norm()).item()
    library = torch.nn.functional.linear(x, dense.bfloat16())
    theirs = ((library.double() - reference).norm() / reference.norm()).item()
    assert error < 4e-3 and error < 2 * theirs
    assert torch.equal(y, w4a16_matmul(x, packed)), "two runs differ"


def test_a_graph_replays_and_two_streams_do_not_meet(random_weight, packed_weight) -> None:
    fmt = FORMATS["nvfp4"]
    weight, _ = random_weight(fmt, 512, 4096)
    in_range(weight, fmt)
    packed = packed_weight(weight, "cuda")
    x = torch.randn(3, 4096, device="cuda").bfloat16()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return w4a16_matmul(rotate(x, 32), packed)

    expected = layer(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        out = layer(x)
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, expected)
    streams = [torch.cuda.Stream() for _ in range(2)]
    results: list[list[torch.Tensor]] = [[], []]
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, outputs in zip(streams, results, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(layer(x))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for outputs in results for y in outputs)


def test_graphs_of_one_layer_recorded_first_replay_beside_each_other(
    random_weight, packed_weight
) -> None:
    """Both are recorded on one stream, before anything ran outside of a graph but what compiles,
    and replay on two: they must not sum in the same memory."""
    fmt = FORMATS["nvfp4"]
    weight, _ = random_weight(fmt, 512, 8192)
    in_range(weight, fmt)
    packed = packed_weight(weight, "cuda")
    inputs = [torch.randn(3, 8192, device="cuda").bfloat16() for _ in range(2)]

    def layer(x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            y = w4a16_matmul(rotate(x, 32), packed)
        return y

    layer(inputs[0])  # compiles, which no recording can
    torch.cuda.synchronize()
    workspace._workspaces.clear()
    op_inputs._hadamard.cache_clear()
    graphs, outs = [torch.cuda.CUDAGraph() for _ in range(2)], []
    for graph, x in zip(graphs, inputs, strict=True):
        with torch.cuda.graph(graph):
            outs.append(layer(x))
    assert not workspace._workspaces and not op_inputs._hadamard.cache_info().currsize
    streams = [torch.cuda.Stream() for _ in range(2)]
    expected = [layer(x) for x in inputs]
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, graph, out in zip(streams, graphs, outs, strict=True):
            with torch.cuda.stream(stream):
                out.fill_(torch.nan)
                graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, outs, expected))


def test_every_recording_has_a_number() -> None:
    numbers = []
    for _ in range(2):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            assert gpu.capturing("cuda")
            numbers.append(gpu.capture_id("cuda"))
            assert gpu.capture_id("cuda") == numbers[-1]
            torch.zeros(1, device="cuda")
    assert numbers[0] != numbers[1] and not gpu.capturing("cuda")


@pytest.mark.parametrize("m", [1, 40, 200, 1000])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_w4a4_on_fp4_tensor_cores(name, m, random_weight, packed_weight) -> None:
    if not multiplies_fp4("cuda"):
        pytest.skip("this GPU has no FP4 tensor cores")
    fmt = FORMATS[name]
    weight, _ = random_weight(fmt, 1024, 2048)
    in_range(weight, fmt)
    packed, encoding = packed_weight(weight, "cuda"), Encoding("e2m1", fmt.scale_name)
    x = torch.randn(m, 2048, device="cuda").bfloat16()
    blocked = wants_blocked_scales(packed, m)
    if blocked:
        packed = replace(packed, scale_bits=swizzle_scales(packed.scale_bits))
    for t in (torch.tensor(1e-3, device="cuda"), None):
        values = numbers(rotate_quantize(x, 32, encoding, t), encoding)
        reference = values.double() @ weight.dequantize().cuda().double().T
        y = w4a4_matmul(rotate_quantize(x, 32, encoding, t, swizzle=blocked), packed)
        assert ((y.double() - reference).norm() / reference.norm()).item() < 4e-3


@pytest.fixture
def experts_and_counts(random_weight, packed_weight, stacked):
    """``make(fmt)``: dense weights, the packed ones on the device, tokens of each expert."""

    def make(fmt: Format):
        counts = [0, 5, 130, 1, 0, 64]
        weights = [random_weight(fmt, 256, 1024)[0] for _ in counts]
        for weight in weights:
            in_range(weight, fmt)
        dense = [weight.dequantize().cuda().double() for weight in weights]
        return dense, stacked([packed_weight(weight, "cuda") for weight in weights]), counts

    return make


def offsets_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32, device="cuda")


def expert_error(
    y: torch.Tensor, inputs: torch.Tensor, dense: list[torch.Tensor], counts: list[int]
) -> float:
    """The largest of all experts; nothing may be written for rows beyond theirs but zeros."""
    assert not y[sum(counts) :].any()
    parts = zip(
        y.split([*counts, len(y) - sum(counts)]),
        inputs.double().split([*counts]),
        dense,
        strict=False,
    )
    return max(((p - x @ w.T).norm() / (x @ w.T).norm()).item() for p, x, w in parts if len(x))


def test_experts_on_a_device(fmt: Format, experts_and_counts) -> None:
    dense, weight, counts = experts_and_counts(fmt)
    x = torch.randn(40, 1024, device="cuda").bfloat16()
    rows = torch.randint(0, 40, (sum(counts) + 20,), dtype=torch.int32, device="cuda")
    y = grouped_w4a16(x, offsets_of(counts), weight, rows=rows)
    assert expert_error(y, x[rows[: sum(counts)]], dense, counts) < 4e-3


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_experts_on_fp4_tensor_cores(name: str, experts_and_counts) -> None:
    if not multiplies_fp4("cuda"):
        pytest.skip("this GPU has no FP4 tensor cores")
    fmt = FORMATS[name]
    encoding, (dense, weight, counts) = Encoding("e2m1", fmt.scale_name), experts_and_counts(fmt)
    x = torch.randn(40, 1024, device="cuda").bfloat16()
    rows = torch.randint(0, 40, (sum(counts) + 20,), dtype=torch.int32, device="cuda")
    for t in (None, torch.rand(40, 1, device="cuda") / 1000 + 1e-3):
        inputs = rotate_quantize(x, 32, encoding, t)
        y = grouped_w4a4(inputs, offsets_of(counts), weight, rows=rows)
        values = numbers(inputs, encoding)[rows[: sum(counts)]]
        assert expert_error(y, values, dense, counts) < 4e-3
