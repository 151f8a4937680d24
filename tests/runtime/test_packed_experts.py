"""Experts in grouped kernels compute what the loop over experts computes, from the same memory.

Without a GPU the kernels run in Triton's interpreter, on the CPU.
"""

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import ptq.hf
from ptq.kernels import gpu, op_grouped
from ptq.kernels.operator import INTERPRETED
from ptq.model.experts import ExpertNames, Experts, routed_everywhere, unfuse
from ptq.numerics.formats import FORMATS
from ptq.numerics.rotation import Rotation
from ptq.numerics.scales import Grid, round_to
from ptq.runtime.load import load, prepare_kernels
from ptq.runtime.packed_experts import PackedExperts, obstacle, pack_experts, projections
from ptq.runtime.quant_linear import QuantLinear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not INTERPRETED:
    pytest.skip("kernels were imported without TRITON_INTERPRET=1", allow_module_level=True)
COUNT, SLOTS, HIDDEN, INTERMEDIATE, TOKENS = 5, 3, 64, 96, 9
# Against the same layers, summed in float64: one rounding to bfloat16, 2^-9 at most, and here and
# there a last bit of the layers in between, whose sums have another order. The loop also rounds its
# products with routing weights and its partial sums.
EXACT, LOOP = 2.0**-9, 2.0**-8
SCHEMES = [
    ("mixtral", "nvfp4", "w4a16", 16),
    ("mixtral", "mxfp4", "w4a16", 32),
    ("mixtral", "nvint4", "w4a16", 1),
    ("gpt_oss", "mxfp4", "w4a16", 1),
    ("mixtral", "nvfp4", "static", 16),
    ("mixtral", "nvfp4", "dynamic", 1),
    ("gpt_oss", "nvfp4", "static", 1),
    ("gpt_oss", "mxfp4", "dynamic", 32),
]
CONFIG = SimpleNamespace(
    num_local_experts=COUNT, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, hidden_act="silu",
    swiglu_alpha=1.702, swiglu_limit=7.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: one that multiplies FP4, whose kernels the interpreter runs."""
    if DEVICE == "cpu":
        monkeypatch.setattr(gpu, "available", lambda device: torch.device(device).type == "cpu")
        monkeypatch.setattr(gpu, "architecture", lambda device: 120)
        monkeypatch.setattr(gpu, "multiplies_fp4", lambda device: True)


def quantized(linear: nn.Linear, name: str, inputs: str, rotation: int, expert: int) -> QuantLinear:
    """Rounded to nearest. Every expert has global scales of its own, which gate and up share as in
    checkpoints."""
    fmt = FORMATS[name]
    weight = Rotation(rotation).exact(linear.weight.detach().float())
    grid = Grid(fmt, fmt.global_scale(torch.tensor(0.5 + expert)), "absmax")
    return QuantLinear.from_quantized(
        round_to(weight, grid.scales(weight)),
        Rotation(rotation),
        linear.bias,
        quantize_inputs=inputs != "w4a16",
        input_global_scale=fmt.global_scale(torch.tensor(8.0 + expert), 2.0)
        if inputs == "static"
        else None,
    )


def make(
    kind: str = "mixtral", name: str = "nvfp4", inputs: str = "w4a16", rotation: int = 16
) -> nn.ModuleDict:
    """{"experts": Experts} with random quantized layers, in the reference path."""
    fused = {"mixtral": MixtralExperts, "gpt_oss": GptOssExperts}[kind](CONFIG).to(torch.bfloat16)
    for parameter in fused.parameters():
        nn.init.normal_(parameter, std=0.2)
    model = nn.ModuleDict({"experts": fused})
    unfuse(model, lambda _: ExpertNames())
    for path, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear):
            model.set_submodule(
                path, quantized(linear, name, inputs, rotation, int(path.split(".")[1]))
            )
    return model.to(DEVICE)


def packed(*arguments: str | int) -> PackedExperts:
    model = make(*arguments)
    prepare_kernels(model, torch.bfloat16)
    experts = model["experts"]
    assert isinstance(experts, PackedExperts) and experts.kernel_dtype == torch.bfloat16
    return experts


def routed(tokens: int = TOKENS, *, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, experts for each token (of which expert 2 is none, and some are nowhere), and their
    weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    index = torch.stack(
        [torch.randperm(COUNT - 1, generator=generator)[:SLOTS] for _ in range(tokens)]
    )
    index[index == 2] = COUNT - 1
    index[::4, 1] = COUNT
    weights = torch.rand(tokens, SLOTS, generator=generator).bfloat16()
    return x.to(DEVICE), index.to(DEVICE), weights.to(DEVICE)


def distance(y: Tensor, reference: Tensor) -> float:
    return ((y.double() - reference.double()).norm() / reference.double().norm()).item()


def one_by_one(experts: Experts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Every assignment alone; their weighted sums in float64."""
    result = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token, slot in index.lt(COUNT).nonzero().tolist():
        y = experts.get_submodule(str(int(index[token, slot])))(
            x[token : token + 1], experts.gating
        )
        result[token] += y[0].double() * weights[token, slot].double()
    return result


@pytest.mark.parametrize(("kind", "name", "inputs", "rotation"), SCHEMES)
def test_grouped_experts_are_the_loop(kind: str, name: str, inputs: str, rotation: int) -> None:
    """For both layouts of gate and up, with biases (gpt-oss) and without, and for every kind of
    inputs."""
    if inputs != "w4a16" and not gpu.multiplies_fp4(DEVICE):
        pytest.skip("this GPU has no FP4 tensor cores")
    model, case = make(kind, name, inputs, rotation), routed()
    # in the reference path of layers
    loop, exact = model["experts"](*case), one_by_one(model["experts"], *case)
    prepare_kernels(model, torch.bfloat16)
    assert isinstance(model["experts"], PackedExperts)
    y = model["experts"](*case)
    assert y.dtype == loop.dtype == torch.bfloat16
    assert distance(y, loop) < LOOP
    assert distance(y, exact) < EXACT
    assert distance(y, exact) < distance(loop, exact)
    if DEVICE == "cuda":
        assert torch.equal(model["experts"](*case), y), "two runs differ"


def test_what_goes_nowhere_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even as NaN: in memory that nobody wrote, or in a routing weight that nobody asked
    for."""
    experts, (x, index, weights) = packed(), routed()
    expected, fake = experts(x, index, weights), op_grouped._w4a16_fake
    weights[index == COUNT] = torch.nan
    monkeypatch.setattr(op_grouped, "_w4a16_fake", lambda *a: fake(*a).fill_(torch.nan))
    assert torch.equal(experts(x, index, weights), expected)
    assert not experts(x, torch.full_like(index, COUNT + 3), weights).any()
    assert experts(x[:0], index[:0], weights[:0]).shape == (0, HIDDEN)


def test_one_graph_serves_every_routing() -> None:
    """Nothing is asked of the device and no shape depends on the routing, or there would be a graph
    break."""
    experts, graphs = packed(), []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (2, 3, 8):
        case = routed(tokens, seed=tokens)
        assert torch.equal(compiled(*case), experts(*case))
    assert len(graphs) == 1


@pytest.mark.gpu
def test_a_cuda_graph_replays_another_routing() -> None:
    experts, case = packed(), routed()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        experts(*case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        out = experts(*case)
    for seed in (2, 3):
        for held, new in zip(case, routed(seed=seed), strict=True):
            held.copy_(new)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, experts(*case))


# ---------------------------------------------------------------- memory


def memory(module: nn.Module) -> int:
    """Bytes of all storages, each counted once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def is_packed(experts: PackedExperts) -> bool:
    """Whether the grouped path is in use, and reads the tensors that the layers hold."""
    if experts._stacks is None:
        return False
    gate_up, down = experts._stacks
    for stack, layers in (
        (gate_up, projections(experts)[0] + projections(experts)[1]),
        (down, projections(experts)[2]),
    ):
        for whole, leaf in (
            (stack.weight.packed, "weight_packed"),
            (stack.weight.scale_bits, "weight_scale"),
            (stack.bias, "bias"),
        ):
            places = {
                None if (t := getattr(layer, leaf)) is None else t.untyped_storage().data_ptr()
                for layer in layers
            }
            if places != {None if whole is None else whole.untyped_storage().data_ptr()}:
                return False
    return True


def test_the_layers_are_views_of_the_stacks() -> None:
    model = make("gpt_oss", "nvfp4", "static")
    for layer in (layer for layers in projections(model["experts"]) for layer in layers):
        layer.bias = layer.bias.clone()  # as loaded; here they are views of what was fused
    before, bytes_before = {k: v.clone() for k, v in model.state_dict().items()}, memory(model)
    prepare_kernels(model, torch.bfloat16)
    assert is_packed(model["experts"]) and memory(model) == bytes_before
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert all(v.is_contiguous() for v in after.values())


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_packed_and_independent(
    duplicate: Callable[[PackedExperts], PackedExperts],
) -> None:
    experts, case = packed("gpt_oss"), routed()  # transformers' gate of Mixtral cannot be pickled
    expected, size = experts(*case), memory(experts)
    twin = duplicate(experts)
    assert is_packed(twin) and is_packed(experts) and memory(twin) == size == memory(experts)
    assert len(pickle.dumps(experts)) < size + 500 * len(list(experts.buffers()))
    for layer in projections(experts)[2]:
        layer.weight_packed.zero_()
    assert torch.equal(twin(*case), expected) and not torch.equal(experts(*case), expected)


@pytest.mark.parametrize("assign", [False, True])
def test_other_weights_may_be_loaded(assign: bool) -> None:
    experts, other, case = packed(), packed(), routed()
    for layer in (layer for layers in projections(other) for layer in layers):
        layer.weight_global_scale = layer.scales.global_scale * 2
    other.pack()
    experts.load_state_dict(other.state_dict(), assign=assign)
    assert is_packed(experts)
    assert torch.equal(experts(*case), other(*case))


def test_what_the_kernels_do_not_take_runs_through_the_loop() -> None:
    model, (x, index, weights) = make("gpt_oss"), routed()
    wide = model["experts"](x.float(), index, weights.float())
    narrow = model["experts"](x, index, weights)
    prepare_kernels(model, torch.bfloat16)
    experts = model["experts"]
    assert torch.equal(experts(x.float(), index, weights.float()), wide)
    grouped = experts(x, index, weights)
    with routed_everywhere(model):
        seen = []
        handle = experts.get_submodule("2.down_proj").register_forward_hook(
            lambda *_: seen.append(1)
        )
        assert distance(experts(x, index, weights), narrow) < LOOP and seen == [1]
        handle.remove()
    experts.float()  # biases alone; the kernels stay prepared for bfloat16
    assert is_packed(experts) and distance(experts(x, index, weights), grouped) < EXACT


def test_a_device_without_kernels_ends_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    experts, case = packed(), tuple(t.cpu() for t in routed())
    expected = experts(*routed()).cpu()
    monkeypatch.setattr(gpu, "available", lambda device: False)
    with caplog.at_level(logging.INFO, "ptq.runtime.packed_experts"):
        experts.cpu()
    assert (
        experts.kernel_dtype is None and "5 experts run one after the other" in caplog.messages[-1]
    )
    assert distance(experts(*case), expected) < LOOP


# ---------------------------------------------------------------- where it is installed


def change(experts: Experts, leaf: str, what: str) -> None:
    layer = experts.get_submodule(f"3.{leaf}")
    assert isinstance(layer, QuantLinear)
    match what:
        case "dense":
            experts.set_submodule(f"3.{leaf}", nn.Linear(HIDDEN, INTERMEDIATE, bias=False))
        case "rotation":
            layer.rotation = Rotation(32)
        case "global":
            layer.weight_global_scale = layer.scales.global_scale * 2
        case "input":
            layer.input_global_scale = layer.input_scale * 2
        case "reference":
            layer.kernel_dtype = None


@pytest.mark.parametrize(
    ("leaf", "what", "reason"),
    [
        ("up_proj", "dense", "not quantized"),
        ("gate_proj", "rotation", "differ in format, rotation, inputs or bias"),
        ("down_proj", "rotation", "differ in format, rotation, inputs or bias"),
        ("up_proj", "global", "different global scales"),
        ("up_proj", "input", "different input scales"),
        ("down_proj", "reference", "do not run in Triton kernels"),
    ],
)
def test_experts_that_differ_stay_a_loop_and_say_why(leaf: str, what: str, reason: str) -> None:
    model = make("mixtral", "nvfp4", "static")
    for layer in (layer for layers in projections(model["experts"]) for layer in layers):
        layer.kernel_dtype = torch.bfloat16
    change(model["experts"], leaf, what)
    told = pack_experts(model)["experts"]
    assert told is not None and reason in told and told == obstacle(model["experts"])
    assert type(model["experts"]) is Experts


@pytest.fixture(scope="module")
def written(make_run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A checkpoint of Qwen3-MoE, not to be changed, and the model in memory, whose layers take the
    reference path."""
    out = tmp_path_factory.mktemp("written") / "out"
    return out, make_run("qwen3_moe", "nvfp4", rotation=16)(out, dialect="ptq").to(DEVICE)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids.to(DEVICE)).logits


def test_loaded_experts_run_grouped(
    written, token_ids: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    path, reference = written
    with caplog.at_level(logging.INFO, "ptq.runtime.load"):
        model = load(path, DEVICE)
    assert "2 of 2 layers of experts run grouped" in caplog.messages
    experts = [m for m in model.modules() if isinstance(m, Experts)]
    assert len(experts) == 2 and all(isinstance(m, PackedExperts) and is_packed(m) for m in experts)
    assert distance(logits(model, token_ids), logits(reference, token_ids)) < 2e-2
    assert model.state_dict().keys() == reference.state_dict().keys()
    whole = load(path, device_map={"": DEVICE})  # on one device there is nothing to be moved
    assert sum(isinstance(m, PackedExperts) and is_packed(m) for m in whole.modules()) == 2


def test_transformers_loads_grouped_experts_and_saves_them(
    written, token_ids: Tensor, tmp_path: Path
) -> None:
    ptq.hf.register()
    path, reference = written
    model = AutoModelForCausalLM.from_pretrained(path, device_map=DEVICE)
    assert sum(isinstance(m, PackedExperts) and is_packed(m) for m in model.modules()) == 2
    assert distance(logits(model, token_ids), logits(reference, token_ids)) < 2e-2
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(p / "model.safetensors") for p in (path, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k].view(torch.uint8), after[k].view(torch.uint8)) for k in before)


def test_gradients_take_the_loop() -> None:
    """Grouped kernels have none: a warning, and nothing for x, was what came of it."""
    experts = packed()
    x, index, weights = routed()
    expected = experts(x, index, weights)
    x = x.clone().requires_grad_()
    y = experts(x, index, weights)
    assert distance(y.detach(), expected) < LOOP
    y.sum().backward()
    assert x.grad is not None and bool(x.grad.abs().sum(1).gt(0).any())
