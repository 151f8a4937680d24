"""The whole way: directory → walk → solve → checkpoint → loaded model, bit for bit; and what it
refuses."""

import gc
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ptq.calib.hessian import Hessian
from ptq.calib.walk import Watch, walk
from ptq.checkpoint.dialect_choice import Choice
from ptq.checkpoint.reader import Checkpoint
from ptq.checkpoint.work_folder import WorkFolder
from ptq.model.checkpoint_source import CheckpointSource
from ptq.model.memory_source import MemorySource
from ptq.numerics.rotation import Rotation
from ptq.numerics.scales import Grid, round_to
from ptq.pipeline.blocks_on_disk import BlocksInMemory
from ptq.pipeline.plan import Plan
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.run import Progress, quantize, quantize_model
from ptq.pipeline.solve import INPUT_MARGIN
from ptq.runtime.load import load
from ptq.runtime.quant_linear import QuantLinear
from ptq.text.windows import load_calibration, load_tokenizer

Make = Callable[..., Path]


@pytest.fixture
def quick(tiny_text: Path) -> Callable[..., Recipe]:
    """A recipe on little data."""

    def make(format: str = "nvfp4", **given: object) -> Recipe:
        data = {"calibration": str(tiny_text), "samples": 9, "seq_len": 32, "batch_size": 3}
        return Recipe.default(format, **{**data, **given})

    return make


def batches(path: Path, recipe: Recipe) -> list[Tensor]:
    return load_calibration(
        load_tokenizer(path),
        recipe.calibration,
        samples=recipe.samples,
        seq_len=recipe.seq_len,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
    ).batches


def in_memory(
    source: CheckpointSource, data: list[Tensor], recipe: Recipe, **options
) -> Iterator[Progress]:
    return quantize(source, data, Plan.of(source, recipe), BlocksInMemory(), **options)


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen2", "qwen3"])
@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4", "nvint4"])
@pytest.mark.parametrize("scheme", ["w4a16", "w4a4"])
def test_a_loaded_checkpoint_is_the_model_that_was_quantized(
    make_tiny_model: Make, quick, tmp_path: Path, kind: str, fmt: str, scheme: str
) -> None:
    path, recipe = make_tiny_model(kind), quick(fmt, scheme=scheme, rotation=16)
    source = MemorySource(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    for _ in in_memory(source, batches(path, recipe), recipe):
        pass
    quantize_model(path, tmp_path / "out", recipe=recipe, device="cpu")
    tokens = batches(path, recipe)[0]
    with torch.no_grad():
        expected = source.skeleton()(tokens).logits
        for cached in (True, False):
            loaded = load(tmp_path / "out", dtype=torch.float32, inputs="quantized", cache=cached)
            assert torch.equal(loaded(tokens).logits, expected)


def test_the_walk_ends_in_the_hidden_states_of_the_loaded_model(
    tiny_llama: Path, quick, tmp_path: Path
) -> None:
    recipe = quick("mxfp4", scheme="w4a4")
    data, last = batches(tiny_llama, recipe), {}
    source = MemorySource(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32))
    for _ in in_memory(source, data, recipe, finished=last.__setitem__):
        pass
    quantize_model(tiny_llama, tmp_path / "out", recipe=recipe, device="cpu")
    model, seen = load(tmp_path / "out", dtype=torch.float32, inputs="quantized"), []
    model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for index, tokens in enumerate(data):
            model(tokens)
            assert torch.equal(seen[-1], last[index])


@pytest.mark.parametrize("fmt", ["mxint4", "mxint6", "mxfp6", "mxint8", "mxfp8"])
def test_study_formats_take_the_same_way(tiny_llama: Path, quick, tmp_path: Path, fmt: str) -> None:
    recipe = quick(fmt, scheme="w4a4")
    quantize_model(tiny_llama, tmp_path / "out", recipe=recipe, device="cpu")
    original = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokens = batches(tiny_llama, recipe)[0]
    with torch.no_grad():
        expected, measured = (
            original(tokens).logits,
            load(tmp_path / "out", dtype=torch.float32, inputs="quantized")(tokens).logits,
        )
    error = float((measured - expected).square().mean() / expected.square().mean())
    assert (
        0
        < error
        < {"mxint4": 0.3, "mxint6": 0.02, "mxfp6": 0.02, "mxint8": 1e-3, "mxfp8": 0.02}[fmt]
    )


def test_later_blocks_see_what_the_quantized_ones_produce(tiny_llama: Path, quick) -> None:
    """The Hessian of the second block is that of the quantized first block's output, not of the
    original's."""
    recipe = quick("mxfp4", scheme="w4a4", rotation=1)
    data = batches(tiny_llama, recipe)
    hessians = {}
    for scheme in ("w4a16", "w4a4"):
        source = MemorySource(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32))
        chosen = Recipe.default("mxfp4", scheme=scheme, rotation=1)
        for _ in in_memory(source, data, chosen):
            pass
        seen: list[Tensor] = []
        second = source.blocks()[1][1]
        second.self_attn.q_proj.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].flatten(0, 1))
        )
        with torch.no_grad():
            for tokens in data:
                source.skeleton()(tokens)
        x = torch.cat(seen).double()
        hessians[scheme] = x.T @ x / len(x)
    original = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    plain = [b.groups[0].hessian.mean() for b in _statistics(original, data)][1]
    distance = {k: float((h - plain).norm() / plain.norm()) for k, h in hessians.items()}
    assert 0 < distance["w4a16"] < distance["w4a4"]


def _statistics(model: nn.Module, data: list[Tensor]):
    return walk(MemorySource(model), data, Watch(), device="cpu", held=[None] * len(data))


def test_held_out_errors_agree_with_the_prediction_of_the_hessian(demo_model: Path) -> None:
    """‖(W-Ŵ)X‖²/‖WX‖² on sequences that calibration never used, layer by layer, on the bundled
    model."""
    recipe = Recipe.default("nvfp4", samples=32, seq_len=256, batch_size=8)
    source = CheckpointSource(demo_model, dtype=torch.float32)
    reports = []
    for progress in in_memory(
        MemorySource(AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)),
        batches(source.path, recipe),
        recipe,
    ):
        reports += progress.reports
    assert len(reports) == 28
    ratios = torch.tensor([r.held_out_error / r.error for r in reports])
    assert 0.8 < float(ratios.median()) < 1.3
    assert float(ratios.max()) < 2
    assert all(r.error < r.rtn_error for r in reports)


def test_ignored_layers_stay_as_they_are(tiny_llama: Path, quick, tmp_path: Path) -> None:
    recipe = quick(ignore=("down_proj", "layers.0.*"))
    quantize_model(tiny_llama, tmp_path / "out", recipe=recipe, device="cpu")
    before, after = (
        load_file(tiny_llama / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    packed = {
        name.removesuffix(".weight_packed") for name in after if name.endswith(".weight_packed")
    }
    assert packed == {
        f"model.layers.1.{name}"
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
        )
    }
    balanced = {
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
    }
    for name, tensor in before.items():
        if name.removesuffix(".weight") not in packed:
            assert torch.equal(after[name], tensor) == (name not in balanced), name


def test_rules_give_layers_their_own_format(tiny_llama: Path, quick, tmp_path: Path) -> None:
    recipe = quick(rules=(("down_proj", "mxfp8"), ("o_proj", {"rotation": 32}), ("v_proj", "skip")))
    quantize_model(tiny_llama, tmp_path / "out", recipe=recipe, device="cpu")
    model = load(tmp_path / "out", dtype=torch.float32)
    block = model.model.layers[1]
    assert block.mlp.down_proj.format.name == "mxfp8"
    assert block.self_attn.o_proj.rotation.size == 32
    assert isinstance(block.self_attn.v_proj, nn.Linear)
    assert block.self_attn.q_proj.format.name == "nvfp4"


def test_the_same_run_gives_the_same_bytes(tiny_llama: Path, quick, tmp_path: Path) -> None:
    for name in ("a", "b"):
        quantize_model(tiny_llama, tmp_path / name, recipe=quick(), device="cpu")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mixtral", {}),
        ("qwen3_moe", {"samples": 2, "balance": 0.5}),  # all experts borrow
        ("qwen3_moe", {"scheme": "w4a4", "rules": (("up_proj", "mxfp8"),)}),
    ],
)
def test_rounds_of_experts_give_the_same_bytes(
    make_tiny_model: Callable[..., Path], quick, tmp_path: Path, kind: str, options: dict
) -> None:
    model, recipe = make_tiny_model(kind), quick(**options)
    for name, memory in (("once", 1e12), ("rounds", 1.0)):
        out = tmp_path / name / "out"
        quantize_model(model, out, recipe=recipe, device="cpu", hessian_memory=memory)
    for file in ("model.safetensors", "config.json"):
        once, rounds = (tmp_path / name / "out" / file for name in ("once", "rounds"))
        assert once.read_bytes() == rounds.read_bytes()
    reports = [Checkpoint(tmp_path / name / "out").reports for name in ("once", "rounds")]
    once, rounds = ([replace(r, seconds=0.0) for r in made] for made in reports)
    assert once == rounds


@pytest.mark.parametrize("algorithm", ["gptq", "rtn"])
def test_an_interrupted_run_ends_with_the_same_bytes(
    tiny_llama: Path, quick, tmp_path: Path, algorithm: str
) -> None:
    recipe = quick("nvint4", scheme="w4a4", algorithm=algorithm)

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    quantize_model(tiny_llama, tmp_path / "whole", recipe=recipe, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        quantize_model(tiny_llama, tmp_path / "parts", recipe=recipe, device="cpu", on_block=stop)
    assert not (tmp_path / "parts").exists()
    resumed = []
    quantize_model(
        tiny_llama,
        tmp_path / "parts",
        recipe=recipe,
        device="cpu",
        on_block=lambda p: resumed.append(p.resumed),
    )
    assert resumed == [True, False]
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    assert not (tmp_path / "parts.partial").exists()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_weights_that_changed_in_place_are_not_mixed(
    tiny_llama: Path, quick, tmp_path: Path, name: str
) -> None:
    """Of the same names, sizes and headers."""
    source, recipe = tmp_path / "source", quick(algorithm="rtn")
    shutil.copytree(tiny_llama, source)

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    def again() -> object:
        return quantize_model(source, tmp_path / "out", recipe=recipe, device="cpu")

    with pytest.raises(KeyboardInterrupt):
        quantize_model(source, tmp_path / "out", recipe=recipe, device="cpu", on_block=stop)
    whole = (source / "model.safetensors").read_bytes()
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(torch.int32).view(-1)[5] ^= 1  # the last bit of one weight
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert len((source / "model.safetensors").read_bytes()) == len(whole)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out.partial").iterdir()}
    with pytest.raises(ValueError, match=f"{name} is not the weight that it was") as caught:
        again()
    assert "out.partial to start over" in str(caught.value) and "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out.partial").iterdir()} == before
    (source / "model.safetensors").write_bytes(whole)
    again()
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("package", ["ptq", "torch", "transformers"])
def test_another_version_does_not_continue(
    tiny_llama: Path, quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt

    recipe = quick(algorithm="rtn")
    with pytest.raises(KeyboardInterrupt):
        quantize_model(tiny_llama, tmp_path / "out", recipe=recipe, device="cpu", on_block=stop)
    place = "" if package == "ptq" else f".{package}"
    monkeypatch.setattr(f"ptq.pipeline.run{place}.__version__", "9.9.0")
    with pytest.raises(ValueError, match=rf"versions\.{package} was '.*' and is '9\.9\.0'"):
        quantize_model(tiny_llama, tmp_path / "out", recipe=recipe, device="cpu")


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_same_command_ends_a_run_that_died_in_its_last_moments(
    tiny_llama: Path, quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    out, told = tmp_path / "out", []
    if overwrite:
        quantize_model(tiny_llama, out, recipe=quick("mxfp4"), device="cpu")
    again = partial(
        quantize_model, tiny_llama, out, recipe=quick(), device="cpu", on_block=told.append
    )

    def die(self: WorkFolder) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(WorkFolder, "remove", die)
        again(overwrite=overwrite)
    assert len(told) == 2 and (tmp_path / "out.partial").exists()
    choice = again(overwrite=overwrite)
    assert isinstance(choice, Choice) and "had finished" in choice.reason
    assert len(told) == 2 and [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(FileExistsError, match="--overwrite"):
        quantize_model(tiny_llama, out, recipe=quick(samples=3), device="cpu")


@pytest.mark.parametrize(("fmt", "scheme"), [("nvfp4", "w4a16"), ("mxfp4", "w4a4")])
def test_round_to_nearest_reads_no_text(
    tiny_llama: Path, quick, tmp_path: Path, fmt: str, scheme: str
) -> None:
    """Scales of weights and of dynamic inputs depend on none. What layers share they still do."""
    recipe = quick(fmt, scheme=scheme, algorithm="rtn", rotation=16, calibration="missing.txt")
    quantize_model(tiny_llama, tmp_path / "out", recipe=recipe, device="cpu", dialect="ptq")
    original = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    loaded = load(tmp_path / "out", dtype=torch.float32)
    attention, expected = (m.model.layers[1].self_attn for m in (loaded, original))
    layers = [(getattr(attention, n), getattr(expected, n).weight) for n in ("q_proj", "v_proj")]
    rotated = [Rotation(16).exact(weight.detach()) for _, weight in layers]
    if recipe.fmt.has_global_scale:
        whole = torch.cat([Rotation(16).exact(expected.k_proj.weight.detach()), *rotated])
        t = recipe.fmt.global_scale(whole.abs().amax())
    else:
        t = torch.ones(())
    for (layer, _), weight in zip(layers, rotated, strict=True):
        nearest = round_to(weight, Grid(recipe.fmt, t, "mse").scales(weight))
        assert torch.equal(layer.quantized_weight().dequantize(), nearest.dequantize())
    for report in json.loads((tmp_path / "out" / "ptq_report.json").read_text())["layers"]:
        assert report["tokens"] == 0 and not report["of_outputs"]
        assert 1e-3 < report["error"] == report["rtn_error"] < 0.05


def test_ranges_of_inputs_take_one_pass_of_the_original(
    tiny_llama: Path, quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = quick("nvfp4", scheme="w4a4", algorithm="rtn")
    data, seen = batches(tiny_llama, recipe), list[Tensor]()
    monkeypatch.setattr(Hessian, "update", lambda *_: pytest.fail("no moments are needed"))
    quantize_model(tiny_llama, tmp_path / "out", recipe=recipe, device="cpu")
    original = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    down = original.model.layers[1].mlp.down_proj
    down.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().amax()))
    with torch.no_grad():
        for tokens in data:
            original(tokens)
    layer = load(tmp_path / "out", dtype=torch.float32).model.layers[1].mlp.down_proj
    scale = recipe.fmt.global_scale(torch.stack(seen).amax(), INPUT_MARGIN)
    torch.testing.assert_close(layer.input_global_scale, scale, rtol=1e-5, atol=0)


def test_a_poisoned_weight_is_named_and_nothing_stays(
    tiny_llama: Path, quick, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_llama, source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj.weight contains NaN"):
        quantize_model(source, tmp_path / "out", recipe=quick(), device="cpu")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_finished_blocks_leave_nothing_in_memory(
    tiny_llama: Path, quick, tmp_path: Path, monkeypatch
) -> None:
    """Neither weights nor what layers cache: memory must not grow with the number of blocks."""
    made: list[QuantLinear] = []
    original = QuantLinear.from_quantized.__func__

    def remember(cls, *args, **kwargs):
        made.append(original(cls, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(QuantLinear, "from_quantized", classmethod(remember))
    held = []

    def count(progress) -> None:
        if progress.index:
            first = made[:7]  # the layers of the first block, while the second has just been solved
            held.append(sum(b.nbytes for layer in first for b in layer.buffers() if not b.is_meta))
            held.append(sum(layer._dequantized is not None for layer in first))

    quantize_model(tiny_llama, tmp_path / "out", recipe=quick(), device="cpu", on_block=count)
    assert held == [0, 0]


def test_replaced_layers_are_freed(tiny_llama: Path, quick) -> None:
    """A reference to the original layers would keep the whole model in memory, block after
    block."""
    recipe, source = quick(), CheckpointSource(tiny_llama, dtype=torch.float32)
    first = [weakref.ref(m) for m in source.blocks()[0][1].modules() if isinstance(m, nn.Linear)]
    assert len(first) == 7
    steps = in_memory(source, batches(tiny_llama, recipe), recipe)
    next(steps)
    next(steps)
    gc.collect()
    assert [ref() for ref in first] == [None] * 7


@pytest.mark.parametrize("out", ["model", "model/../model", "model/out", ".", ""])
def test_a_run_never_takes_the_place_of_its_source(
    tiny_llama: Path, quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"--out .*"):
        quantize_model("model", out, recipe=quick(), device="cpu", overwrite=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("silenced", ["self_attn.v_proj", "mlp.up_proj", "input_layernorm"])
@pytest.mark.parametrize("scheme", ["w4a16", "w4a4"])
def test_a_layer_that_reads_zeros_is_rounded_to_nearest_and_told(
    tiny_llama: Path, quick, scheme: str, silenced: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model.get_parameter(f"model.layers.1.{silenced}.weight").data.zero_()
    source, recipe = MemorySource(model), quick(scheme=scheme)
    reports = {
        report.name: report
        for progress in in_memory(source, batches(tiny_llama, recipe), recipe)
        for report in progress.reports
    }
    readers = {
        "self_attn.v_proj": ["self_attn.o_proj"],
        "mlp.up_proj": ["mlp.down_proj"],
        "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    }[silenced]
    for name in readers:
        report = reports[f"model.layers.1.{name}"]
        assert (report.algorithm, report.error, report.rtn_error) == ("rtn", 0, 0)
        assert report.tokens > 0
        assert f"model.layers.1.{name}: reads nothing but zeros" in caplog.text
    assert reports["model.layers.0.mlp.up_proj"].algorithm == "gptq"


def test_a_layer_that_has_nothing_to_lose_is_not_said_to_read_zeros(
    tiny_llama: Path, quick, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights that lie on the grid of the format already, as those of a model that was MXFP4."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = torch.where(module.weight > 0, 2.0**-4, -(2.0**-4))
    source, recipe = MemorySource(model), quick("mxfp4", rotation=1, balance=0.0)
    for progress in in_memory(source, batches(tiny_llama, recipe), recipe):
        for report in progress.reports:
            assert (report.algorithm, report.error, report.rtn_error) == ("rtn", 0, 0)
            assert f"{report.name}: GPTQ did not beat round to nearest" in caplog.text
    assert "zeros" not in caplog.text


@pytest.mark.parametrize("balance", [0.0, 0.5])
def test_a_layer_that_is_never_called_stays_and_is_told(
    tiny_llama: Path, quick, balance: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Jamba multiplies by the weight of its dt_proj directly."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for layer in model.model.layers:
        layer.mlp.dt_proj = nn.Linear(64, 64)
    source, recipe = MemorySource(model), quick(balance=balance)
    names = [
        report.name
        for progress in in_memory(source, batches(tiny_llama, recipe), recipe)
        for report in progress.reports
    ]
    assert len(names) == 14 and not any("dt_proj" in name for name in names)
    assert type(model.model.layers[1].mlp.dt_proj) is nn.Linear
    assert "model.layers.1.mlp.dt_proj: never called during calibration" in caplog.text
