"""Fusing a loaded model: fewer launches, the same names and, to the last bit of 16, numbers.

Without a GPU the kernels run in Triton's interpreter, on the CPU.
"""

import copy
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from transformers import AutoModelForCausalLM

import ptq.hf  # noqa: F401 - the plugin of transformers
from ptq.runtime.decoding import cache_argument, static_cache
from ptq.runtime.fused_modules import FusedMLP, FusedNorm
from ptq.runtime.fusion import fuse, share_inputs
from ptq.runtime.load import load, prepare_kernels
from ptq.runtime.quant_linear import QuantLinear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Operators that launch nothing.
VIEWS = {
    "view", "_unsafe_view", "_reshape_alias", "transpose", "permute", "t", "slice", "select",
    "split", "split_with_sizes", "expand", "unsqueeze", "squeeze", "alias", "detach", "as_strided",
    "empty", "new_empty", "empty_like", "reshape",
}  # fmt: skip


@pytest.fixture
def checkpoint(make_run, tmp_path) -> Callable[..., Path]:
    """``checkpoint(kind, fmt, …)``: one decoder layer in bfloat16; the interpreter is slow."""

    def write(kind: str = "llama", fmt: str = "nvfp4", layers: int = 1, **recipe) -> Path:
        out = tmp_path / f"{kind}-{fmt}"
        make_run(kind, fmt, layers=layers, **recipe)(out, dialect="ptq")
        return out

    return write


class Launches(TorchDispatchMode):
    """Counts the operators that launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ not in VIEWS:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def launches_of_a_layer(model: nn.Module) -> Counter[str]:
    """Operators of a decoder layer in a step with a static cache, once norms know their readers."""
    layer, watch = model.get_submodule("model.layers.0"), Launches()
    cache = static_cache(model, 8)
    options = {cache_argument(model): cache, "use_cache": True}
    with torch.inference_mode():
        model(input_ids=torch.tensor([[4]], device=DEVICE), **options)
        forward = layer.forward

        def watched(*args, **kwargs):
            with watch:
                return forward(*args, **kwargs)

        layer.forward = watched
        model(input_ids=torch.tensor([[5]], device=DEVICE), **options)
    del layer.forward
    return watch.counts


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids[:1, :3].to(DEVICE)).logits.float()


def unfused(model: nn.Module) -> nn.Module:
    """The same layers, each alone, in the modules of transformers."""
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            layer = copy.deepcopy(module)
            assert layer.readers is None and layer.prepare(torch.bfloat16) is None
            plain.set_submodule(name, layer)
    missing = plain.load_state_dict(model.state_dict(), strict=True, assign=True)
    assert not missing.missing_keys
    for layer in plain.modules():
        if isinstance(layer, QuantLinear):
            layer.prepare(torch.bfloat16)
    return plain.to(DEVICE).eval()


@pytest.mark.parametrize(("fmt", "rotation"), [("mxfp4", 32), ("nvfp4", 1)])
def test_a_llama_layer_takes_at_most_30_launches(kernels, checkpoint, fmt, rotation) -> None:
    """In one step of decoding; 57 and 43 before (14 rotations and matmuls, 7 fills for E8M0), 43 in
    bfloat16."""
    model = load(checkpoint("llama", fmt, rotation=rotation), DEVICE)
    counts = launches_of_a_layer(model)
    # q k v, o, gate up, down; norms and SiLU · up in the launches that rotate
    assert counts["ptq.w4a16_matmul.default"] == 4
    assert counts["ptq.rotate.default"] == (4 if rotation > 1 else 3)
    assert not any("silu" in name or "rsqrt" in name or "ones" in name for name in counts)
    assert counts.total() <= 30, counts


@pytest.mark.gpu
def test_a_captured_llama_layer_takes_at_most_30_launches(checkpoint) -> None:
    """Kernels that a graph of a step replays, those of a model of one layer taken off those of
    two."""
    from ptq.runtime.decoding import record, run_aside

    totals = []
    for layers in (1, 2):
        model = load(checkpoint("llama", "mxfp4", layers=2, rotation=32), DEVICE)
        model.model.layers = model.model.layers[:layers]  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        model.config.num_hidden_layers = layers  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        options = {cache_argument(model): static_cache(model, 8), "use_cache": True}
        ids = torch.tensor([[5]], device=DEVICE)

        def step(ids: Tensor, model=model, options=options) -> Tensor:
            return model(input_ids=ids, **options).logits[0, -1]

        with torch.no_grad():
            for _ in range(3):
                run_aside(step, ids)
            replay = record(step, ids)
            replay()
            torch.cuda.synchronize()
            kinds = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=kinds) as profile:
                replay()
                torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        events = [e.name for e in profile.events() if e.device_type == on_device]
        totals.append(events)
    assert len(totals[1]) - len(totals[0]) <= 30, Counter(totals[1]) - Counter(totals[0])


@pytest.mark.parametrize(
    ("kind", "fmt", "rotation"),
    [("llama", "nvfp4", 1), ("qwen2", "mxfp4", 32), ("qwen3", "nvint4", 16)],  # qwen2: biases
)
def test_a_fused_model_computes_what_its_layers_compute_alone(
    kernels, checkpoint, token_ids, kind, fmt, rotation
) -> None:
    fused = load(checkpoint(kind, fmt, rotation=rotation), DEVICE)
    kinds = Counter(type(module) for module in fused.modules())
    norms = 2 + 1 + (2 if kind == "qwen3" else 0)
    assert kinds[FusedMLP] == 1 and kinds[FusedNorm] == norms
    plain = unfused(fused)
    assert plain.state_dict().keys() == fused.state_dict().keys()
    expected, again = logits(plain, token_ids), logits(fused, token_ids)
    assert float((again - expected).norm() / expected.norm()) < 0.01
    with torch.inference_mode():  # the second time, norms know their readers
        assert torch.equal(logits(fused, token_ids), again)
    hidden = torch.randn(2, 3, 64, dtype=torch.bfloat16, device=DEVICE)
    attention, other = (m.get_submodule("model.layers.0.self_attn") for m in (fused, plain))
    for leaf in ("q_proj", "k_proj", "v_proj"):
        one, two = attention.get_submodule(leaf)(hidden), other.get_submodule(leaf)(hidden)
        assert one.shape == two.shape
        assert float((one - two).float().norm() / two.float().norm()) < 4e-3


def test_with_gradients_in_float32_and_with_hooks_nothing_is_fused(
    kernels, checkpoint, token_ids
) -> None:
    fused = load(checkpoint("llama", "nvfp4"), DEVICE)
    expected = logits(fused, token_ids)
    seen = []
    mlp = fused.get_submodule("model.layers.0.mlp")
    handle = mlp.get_submodule("down_proj").register_forward_hook(lambda m, a, y: seen.append(y))
    assert float((logits(fused, token_ids) - expected).norm() / expected.norm()) < 0.01
    handle.remove()
    assert len(seen) == 1
    x = torch.randn(3, 64, device=DEVICE)
    gate, up, down = (mlp.get_submodule(f"{n}_proj") for n in ("gate", "up", "down"))
    assert torch.equal(mlp(x), down(nn.functional.silu(gate(x)) * up(x)))
    norm = fused.get_submodule("model.norm")
    y = norm(x.bfloat16().requires_grad_())
    assert y.requires_grad and not hasattr(y, "_ptq_norm")


def test_saving_copying_and_moving_a_fused_model(
    kernels, checkpoint, token_ids, tmp_path, caplog
) -> None:
    """What lies stacked in memory is saved under its own names."""
    path = checkpoint("llama", "nvfp4", rotation=16)
    with caplog.at_level(logging.INFO, "ptq.runtime.fusion"):
        model = AutoModelForCausalLM.from_pretrained(path, device_map=None).to(DEVICE).eval()
        prepare_kernels(model, torch.bfloat16)
    assert "fused: 2 stacks of layers, 3 RMSNorms, 1 gated MLPs" in caplog.messages[-1]
    expected = logits(model, token_ids)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").to(DEVICE).eval()
    prepare_kernels(again, torch.bfloat16)
    assert torch.equal(logits(again, token_ids), expected)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for other in (copy.deepcopy(model), model.to(DEVICE)):  # each layer alone
        assert all(m.readers is None for m in other.modules() if isinstance(m, QuantLinear))
        got = logits(other, token_ids)
        assert float((got - expected).norm() / expected.norm()) < 0.01
        fuse(other, torch.bfloat16)
        assert torch.equal(logits(other, token_ids), expected)
        after = other.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_layers_that_differ_share_nothing(kernels, checkpoint, token_ids) -> None:
    """q has another rotation than k and v, and one up projection is not quantized."""
    rules = (("q_proj", {"rotation": 1}), ("layers.0.mlp.up_proj", "skip"))
    model = load(checkpoint("llama", "nvfp4", layers=2, rotation=16, rules=rules), DEVICE)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    sharing = {name for name, layer in layers.items() if layer.readers is not None}
    assert sharing == {f"model.layers.1.mlp.{leaf}_proj" for leaf in ("gate", "up")}
    assert logits(model, token_ids).isfinite().all()


def test_different_global_scales_share_inputs_alone(kernels, checkpoint, token_ids) -> None:
    model = load(checkpoint("llama", "nvfp4", rotation=16), DEVICE)
    layer = model.get_submodule("model.layers.0.self_attn.k_proj")
    assert isinstance(layer, QuantLinear) and layer.weight_global_scale is not None
    layer.weight_global_scale = layer.weight_global_scale * 2
    assert share_inputs(model) == 1
    assert layer.readers is not None and layer.readers[0].weight is None
    counts = launches_of_a_layer(model)
    assert counts["ptq.w4a16_matmul.default"] == 6 and counts["ptq.rotate.default"] == 4
    expected = logits(unfused(model), token_ids)
    assert float((logits(model, token_ids) - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize("scheme", ["w4a16", "w4a4"])
def test_on_a_cpu_shared_inputs_change_no_bit(checkpoint, token_ids, scheme) -> None:
    """The reference path: each layer multiplies as it would alone."""
    if DEVICE == "cuda":
        pytest.skip("for the reference path")
    path = checkpoint("llama", "nvfp4", rotation=16, scheme=scheme)
    model = load(path, inputs="quantized")
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert sum(layer.readers is not None for layer in layers) == 5
    shared = logits(model, token_ids)
    for layer in layers:
        layer.readers = None
    assert torch.equal(logits(model, token_ids), shared)


def test_experts_share_inputs_and_keep_their_stacks(kernels, checkpoint, token_ids) -> None:
    path = checkpoint("qwen3_moe", "mxfp4", rotation=32)
    model = load(path, DEVICE)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    for name, layer in layers.items():
        if ".experts." in name and "down_proj" not in name:
            assert layer.readers is not None and layer.readers[0].weight is None
    expected = logits(unfused_experts(model), token_ids)
    assert float((logits(model, token_ids) - expected).norm() / expected.norm()) < 0.01


def unfused_experts(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, FusedNorm):
            module.kernel_dtype = None
    return other
