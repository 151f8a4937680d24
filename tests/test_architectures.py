"""Every family of models goes the whole way: random weights → quantized → checkpoint → loaded, the
same logits.

``calib/ARCHITECTURES.md`` is made by this file: ``PTQ_WRITE_TABLE=1 pytest
tests/test_architectures.py`` writes it.
"""

import dataclasses
import importlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from families import BASE, FAMILIES, UNSUPPORTED, random_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ptq.checkpoint.dialect_choice import Choice
from ptq.checkpoint.reader import Checkpoint
from ptq.model.checkpoint_source import CheckpointSource
from ptq.model.memory_source import MemorySource
from ptq.model.parameter_names import dtype_plan
from ptq.model.structure import build_model, is_router
from ptq.pipeline.forecast import forecast
from ptq.pipeline.plan import Plan
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.run import Progress, quantize_model
from ptq.runtime.load import load
from ptq.runtime.quant_linear import QuantLinear
from ptq.text.windows import load_tokenizer


@dataclass(frozen=True)
class Outcome:
    quantized: dict[str, str]  # layer on disk → leaf name, experts as *
    alone: dict[str, str]  # tensor on disk → why
    unbalanced: set[str]  # leaf names of layers whose inputs could not be balanced


@pytest.fixture(scope="module")
def quantized(
    tmp_path_factory: pytest.TempPathFactory, tiny_text: Path, make_tiny_model: Callable[..., Path]
) -> Callable[[str], tuple[Path, Path, Recipe]]:
    """``quantized(family)``: directory of the model, directory of its checkpoint, recipe; made
    once."""
    made: dict[str, tuple[Path, Path, Recipe]] = {}

    def make(name: str) -> tuple[Path, Path, Recipe]:
        if name not in made:
            folder = tmp_path_factory.mktemp("family")
            random_model(FAMILIES[name]).save_pretrained(folder / "model")
            for file in make_tiny_model("llama").glob("tokenizer*"):  # one token per byte
                shutil.copy(file, folder / "model")
            recipe = quick(tiny_text, FAMILIES[name].format)
            quantize_model(
                folder / "model", folder / "out", recipe=recipe, device="cpu", dialect="ptq"
            )
            made[name] = (folder / "model", folder / "out", recipe)
        return made[name]

    return make


def quick(text: Path, format: str, **given: Any) -> Recipe:
    data = {"calibration": str(text), "samples": 4, "seq_len": 32, "batch_size": 2}
    cheap = {"rotation": 1, "scales": "mse", "order": "natural", "descent": 0}
    return Recipe.default(format, **{**data, **cheap, **given})


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(3, 200, (2, 16), generator=torch.Generator().manual_seed(1))


def generic(layer: str) -> str:
    """``model.layers.0.mlp.experts.3.up_proj`` → ``experts.*.up_proj``."""
    parts = layer.split(".")
    if "experts" in parts:
        return ".".join(["experts", "*", *parts[parts.index("experts") + 2 :]])
    return ".".join(
        parts[-2:] if "shared" in parts[-2] or parts[-1] in ("c_proj", "dense") else parts[-1:]
    )


def outcome(model: Path, out: Path) -> Outcome:
    """What of a checkpoint is quantized, and why the rest is not; an assertion fails where there is
    no reason."""
    source, checkpoint = CheckpointSource(model), Checkpoint(out)
    skeleton, blocks = source.skeleton(), tuple(f"{name}." for name, _ in source.blocks())
    modules, alone = dict(skeleton.named_modules()), {}
    assert isinstance(skeleton, PreTrainedModel)
    for stored in checkpoint.other_names():
        name = source.module_name(stored)
        owner = modules.get(name.rpartition(".")[0])
        if len(checkpoint.entries[stored].shape) < 2 or (
            owner is not None and "norm" in type(owner).__name__.lower()
        ):
            why = "norms and other vectors"
        elif owner is skeleton.get_output_embeddings():
            why = "output head"
        elif isinstance(owner, nn.Embedding):
            why = "embeddings"
        elif name.startswith(blocks) and is_router(skeleton, name.rpartition(".")[0]):
            why = f"router: `{name.split('.')[-2]}`"
        elif name.startswith(blocks):
            assert dtype_plan(skeleton, torch.float16)(name), f"{stored} is left for no reason"
            why = f"in float32 by its authors: `{name.split('.')[-2]}`"
        else:
            assert not any(part in name for part in ("layers.", "h.")) or "vision" in name, stored
            why = f"outside the decoder: `{next(p for p in name.split('.') if p != 'model')}`"
        alone[stored] = why
    unbalanced = {generic(report.name) for report in checkpoint.reports if not report.balance}
    return Outcome({name: generic(name) for name in checkpoint.layer_names()}, alone, unbalanced)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_goes_the_whole_way(name: str, quantized, tokens: Tensor, tiny_text: Path) -> None:
    family = FAMILIES[name]
    model, out, recipe = quantized(name)
    original = random_model(family)
    with torch.no_grad():
        expected = original(tokens).logits
        source = CheckpointSource(model, dtype=torch.float32)
        source.fill(source.skeleton(), "", "cpu")
        torch.testing.assert_close(source.skeleton()(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        in_memory = quantize_model(
            original, recipe=recipe, device="cpu", tokenizer=load_tokenizer(model)
        )
        loaded = load(out, dtype=torch.float32)
        assert isinstance(in_memory, nn.Module)
        logits = loaded(tokens).logits
        assert torch.equal(logits, in_memory(tokens).logits)
    assert (logits - expected).norm() < 0.5 * (expected - expected.mean(-1, keepdim=True)).norm(), (
        "far off"
    )
    found = outcome(model, out)
    assert set(found.quantized.values()) == set(family.layers.split())
    replaced = {n for n, m in loaded.named_modules() if isinstance(m, QuantLinear)}
    assert len(replaced) == len(found.quantized)


@pytest.mark.parametrize("name", FAMILIES)
def test_names_on_disk_are_those_of_the_source(name: str, quantized) -> None:
    """Every tensor of the source is there, unchanged or rescaled, or is the weight of a quantized
    layer."""
    family = FAMILIES[name]
    model, out, _ = quantized(name)
    source, checkpoint = CheckpointSource(model), Checkpoint(out)
    layers = set(checkpoint.layer_names())
    why = outcome(model, out).alone
    for stored in source.names():
        # or it is what makes other loaders stop
        if stored in checkpoint.entries and stored.removesuffix(".weight") not in layers:
            before, after = source.tensor(stored), checkpoint.tensor(stored)
            offset = family.type.startswith("gemma")  # gains are 1 + weight
            rescaled = before.shape == after.shape and bool(
                ((before + offset) * (after + offset) >= 0).all()
            )
            may_be = stored not in why or why[stored].startswith(
                ("norms", "router")
            )  # biases, gains, routers
            assert torch.equal(before, after) or (rescaled and may_be), stored
        elif stored.removesuffix(".weight") not in layers:
            stem = next(
                stored.rpartition(leaf)[0]
                for leaf in ("experts", "input_linear", "output_linear")
                if leaf in stored
            )
            assert any(layer.startswith(f"{stem}experts.0.") for layer in layers), stored


def row(name: str, found: Outcome) -> str:
    """A line of the table: what is quantized, what is not, and why."""
    family = FAMILIES[name]
    reasons: dict[str, set[str]] = {}
    for stored, why in found.alone.items():
        parts = [part for part in stored.removesuffix(".weight").split(".") if not part.isdecimal()]
        reasons.setdefault(why, set()).add(parts[-1])
    left = [
        f"{why}: {', '.join(f'`{leaf}`' for leaf in sorted(leaves))}" if why in NAMED else why
        for why, leaves in sorted(reasons.items())
    ]
    if "output head" not in reasons:
        left.append("output head: tied to the embedding")
    layers = ", ".join(f"`{leaf}`" for leaf in dict.fromkeys(found.quantized.values()))
    plain = ", ".join(f"`{leaf}`" for leaf in sorted(found.unbalanced))
    balanced = (
        "none"
        if found.unbalanced == {*found.quantized.values()}
        else f"all but {plain}"
        if plain
        else "all"
    )
    cells = (
        name,
        f"`{family.type}`",
        layers,
        "; ".join(left),
        balanced,
        f"{family.format}: passes",
        family.note,
    )
    return f"| {' | '.join(cells)} |"


NAMED = ("embeddings", "output head")
HEAD = """# Families of models

Made by `tests/test_architectures.py`, which quantizes a random two-layer model of each family,
writes it, loads it and compares. *Passes* means: the loaded model gives the logits of the model
that was quantized in memory, bit for bit; the unquantized skeleton gives those of transformers;
every tensor of the source is in the checkpoint, or its packed parts.

No family has code of its own. A model works if its decoder is a list of blocks of linear layers;
`Conv1D` becomes `Linear`, and experts stored as a stack (transposed, interleaved or with biases as
well) become one `Linear` for each expert and projection. Layers in other places (attention sinks,
rotary tables, convolutions) stay as they are. *Balanced* are layers whose inputs can be scaled for
nothing, by what produces them; that is tried, not looked up.

| family | type | quantized | left in high precision, and why | balanced | result | note |
|---|---|---|---|---|---|---|
"""
REFUSED = """
## Refused

One line says so, before anything is computed.

| family | type | message |
|---|---|---|
"""


def test_the_table_is_what_the_tests_found(quantized, root: Path) -> None:
    made = (
        HEAD
        + "".join(row(name, outcome(*quantized(name)[:2])) + "\n" for name in FAMILIES)
        + REFUSED
    )
    for name, (type_, settings) in UNSUPPORTED.items():
        made += f"| {name} | `{type_}` | {refusal(type_, settings)} |\n"
    file = root / "calib" / "ARCHITECTURES.md"
    if os.environ.get("PTQ_WRITE_TABLE"):
        file.write_text(made, encoding="utf-8")
    assert file.read_text(encoding="utf-8") == made, (
        "set PTQ_WRITE_TABLE=1 and run this test to write it anew"
    )


def refusal(type_: str, settings: dict[str, Any]) -> str:
    """The message of a family that does not work."""
    config = AutoConfig.for_model(type_, **{**BASE, **settings})
    with pytest.raises(ValueError) as caught, init_empty_weights():
        MemorySource(build_model(config, Path("the model"), torch.float32)).blocks()
    return str(caught.value)


def test_gpt_oss_in_mxfp4_is_quantized_as_its_values_are(
    quantized, tmp_path: Path, tiny_text: Path, tokens: Tensor
) -> None:
    """The experts of the hub's gpt-oss are packed; filled, they are what transformers makes of
    them."""
    plain, _, recipe = quantized("gpt-oss")
    packed, unpacked = tmp_path / "packed", tmp_path / "unpacked"
    for folder in (packed, unpacked):
        shutil.copytree(plain, folder)
    tensors = load_file(plain / "model.safetensors")
    values, stored = dict(tensors), dict(tensors)
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, features, rows = stored.pop(name).shape
        shape = (experts, rows, features // 32)
        stored[f"{name}_blocks"] = torch.randint(
            0, 256, (*shape, 16), generator=generator, dtype=torch.uint8
        )
        stored[f"{name}_scales"] = torch.randint(
            122, 126, shape, generator=generator, dtype=torch.uint8
        )
        values[name] = convert_moe_packed_tensors(
            stored[f"{name}_blocks"], stored[f"{name}_scales"], dtype=torch.bfloat16
        ).float()
    save_file(stored, packed / "model.safetensors")
    save_file(values, unpacked / "model.safetensors")
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}})
    )
    for folder in (packed, unpacked):
        out = tmp_path / f"{folder.name}-out"
        quantize_model(folder, out, recipe=recipe, device="cpu", dialect="ptq")
    one, other = (Checkpoint(tmp_path / f"{kind}-out") for kind in ("packed", "unpacked"))
    assert one.names() == other.names() and not any(n.endswith("_blocks") for n in one.names())
    for name in one.names():
        assert torch.equal(
            one.tensor(name).view(torch.uint8), other.tensor(name).view(torch.uint8)
        ), name
    with torch.no_grad():
        assert torch.equal(load(one.path)(tokens).logits, load(other.path)(tokens).logits)
    kept = quick(tiny_text, "nvfp4", ignore=("*.experts.*",))
    quantize_model(packed, tmp_path / "kept", recipe=kept, device="cpu")
    assert any(n.endswith("_blocks") for n in Checkpoint(tmp_path / "kept").names())  # as they were
    with torch.no_grad():
        assert load(tmp_path / "kept")(tokens).logits.isfinite().all()


@pytest.mark.parametrize("name", ["gpt-oss", "Granite-MoE", "Qwen3-MoE", "GPT-2"])
def test_layers_that_are_left_out_are_loaded_as_they_were(
    name: str, quantized, tmp_path: Path, tiny_text: Path, tokens: Tensor
) -> None:
    """Also where the source has them fused with others, or transposed."""
    model = quantized(name)[0]
    ignore = (
        ("*.0.*.c_fc", "*.1.*.c_attn")
        if name == "GPT-2"
        else ("*.experts.1.down_proj", "*.0.*.experts.2.*")
    )
    recipe = quick(tiny_text, "mxfp4", ignore=ignore)
    original, tokenizer = random_model(FAMILIES[name]), load_tokenizer(model)
    in_memory = quantize_model(original, recipe=recipe, tokenizer=tokenizer, device="cpu")
    quantize_model(model, tmp_path / "out", recipe=recipe, device="cpu")
    assert isinstance(in_memory, nn.Module)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(tokens).logits, in_memory(tokens).logits)


@pytest.mark.parametrize("name", ["gpt-oss", "Granite-MoE", "GPT-2"])
def test_a_regrouped_model_is_written_in_our_dialect_only(
    name: str, quantized, tmp_path: Path
) -> None:
    """Other programs would not look for its layers under their names, and compute without them."""
    model, _, recipe = quantized(name)
    quick_recipe = dataclasses.replace(recipe, format="mxfp4", algorithm="rtn")
    with pytest.raises(
        ValueError,
        match=r"cannot write compressed-tensors: its .* here|single ones; use dialect ptq",
    ):
        quantize_model(
            model, tmp_path / "out", recipe=quick_recipe, device="cpu", dialect="compressed-tensors"
        )
    assert not (tmp_path / "out").exists()


def test_a_rule_for_routers_alone_quantizes_them(quantized, tiny_text: Path) -> None:
    source = CheckpointSource(quantized("Qwen2-MoE")[0])
    gate = "model.layers.0.mlp.shared_expert_gate"

    def planned(**given: Any) -> bool:
        return gate in Plan.of(source, quick(tiny_text, "nvfp4", **given)).layers

    assert not planned() and not planned(rules=(("*", "mxfp8"),))
    assert planned(rules=(("shared_expert_gate", "mxfp8"),))
    assert not planned(rules=(("shared_expert_gate", "skip"),))


@pytest.mark.parametrize("name", ["Llama", "GPT-NeoX, Pythia", "Cohere", "OPT", "Gemma 3"])
def test_the_output_head_is_quantized_on_request(
    name: str, quantized, tmp_path: Path, tiny_text: Path, tokens: Tensor
) -> None:
    model = quantized(name)[0]
    recipe = quick(tiny_text, "nvfp4", lm_head=True)
    config = AutoConfig.from_pretrained(model)
    if config.tie_word_embeddings:
        with pytest.raises(ValueError, match="is tied to the embedding"):
            quantize_model(model, tmp_path / "out", recipe=recipe, device="cpu")
        return
    original, tokenizer = random_model(FAMILIES[name]), load_tokenizer(model)
    in_memory = quantize_model(original, recipe=recipe, tokenizer=tokenizer, device="cpu")
    choice = quantize_model(model, tmp_path / "out", recipe=recipe, device="cpu")
    assert (
        isinstance(in_memory, PreTrainedModel)
        and isinstance(choice, Choice)
        and choice.dialect == "ptq"
    )
    assert isinstance(in_memory.get_output_embeddings(), QuantLinear)
    checkpoint = Checkpoint(tmp_path / "out")
    head = CheckpointSource(model).checkpoint_name("lm_head.weight").removesuffix(".weight")
    assert head in checkpoint.layer_names() and f"{head}.weight" not in checkpoint.other_names()
    assert [r.tokens for r in checkpoint.reports if r.name == head] == [4 * 32]
    assert forecast(model, recipe).layers == len(checkpoint.layer_names())
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(tokens).logits, in_memory(tokens).logits)


def test_all_tokens_through_all_experts_on_request(
    quantized, tmp_path: Path, tiny_text: Path
) -> None:
    model, out, _ = quantized("Mixtral")
    recipe = quick(tiny_text, "nvfp4", route_all_experts=True)
    quantize_model(model, tmp_path / "out", recipe=recipe, device="cpu", dialect="ptq")

    def tokens_of(path: Path) -> list[int]:
        return [r.tokens for r in Checkpoint(path).reports if "experts" in r.name]

    assert set(tokens_of(tmp_path / "out")) == {4 * 32}
    assert (
        sum(tokens_of(out)) == 2 * 3 * 2 * 4 * 32
    )  # two experts of a token, three projections, two blocks
    assert not any(r.topped_up for r in Checkpoint(tmp_path / "out").reports)
    rare = [r for r in Checkpoint(out).reports if r.topped_up]
    assert rare and all(r.tokens < r.in_features for r in rare)


@pytest.mark.parametrize(
    "name", ["GPT-2", "gpt-oss", "Granite-MoE", "DeepSeek-V3", "Falcon", "LLaVA (vision-language)"]
)
def test_transformers_loads_what_was_regrouped(name: str, quantized, tokens: Tensor) -> None:
    """``from_pretrained`` after ``import ptq.hf`` gives the same model, with no tensor missing or
    left over."""
    importlib.import_module("ptq.hf")
    out = quantized(name)[1]
    auto = AutoModelForImageTextToText if FAMILIES[name].type == "llava" else AutoModelForCausalLM
    result: Any = auto.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    model, info = result
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, load(out, dtype=torch.float32)(tokens).logits)


@pytest.mark.parametrize("name, stop", [("Llama", 1), ("Llama", 2), ("gpt-oss", 1)])
def test_an_interrupted_run_continues_to_the_same_bytes(
    name: str, stop: int, quantized, tmp_path: Path, tiny_text: Path
) -> None:
    """Also where the head comes last, and where experts are regrouped."""
    model, recipe = quantized(name)[0], quick(tiny_text, "nvfp4", lm_head=True)

    def interrupt(progress: Progress) -> None:
        if progress.index == stop:
            raise KeyboardInterrupt

    resumed: list[bool] = []
    quantize_model(model, tmp_path / "whole", recipe=recipe, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        quantize_model(model, tmp_path / "parts", recipe=recipe, device="cpu", on_block=interrupt)
    quantize_model(
        model,
        tmp_path / "parts",
        recipe=recipe,
        device="cpu",
        on_block=lambda progress: resumed.append(progress.resumed),
    )
    assert resumed == [i <= stop for i in range(3)]
    one, other = (
        (tmp_path / folder / "model.safetensors").read_bytes() for folder in ("whole", "parts")
    )
    assert one == other


@pytest.mark.parametrize("name", ["GPT-2", "gpt-oss", "Llama"])
def test_a_model_in_memory_is_written_as_its_directory_is(
    name: str, quantized, tmp_path: Path, tiny_text: Path, tokens: Tensor
) -> None:
    """With quantized inputs and, where it is not tied, the head; what is left out is as it was."""
    model = quantized(name)[0]
    recipe = quick(
        tiny_text,
        "nvfp4",
        scheme="w4a4",
        lm_head=name == "Llama",
        ignore=("layers.1.*", "h.1.*")[:1],
    )
    if name == "GPT-2":
        recipe = dataclasses.replace(recipe, ignore=("*.1.mlp.*",))
    original, tokenizer = random_model(FAMILIES[name]), load_tokenizer(model)
    quantize_model(model, tmp_path / "directory", recipe=recipe, device="cpu")
    quantize_model(original, tmp_path / "memory", recipe=recipe, tokenizer=tokenizer, device="cpu")
    loaded = [
        load(tmp_path / folder, dtype=torch.float32, inputs="quantized")
        for folder in ("directory", "memory")
    ]
    with torch.no_grad():
        one, other, own = (m(tokens).logits for m in (*loaded, original))
    assert torch.equal(one, other) and torch.equal(one, own)


def test_gpt_2_by_the_names_of_the_hub(quantized, tmp_path: Path, tokens: Tensor) -> None:
    """The hub's files lack the first part of the names, and hold masks that the model does not
    know."""
    model, out, recipe = quantized("GPT-2")
    shutil.copytree(model, tmp_path / "hub")
    tensors = {
        k.removeprefix("transformer."): t for k, t in load_file(model / "model.safetensors").items()
    }
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(2)}
    save_file(tensors | masks, tmp_path / "hub" / "model.safetensors")
    quantize_model(tmp_path / "hub", tmp_path / "out", recipe=recipe, device="cpu", dialect="ptq")
    names = Checkpoint(tmp_path / "out").names()
    assert names == [n.removeprefix("transformer.") for n in Checkpoint(out).names()]
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(tokens).logits, load(out)(tokens).logits)
