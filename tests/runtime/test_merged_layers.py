"""Layers as an engine merges and cuts them compute what those of the checkpoint compute."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ptq
from ptq.checkpoint.dialect import Dialect
from ptq.checkpoint.dialects import DIALECTS
from ptq.checkpoint.quantization_config import LayerInfo
from ptq.checkpoint.reader import Checkpoint
from ptq.numerics import activations, tensor
from ptq.runtime.load import load
from ptq.runtime.merged_layers import Cut, Merged, Shard, gate_by, merged_experts
from ptq.runtime.quant_linear import QuantLinear

QKV = [f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkv"]
DOWN = "model.layers.0.mlp.down_proj"


def fill(shard: Shard, checkpoint: Checkpoint) -> Shard:
    """Give it every tensor under its name, as an engine does: guards too."""
    for name, entry in checkpoint.entries.items():
        owner, _, leaf = name.rpartition(".")
        if owner == shard.name and leaf in shard.types:
            shard.take(leaf, checkpoint.tensor(name))
            assert entry is not None
    return shard


def shard_of(checkpoint: Checkpoint, name: str, cut: Cut | None = None) -> Shard:
    info = checkpoint.layers.get(name)
    dialect = DIALECTS[checkpoint.dialect]
    whole = Cut(checkpoint.shape(name)[1]) if info is not None else Cut(64)
    return fill(Shard(name, info, dialect, cut or whole), checkpoint)


@pytest.fixture(scope="module")
def write(make_run: Callable, tmp_path_factory: pytest.TempPathFactory):
    """``write(format, dialect=…, kind=…, **recipe)``: a checkpoint, made once."""
    made: dict[str, Path] = {}

    def make(fmt: str, dialect: str = "ptq", kind: str = "llama", **recipe) -> Checkpoint:
        key = repr((fmt, dialect, kind, recipe))
        if key not in made:
            path = tmp_path_factory.mktemp("merged") / "out"
            make_run(kind, fmt, **recipe)(path, dialect=dialect)
            made[key] = path
        return Checkpoint(made[key])

    return make


W4A4 = {"scheme": "w4a4", "input_rule": "absmax"}


@pytest.mark.parametrize(
    ("fmt", "dialect", "recipe"),
    [
        ("nvfp4", "ptq", {"rotation": 16, **W4A4}),
        ("mxfp4", "ptq", {"rotation": 32}),
        ("nvint4", "ptq", {}),
        ("mxint6", "ptq", {"rotation": 32}),
        ("nvfp4", "compressed-tensors", W4A4),
        ("nvint4", "compressed-tensors", {}),
        ("nvfp4", "modelopt", W4A4),
    ],
)
def test_merged_layers_are_those_of_load(write, fmt: str, dialect: str, recipe: dict) -> None:
    checkpoint = write(fmt, dialect, **recipe)
    model = load(checkpoint.path, dtype=torch.float32, inputs="quantized")
    layers = [model.get_submodule(name) for name in QKV]
    assert all(isinstance(layer, QuantLinear) for layer in layers)
    shards = [shard_of(checkpoint, name) for name in QKV]
    merged = Merged([shard.layer(torch.float32) for shard in shards], 128)
    # unfolded integers may get a global scale each
    assert len(merged.parts) == 1 or (fmt, dialect) == ("nvint4", "compressed-tensors")
    assert not any(shard.stored for shard in shards)
    x = torch.randn(5, 64)
    expected = torch.cat([layer(x) for layer in layers], -1)
    torch.testing.assert_close(merged(x), expected, rtol=1e-6, atol=1e-6)


def test_layers_that_differ_stay_apart(write) -> None:
    """A rotation of its own, or a global scale, is a part of its own."""
    rotated, plain = write("nvfp4", rotation=16), write("nvfp4")
    parts = [
        shard_of(rotated, QKV[0]).layer(torch.float32),
        shard_of(plain, QKV[1]).layer(torch.float32),
        shard_of(plain, QKV[2]).layer(torch.float32),
    ]
    merged = Merged(parts, 128)
    assert [part.out_features for part in merged.parts] == [64, 64]
    x = torch.randn(3, 64)
    torch.testing.assert_close(merged(x), torch.cat([part(x) for part in parts], -1))
    scaled = shard_of(plain, QKV[2])
    scaled.stored["weight_global_scale"] = scaled.stored["weight_global_scale"] * 2
    half = scaled.layer(torch.float32)
    both = Merged([parts[1], half], 64)
    assert len(both.parts) == 2
    torch.testing.assert_close(both(x)[:, 32:], parts[2](x) / 2)


def test_what_is_not_quantized_is_a_part_too(write) -> None:
    checkpoint = write("nvfp4", ignore=("v_proj", "lm_head"))
    parts = [shard_of(checkpoint, name).layer(torch.float32) for name in QKV]
    merged = Merged(parts, 128)
    assert isinstance(merged.parts[1], nn.Linear) and len(merged.parts) == 2
    x = torch.randn(3, 64)
    weight = checkpoint.tensor(f"{QKV[2]}.weight").float()
    torch.testing.assert_close(merged(x)[:, 96:], functional.linear(x, weight))


def test_a_bias_is_added_before_rounding(write) -> None:
    parts = [shard_of(write("nvfp4"), name).layer(torch.bfloat16) for name in QKV]
    bias, x = torch.randn(128).bfloat16(), torch.randn(7, 64).bfloat16()
    without = Merged(parts, 128)(x.float())
    y = Merged(parts, 128, bias)(x)
    assert torch.equal(y, (without + bias.float()).bfloat16())


def test_rows_that_are_not_there_are_zero(write) -> None:
    merged = Merged([shard_of(write("nvfp4"), QKV[1]).layer(torch.float32)], 40)
    y = merged(torch.randn(2, 64))
    assert merged.made == 32 and y.shape == (2, 40) and not y[:, 32:].any()


@pytest.fixture
def bfloat16_by_default() -> Iterator[None]:
    """As in vLLM while it makes and loads a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("fmt", "dialect"),
    [("nvint4", "compressed-tensors"), ("nvfp4", "modelopt"), ("mxfp4", "ptq"), ("mxfp8", "ptq")],
)
def test_no_number_depends_on_the_default_dtype(
    write, bfloat16_by_default: None, fmt: str, dialect: str
) -> None:
    torch.set_default_dtype(torch.float32)
    checkpoint = (
        write(fmt, dialect, **W4A4) if dialect != "compressed-tensors" else write(fmt, dialect)
    )
    x = torch.randn(3, 64, dtype=torch.float32)
    expected = shard_of(checkpoint, QKV[0]).layer(torch.float32)(x)
    for cached in (activations._reciprocal, tensor._numbers):
        cached.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    assert torch.equal(shard_of(checkpoint, QKV[0]).layer(torch.float32)(x), expected)


@pytest.mark.parametrize("fmt", ["nvint4", "fp8-channel"])
@pytest.mark.parametrize("dialect", ["ptq", "compressed-tensors"])
def test_ranks_share_rows_and_columns(write, dialect: str, fmt: str) -> None:
    checkpoint = write(fmt, dialect, rotation=16)

    def part(name: str, **cut: tuple[int, int]) -> nn.Module:
        inputs = checkpoint.shape(name)[1]
        return shard_of(checkpoint, name, Cut(inputs, **cut)).layer(torch.float32)

    x = torch.randn(3, 128)
    whole = part(DOWN)(x)
    rows = [part(DOWN, rows=(start, start + 32))(x) for start in (0, 32)]
    torch.testing.assert_close(torch.cat(rows, -1), whole)
    sums = [part(DOWN, columns=(s, s + 64))(x[:, s : s + 64]) for s in (0, 64)]
    torch.testing.assert_close(sums[0] + sums[1], whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rotation", "what"), [(64, "blocks of the rotation of 64"), (1, "groups of 16")]
)
def test_groups_and_rotations_are_not_parted(rotation: int, what: str) -> None:
    info = LayerInfo(format="nvfp4", rotation=rotation)
    with pytest.raises(ValueError, match=f"{what}, which .* ranks cannot share: lower tensor_par"):
        Shard(DOWN, info, DIALECTS["ptq"], Cut(96, columns=(0, 24)))


def test_what_is_missing_is_named(write) -> None:
    checkpoint = write("nvfp4")
    shard = shard_of(checkpoint, DOWN)
    del shard.stored["weight_scale"]
    with pytest.raises(ValueError, match=rf"{DOWN}\.weight_scale is missing"):
        shard.layer(torch.float32)
    with pytest.raises(ValueError, match=r"has no lm_head\.weight: it is incomplete"):
        Shard("lm_head", None, DIALECTS["ptq"], Cut(64)).layer(torch.float32)


def test_every_tensor_of_a_layer_has_a_place() -> None:
    """Or an engine would stop at it: also where it is there only at times."""
    info = LayerInfo(format="mxfp4", quantize_inputs=True)

    def names(dialect: Dialect, layer: LayerInfo) -> set[str]:
        return set(Shard("n", layer, dialect, Cut(64)).types)

    own = {"weight", "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"}
    assert names(DIALECTS["ptq"], info) == own
    folded = names(DIALECTS["compressed-tensors"], LayerInfo(format="nvint4"))
    assert folded == {"weight", "weight_packed", "weight_scale", "weight_shape"}


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_experts_are_those_of_load(write, fmt: str) -> None:
    checkpoint = write(fmt, kind="mixtral", rotation=32)
    model = load(checkpoint.path, dtype=torch.float32)
    place = next(n for n in checkpoint.layers if n.endswith(".experts.0.w1")).removesuffix(".0.w1")
    shards = {
        (expert, leaf): shard_of(checkpoint, f"{place}.{expert}.{leaf}")
        for expert in range(4)
        for leaf in ("w1", "w2", "w3")
    }
    experts, reason = merged_experts(
        shards, hidden=64, intermediate=128, gating=gate_by(functional.silu), dtype=torch.float32
    )
    assert "do not run in Triton kernels" in str(reason)  # so they run one by one
    like = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp.experts"))
    x, chosen = torch.randn(6, 64), torch.randint(0, 4, (6, 2))
    weights: Tensor = torch.rand(6, 2)
    torch.testing.assert_close(experts(x, chosen, weights), like(x, chosen, weights))


def test_ranks_share_experts(write) -> None:
    checkpoint = write("mxfp4", kind="mixtral", rotation=32)
    place = next(n for n in checkpoint.layers if n.endswith(".experts.0.w1")).removesuffix(".0.w1")

    def experts(rank: int, ranks: int) -> nn.Module:
        size = 128 // ranks
        part = (rank * size, rank * size + size)
        cuts = {"w1": Cut(64, rows=part), "w3": Cut(64, rows=part), "w2": Cut(128, columns=part)}
        shards = {
            (expert, leaf): shard_of(checkpoint, f"{place}.{expert}.{leaf}", cut)
            for expert in range(4)
            for leaf, cut in cuts.items()
        }
        gating = gate_by(functional.silu)
        return merged_experts(
            shards, hidden=64, intermediate=size, gating=gating, dtype=torch.float32
        )[0]

    x, chosen, weights = torch.randn(6, 64), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    whole = experts(0, 1)(x, chosen, weights)
    parts = [experts(rank, 2)(x, chosen, weights) for rank in range(2)]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-5, atol=1e-5)


def test_nothing_of_an_engine_is_imported() -> None:
    source = (Path(ptq.__file__).parent / "runtime" / "merged_layers.py").read_text()
    assert "import vllm" not in source and "from vllm" not in source
