"""Only modules that compute what a fused one computes give way to it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, silu
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from ptq.runtime.fused_modules import FusedMLP, FusedNorm, fuse_mlps, fuse_norms
from ptq.runtime.fusion import share_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class MLP(nn.Module):
    """A gated MLP as transformers writes them."""

    def __init__(self, quantized, activation=silu, scale: float = 1.0) -> None:
        super().__init__()
        self.gate_proj = quantized(nn.Linear(64, 96, bias=False), "mxfp4", 32)
        self.up_proj = quantized(nn.Linear(64, 96, bias=False), "mxfp4", 32)
        self.down_proj = quantized(nn.Linear(96, 64, bias=False), "mxfp4", 32)
        self.activation, self.scale = activation, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self.activation(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(both * self.scale if self.scale != 1 else both)


def norm(kind: type[nn.Module], width: int = 64, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    module = kind(width).to(DEVICE, dtype)
    nn.init.normal_(module.get_parameter("weight"))
    return module


@torch.no_grad()
def test_norms_like_llamas_give_way_and_others_stay(kernels) -> None:
    model = nn.ModuleDict(
        {
            "llama": norm(LlamaRMSNorm),
            "one_plus_gain": norm(GemmaRMSNorm),
            "gated": norm(Qwen3NextRMSNormGated),
            "narrow": norm(LlamaRMSNorm, 40),
            "float32_gain": norm(LlamaRMSNorm, 64, torch.float32),
            "layer_norm": nn.LayerNorm(64).to(DEVICE),
        }
    )
    original, names = copy.deepcopy(model["llama"]), list(model.state_dict())
    assert fuse_norms(model, torch.bfloat16) == 1 == fuse_norms(model, torch.bfloat16)
    fused = model["llama"]
    assert isinstance(fused, FusedNorm) and list(model.state_dict()) == names
    x = torch.randn(7, 64, device=DEVICE).bfloat16()
    y, expected = fused(x).float(), original(x).float()
    assert ((y - expected).abs() <= 2.0**-7 * expected.abs()).all()
    assert (y != expected).float().mean() < 0.01
    wide = torch.randn(7, 64, device=DEVICE)
    assert torch.equal(fused(wide), original(wide)), "another dtype: as it was"
    assert "64, epsilon=1e-06" in repr(fused)


@torch.no_grad()
def test_mlps_with_silu_give_way_and_others_stay(kernels, quantized) -> None:
    model = nn.ModuleDict(
        {
            "silu": MLP(quantized),
            "gelu": MLP(quantized, gelu),
            "scaled": MLP(quantized, scale=0.5),
            "not_quantized": MLP(quantized),
            "not_stacked": MLP(quantized),
        }
    )
    model["not_quantized"].down_proj = nn.Linear(96, 64, bias=False).to(DEVICE, torch.bfloat16)
    original, names = model["silu"], list(model.state_dict())
    share_inputs(model)
    model["not_stacked"].up_proj.readers = None
    assert fuse_mlps(model, torch.bfloat16) == 1 == fuse_mlps(model, torch.bfloat16)
    fused = model["silu"]
    assert isinstance(fused, FusedMLP) and list(model.state_dict()) == names
    x = torch.randn(2, 3, 64, device=DEVICE).bfloat16()
    y, expected = fused(x), original(x)
    assert y.shape == expected.shape
    assert float((y - expected).float().norm() / expected.float().norm()) < 4e-3
    # a layer that someone wraps (adapters do) is called
    wrapped = nn.Sequential(fused.down_proj)
    fused.down_proj = wrapped
    assert torch.equal(fused(x), original(x))


def test_the_norm_is_what_gradients_go_through(kernels) -> None:
    fused = nn.ModuleDict({"n": norm(LlamaRMSNorm)})
    fuse_norms(fused, torch.bfloat16)
    fused["n"](torch.randn(3, 64, device=DEVICE).bfloat16()).sum().backward()
    assert fused["n"].weight.grad is not None


@pytest.mark.parametrize("where", ["copy", "moved"])
def test_a_norm_that_was_copied_or_moved_forgets_its_readers(kernels, where) -> None:
    fused = nn.ModuleDict({"n": norm(LlamaRMSNorm)})
    fuse_norms(fused, torch.bfloat16)
    fused["n"].readers = object()
    other = copy.deepcopy(fused["n"]) if where == "copy" else fused["n"].to(DEVICE)
    assert other.readers is None and other.kernel_dtype == torch.bfloat16
