"""Checkpoints on disk: what is filled, released, kept and refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from ptq.model.checkpoint_source import CheckpointSource
from ptq.model.memory_source import MemorySource
from ptq.model.tensor_digest import digest

Build = Callable[..., transformers.PreTrainedModel]
Save = Callable[[str], Path]


def filled(source: CheckpointSource) -> nn.Module:
    source.fill(source.skeleton(), "", "cpu")
    return source.skeleton()


def edited(
    directory: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]
) -> Path:
    """A copy of the checkpoint with other tensors."""
    shutil.copytree(directory, target)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_the_skeleton_holds_no_weights_but_real_buffers(tiny_checkpoint: Save):
    model = CheckpointSource(tiny_checkpoint("llama")).skeleton()
    assert all(p.is_meta for p in model.parameters())
    assert {name: b.device.type for name, b in model.named_buffers()} and not any(
        b.is_meta for b in model.buffers()
    )
    assert not model.training


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma2", "gemma3"])
def test_filling_everything_gives_the_model_that_was_saved(
    family: str, tiny_model: Build, tiny_checkpoint: Save, batches: list[torch.Tensor]
):
    source, original = CheckpointSource(tiny_checkpoint(family)), tiny_model(family)
    with torch.no_grad():
        assert torch.equal(filled(source)(batches[0]).logits, original(batches[0]).logits)


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_one_block_is_filled_and_released(family: str, tiny_checkpoint: Save):
    source = CheckpointSource(tiny_checkpoint(family))
    names = [name for name, _ in source.blocks()]
    assert names == ["model.layers.0", "model.layers.1"]
    name, block = source.blocks()[0]
    source.fill(block, name, "cpu")
    assert not any(p.is_meta for p in block.parameters())
    assert sum(not p.is_meta for p in source.skeleton().parameters()) == len(
        list(block.parameters())
    )
    source.release(block)
    assert all(p.is_meta for p in source.skeleton().parameters())


def test_release_keeps_the_tables_that_no_checkpoint_has(tiny_checkpoint: Save):
    source = CheckpointSource(tiny_checkpoint("llama"))
    model = filled(source)
    before = {name: b.clone() for name, b in model.named_buffers()}
    source.release(model)
    assert before and all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_release_drops_what_layers_were_replaced_by(tiny_checkpoint: Save):
    source = CheckpointSource(tiny_checkpoint("llama"))
    name, block = source.blocks()[0]
    source.fill(block, name, "cpu")
    packed = nn.Module()
    packed.register_buffer("weight_packed", torch.zeros(4, 4, dtype=torch.uint8))
    block.set_submodule("mlp.down_proj", packed)
    source.release(block)
    assert packed.get_buffer("weight_packed").is_meta


def test_a_filled_parameter_is_left_alone(tiny_checkpoint: Save):
    source = CheckpointSource(tiny_checkpoint("llama"))
    name, block = source.blocks()[0]
    source.fill(block, name, "cpu")
    weight = block.get_parameter("mlp.down_proj.weight")
    source.fill(block, name, "cpu")
    assert block.get_parameter("mlp.down_proj.weight") is weight


def test_weights_are_cast_to_the_type_to_compute_in(tiny_checkpoint: Save):
    source = CheckpointSource(tiny_checkpoint("llama"), dtype=torch.bfloat16)
    assert source.dtype == torch.float32
    assert {p.dtype for p in filled(source).parameters()} == {torch.bfloat16}
    assert source.tensor("model.norm.weight").dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v3", "qwen3_moe"])
def test_a_16_bit_model_is_what_transformers_loads(
    family: str, tiny_checkpoint: Save, batches: list[torch.Tensor]
):
    path, dtype = tiny_checkpoint(family), torch.bfloat16
    auto = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, experts_implementation="eager"
    )
    model = filled(CheckpointSource(path, dtype=dtype))
    kept = {
        n: t.dtype
        for n, t in [*auto.named_parameters(), *auto.named_buffers()]
        if "experts" not in n
    }
    mine = {n: t.dtype for n, t in [*model.named_parameters(), *model.named_buffers()]}
    assert {n: mine[n] for n in kept} == kept
    with torch.no_grad():
        assert torch.equal(model(batches[0]).logits, auto(batches[0]).logits)


def test_a_tied_output_layer_is_filled_from_the_embedding(tiny_model: Build, tmp_path: Path):
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    source = CheckpointSource(tmp_path)
    assert "lm_head.weight" not in source.names()
    model = filled(source)
    assert torch.equal(
        model.get_parameter("lm_head.weight"), model.get_parameter("model.embed_tokens.weight")
    )


def test_a_base_model_without_prefix_fills_a_causal_one(tiny_model: Build, tmp_path: Path):
    def unprefix(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "a")
    source = CheckpointSource(edited(tmp_path / "a", tmp_path / "b", unprefix))
    assert "layers.0.mlp.down_proj.weight" in source.names()
    assert not any(p.is_meta for p in filled(source).parameters())
    assert (
        source.checkpoint_name("model.layers.0.mlp.down_proj.weight_packed")
        == "layers.0.mlp.down_proj.weight_packed"
    )
    assert (
        source.module_name("layers.0.mlp.down_proj.weight_packed")
        == "model.layers.0.mlp.down_proj.weight_packed"
    )
    assert {name for name, _ in source.rest()} == {"embed_tokens.weight", "norm.weight"}


def test_rest_and_blocks_are_the_whole_checkpoint(tiny_checkpoint: Save):
    source = CheckpointSource(tiny_checkpoint("mixtral"))
    rest = dict(source.rest())
    blocks = [
        source.checkpoint_name(f"{b}.{n}") for b, m in source.blocks() for n in m.state_dict()
    ]
    assert sorted([*rest, *blocks]) == source.names()
    assert set(rest) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_the_fingerprint_follows_headers_and_config_but_not_the_place(
    tiny_checkpoint: Save, tmp_path: Path
):
    first = CheckpointSource(tiny_checkpoint("llama"))
    shutil.copytree(first.path, tmp_path / "copy")
    assert CheckpointSource(tmp_path / "copy").fingerprint == first.fingerprint
    other = edited(
        first.path,
        tmp_path / "half",
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()}),
    )
    assert CheckpointSource(other).fingerprint != first.fingerprint
    config = tmp_path / "copy" / "config.json"
    config.write_text(config.read_text().replace('"use_cache": true', '"use_cache": false'))
    assert CheckpointSource(tmp_path / "copy").fingerprint != first.fingerprint


def test_a_quantized_model_is_refused_before_any_work(tiny_checkpoint: Save, tmp_path: Path):
    shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    file.write_text(json.dumps(config))
    source = CheckpointSource(tmp_path / "model")
    model = source.skeleton()  # may be looked at
    for use in (source.blocks, lambda: source.fill(model, "", "cpu")):
        with pytest.raises(
            ValueError, match=r"already quantized \(gptq\); start from the original"
        ) as e:
            use()
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("bad", ["nan", "inf", "1e30", "missing", "shape"])
def test_damaged_tensors_are_named(bad: str, tiny_checkpoint: Save, tmp_path: Path):
    name = "model.layers.1.mlp.up_proj.weight"

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        if bad == "missing":
            del tensors[name]
        elif bad == "shape":
            tensors[name] = tensors[name][:-1].clone()
        else:
            tensors[name][3, 5] = float(bad)

    source = CheckpointSource(edited(tiny_checkpoint("llama"), tmp_path / "bad", damage))
    with pytest.raises(ValueError, match=name) as caught:
        first, second = source.blocks()  # says what names and shapes tell
        source.fill(first[1], first[0], "cpu")
        source.fill(second[1], second[0], "cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="has no tensor nonesuch"):
        source.tensor("nonesuch")


def test_a_missing_expert_is_named(tiny_checkpoint: Save, tmp_path: Path):
    gone = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
    source = CheckpointSource(
        edited(
            tiny_checkpoint("mixtral"), tmp_path / "bad", lambda tensors: tensors.__delitem__(gone)
        )
    )
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.experts.2.w3.weight"):
        source.blocks()


def test_experts_stored_fused_are_split_on_filling(
    tiny_model: Build, tiny_checkpoint: Save, tmp_path: Path
):
    def fuse(tensors: dict[str, torch.Tensor]) -> None:
        for i in range(2):
            at = f"model.layers.{i}.mlp.experts"
            parts = {
                k: torch.stack([tensors.pop(f"{at}.{e}.{k}_proj.weight") for e in range(8)])
                for k in ("gate", "up", "down")
            }
            tensors[f"{at}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
            tensors[f"{at}.down_proj"] = parts["down"]

    plain = filled(CheckpointSource(tiny_checkpoint("qwen3_moe"))).state_dict()
    source = CheckpointSource(edited(tiny_checkpoint("qwen3_moe"), tmp_path / "fused", fuse))
    fused = filled(source).state_dict()
    assert plain.keys() == fused.keys()
    assert all(torch.equal(plain[name], fused[name]) for name in plain)
    layer = "model.layers.1.mlp.experts"
    kept = dict(
        source.kept(
            "model.layers.1",
            {f"{layer}.{e}.{k}_proj.weight" for e in range(1, 8) for k in ("gate", "up")},
        )
    )
    assert torch.equal(kept[f"{layer}.0.up_proj.weight"], plain[f"{layer}.0.up_proj.weight"])
    assert f"{layer}.gate_up_proj" not in kept and f"{layer}.3.up_proj.weight" not in kept
    assert kept[f"{layer}.down_proj"].shape == (8, 64, 32)  # as stored: nothing was replaced


@pytest.mark.parametrize("in_memory", [False, True])
def test_what_is_kept_of_a_block_is_what_was_not_replaced(
    in_memory: bool, tiny_model: Build, tiny_checkpoint: Save
):
    source = (
        MemorySource(tiny_model("llama"))
        if in_memory
        else CheckpointSource(tiny_checkpoint("llama"))
    )
    replaced = {"model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"}
    kept = dict(source.kept("model.layers.1", replaced))
    assert {f"model.layers.1.{n}" for n in source.blocks()[1][1].state_dict()} - replaced == set(
        kept
    )
    assert all(torch.equal(kept[n], source.tensor(n)) for n in kept)


def test_experts_whose_checkpoint_is_transposed_are_filled(
    batches: list[torch.Tensor], tmp_path: Path
):
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "head_dim": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "rope_parameters": rope,
    }
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "depth": 2,
        "num_heads": 2,
        "out_hidden_size": 32,
    }
    config = transformers.Qwen3VLMoeConfig(
        text_config=text, vision_config=tower | {"deepstack_visual_indexes": [0]}
    )
    model = transformers.Qwen3VLMoeForConditionalGeneration(config).eval()
    model.set_experts_implementation("eager")
    model.save_pretrained(tmp_path / "plain")

    def transpose(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".experts." in n]:
            tensors[name] = tensors[name].transpose(1, 2).contiguous()

    source = CheckpointSource(edited(tmp_path / "plain", tmp_path / "as on the hub", transpose))
    stored = source.tensor("model.language_model.layers.0.mlp.experts.down_proj")
    assert stored.shape == (4, 24, 32)  # in, out
    with torch.no_grad():
        assert torch.equal(filled(source)(batches[0]).logits, model(batches[0]).logits)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_every_tensor_is_hashed_in_one_place(family: str, tiny_checkpoint: Save):
    source = CheckpointSource(tiny_checkpoint(family), hashed=True)
    parts = [source.digests(name) for name in (*(n for n, _ in source.blocks()), None)]
    found = {name: value for part in parts for name, value in part.items()}
    assert sum(map(len, parts)) == len(found)
    assert found == {name: digest(source.tensor(name)) for name in source.names()}


def test_what_is_read_is_hashed_on_the_way(tiny_checkpoint: Save, monkeypatch):
    source = CheckpointSource(tiny_checkpoint("llama"), hashed=True)
    name, block = source.blocks()[1]
    source.fill(block, name, "cpu")
    monkeypatch.setattr(source, "tensor", None)
    assert len(source.digests(name)) == 9


def test_a_tensor_that_changes_under_way_is_refused(tiny_checkpoint: Save, tmp_path: Path):
    shutil.copytree(tiny_checkpoint("llama"), tmp_path / "m")
    source = CheckpointSource(tmp_path / "m", hashed=True)
    name = "model.norm.weight"
    source.tensor(name)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    save_file(tensors | {name: 2 * tensors[name]}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name} changed while it was in use"):
        source.tensor(name)
