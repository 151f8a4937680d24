"""Layers and experts through the interface that vLLM has for them, with a stand-in for vLLM."""

import pickle
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ptq.checkpoint.reader import Checkpoint
from ptq.runtime.load import load

BLOCK = "model.layers.0"
MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(scope="module")
def checkpoints(make_run: Callable, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("methods")
    rotated = {"rotation": 16, "scheme": "w4a4", "input_rule": "absmax"}
    for kind, fmt, recipe in (
        ("llama", "nvfp4", rotated),
        ("qwen2", "mxfp4", {}),
        ("mixtral", "mxfp4", {"rotation": 32}),
    ):
        make_run(kind, fmt, **recipe)(folder / kind, dialect="ptq")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def opened(stand_in_vllm, checkpoints: dict[str, Path]):
    """``opened(kind)``: the checkpoint, and vLLM's configuration of it."""

    def make(kind: str) -> tuple[Checkpoint, Any]:
        found = Checkpoint(checkpoints[kind])
        made = import_module("ptq.runtime.vllm_config").PtqConfig.from_config(found.quantization)
        made.packed_modules_mapping = MERGED
        return found, made

    return make


def another_process() -> None:
    """Every rank has one, in which layers are known by name once."""
    from vllm.config import get_current_vllm_config

    get_current_vllm_config().compilation_config.static_forward_context.clear()


def linear(opened: Any, name: str, sizes: list[int], inputs: int, **more: Any) -> nn.Module:
    """vLLM's layer, made, loaded and settled."""
    from vllm.model_executor.layers.linear import LinearBase

    checkpoint, config = opened
    another_process()
    layer = LinearBase(sizes, inputs, **more)
    layer.create(config.get_quant_method(layer, name), torch.float32)
    names = config.merged(name)
    for index, part in enumerate(names):
        shard = None if len(names) == 1 else "qkv"[index] if len(names) == 3 else index
        for leaf in layer.ptq_places:
            if f"{part}.{leaf}" in checkpoint.entries:
                parameter = getattr(layer, leaf)
                parameter.weight_loader(parameter, checkpoint.tensor(f"{part}.{leaf}"), shard)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def reference(opened: Any, names: list[str]) -> Callable[[torch.Tensor], torch.Tensor]:
    model = load(opened[0].path, dtype=torch.float32, inputs="quantized")
    layers = [model.get_submodule(name) for name in names]
    return lambda x: torch.cat([layer(x) for layer in layers], -1)


def test_a_merged_layer_computes_what_its_parts_do(opened) -> None:
    found = opened("llama")
    layer = linear(found, f"{BLOCK}.self_attn.qkv_proj", [64, 32, 32], 64)
    assert [name for name, _ in layer.named_parameters()] == []  # nothing is left of the loading
    x = torch.randn(5, 64)
    names = [f"{BLOCK}.self_attn.{leaf}_proj" for leaf in "qkv"]
    torch.testing.assert_close(layer.quant_method.apply(layer, x), reference(found, names)(x))
    layer = linear(found, f"{BLOCK}.mlp.gate_up_proj", [128, 128], 64)
    names = [f"{BLOCK}.mlp.{leaf}_proj" for leaf in ("gate", "up")]
    torch.testing.assert_close(layer.quant_method.apply(layer, x), reference(found, names)(x))


def test_a_bias_is_vllms_and_added_once(opened) -> None:
    from vllm.model_executor.layers.linear import LinearBase

    checkpoint, config = found = opened("qwen2")
    names = [f"{BLOCK}.self_attn.{leaf}_proj" for leaf in "qkv"]
    bias = torch.cat([checkpoint.tensor(f"{name}.bias") for name in names]).float()
    assert bias.abs().sum() > 0
    x = torch.randn(5, 64)
    expected = reference(found, names)(x)
    layer = LinearBase([64, 32, 32], 64)
    layer.create(config.get_quant_method(layer, f"{BLOCK}.self_attn.qkv_proj"), torch.float32)
    layer.bias = nn.Parameter(bias)
    for part, shard in zip(names, "qkv", strict=True):
        for leaf in layer.ptq_places:
            if f"{part}.{leaf}" in checkpoint.entries:
                parameter = getattr(layer, leaf)
                parameter.weight_loader(parameter, checkpoint.tensor(f"{part}.{leaf}"), shard)
    layer.quant_method.process_weights_after_loading(layer)
    torch.testing.assert_close(layer.quant_method.apply(layer, x, layer.bias), expected)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_heads_and_inputs(opened, ranks: int) -> None:
    """With 4 ranks the two heads of keys and values are held twice."""
    found, x = opened("llama"), torch.randn(5, 64)
    parts, replicas = [], max(1, ranks // 2)
    sizes = [64 // ranks, 32 // min(ranks, 2), 32 // min(ranks, 2)]
    for rank in range(ranks):
        layer = linear(
            found, f"{BLOCK}.self_attn.qkv_proj", sizes, 64,
            rank=rank, ranks=ranks, num_kv_head_replicas=replicas, outputs=sum(sizes) * ranks,
        )  # fmt: skip
        parts.append(layer.quant_method.apply(layer, x).split(sizes, -1))
    q, k, v = (
        torch.cat([part[i] for part in parts[:: 1 if i == 0 else replicas]], -1) for i in range(3)
    )
    names = [f"{BLOCK}.self_attn.{leaf}_proj" for leaf in "qkv"]
    torch.testing.assert_close(torch.cat([q, k, v], -1), reference(found, names)(x))
    x, inputs = torch.randn(5, 128), 128 // ranks
    total = torch.zeros(5, 64)
    for rank in range(ranks):
        layer = linear(
            found, f"{BLOCK}.mlp.down_proj", [64], inputs, rank=rank, ranks=ranks, all_inputs=128
        )
        total += layer.quant_method.apply(layer, x[:, rank * inputs : (rank + 1) * inputs])
    torch.testing.assert_close(total, reference(found, [f"{BLOCK}.mlp.down_proj"])(x))


def test_a_layer_that_every_rank_has_is_whole(opened) -> None:
    found, x = opened("llama"), torch.randn(5, 64)
    layer = linear(found, f"{BLOCK}.self_attn.o_proj", [64], 64, rank=1, ranks=2)
    expected = reference(found, [f"{BLOCK}.self_attn.o_proj"])(x)
    torch.testing.assert_close(layer.quant_method.apply(layer, x), expected)


def test_what_does_not_fit_is_one_line(opened) -> None:
    found = opened("llama")
    with pytest.raises(ValueError, match=r"q_proj.* have 128 outputs in .*, and 160 in vLLM: this"):
        linear(found, f"{BLOCK}.self_attn.qkv_proj", [96, 32, 32], 64)
    with pytest.raises(ValueError, match=r"rotation of 16, which 16 ranks .*: lower tensor_para"):
        linear(found, f"{BLOCK}.mlp.down_proj", [64], 8, rank=1, ranks=16, all_inputs=128)
    with pytest.raises(ValueError, match=r"vLLM merges 2 layers in .*q_proj.*: this arch"):
        linear(found, f"{BLOCK}.self_attn.qkv_proj", [96, 32], 64)
    with pytest.raises(ValueError, match="one layer in the checkpoint and several in vLLM: set"):
        linear(found, f"{BLOCK}.mlp.down_proj", [32, 32], 128, ranks=2, outputs=128)


def test_layers_that_lie_in_one_tensor_are_refused(opened) -> None:
    from vllm.model_executor.layers.linear import LinearBase

    _, config = opened("llama")
    layer = LinearBase([64, 32, 32], 64)
    layer.create(config.get_quant_method(layer, f"{BLOCK}.self_attn.qkv_proj"), torch.float32)
    for shard in (None, (0, 1), "index_q"):
        with pytest.raises(ValueError, match="weight_packed of several layers in one tensor"):
            layer.weight_packed.weight_loader(layer.weight_packed, torch.ones(2, 2), shard)


@pytest.mark.parametrize("ranks", [1, 2])
def test_experts_compute_what_those_of_load_do(opened, ranks: int) -> None:
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    checkpoint, config = opened("mixtral")
    place = next(n for n in checkpoint.layers if n.endswith(".experts.0.w1")).removesuffix(".0.w1")
    x, chosen, weights = torch.randn(6, 64), torch.randint(0, 4, (6, 2)).int(), torch.rand(6, 2)
    total = torch.zeros(6, 64)
    for rank in range(ranks):
        another_process()
        layer: Any = RoutedExperts(4, ("w1", "w2", "w3"), ranks=ranks, rank=rank)
        method = config.get_quant_method(layer, f"{place}.routed_experts")
        method.create_weights(
            layer=layer, num_experts=4, hidden_size=64, params_dtype=torch.float32,
            intermediate_size_per_partition=128 // ranks, weight_loader=None,
        )  # fmt: skip
        for name, entry in checkpoint.entries.items():
            if not name.startswith(f"{place}."):
                continue
            expert, projection, leaf = name.removeprefix(f"{place}.").split(".")
            parameter = getattr(layer, f"{'w2' if projection == 'w2' else 'w13'}_{leaf}")
            assert entry is not None and parameter.weight_loader(
                param=parameter, loaded_weight=checkpoint.tensor(name), weight_name=name,
                shard_id=projection, expert_id=int(expert), return_success=True,
            )  # fmt: skip
        method.process_weights_after_loading(layer)
        assert [*layer.parameters()] == []
        total += method.apply(layer, x, weights, chosen)
    model = load(checkpoint.path, dtype=torch.float32)
    like = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp.experts"))
    torch.testing.assert_close(total, like(x, chosen.long(), weights), rtol=1e-5, atol=1e-5)


def test_a_compiled_model_calls_layers_by_name(opened) -> None:
    """torch.compile sees one operator, which asks vLLM for the layer."""
    found, x = opened("llama"), torch.randn(5, 64)
    layer: Any = linear(found, f"{BLOCK}.self_attn.o_proj", [64], 64)
    method, expected = layer.quant_method, layer.quant_method.apply(layer, x)

    def model(x: torch.Tensor) -> torch.Tensor:
        return method.apply(layer, x) * 2

    traced = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(traced(x), expected * 2)
    from vllm.model_executor.layers.linear import LinearBase

    again = LinearBase([64], 64)
    with pytest.raises(ValueError, match=r"two layers called .*o_proj"):
        again.create(method, torch.float32)


def test_the_configuration_goes_to_other_processes(opened) -> None:
    config = opened("llama")[1]
    copy = pickle.loads(pickle.dumps(config))
    assert copy.parsed == config.parsed and copy.dialect is config.dialect
