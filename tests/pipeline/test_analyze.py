"""Analyses of tiny models: what they hold, that nothing is changed, that they go on."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptq.numerics.formats import NVFP4
from ptq.pipeline.analysis import BlockAnalysis, rounded
from ptq.pipeline.analysis_files import PARTIAL, Analysis
from ptq.pipeline.analyze import Options, Samples, analyze, column_factor


@pytest.fixture
def options(tiny_text: Path) -> Options:
    return Options(calibration=str(tiny_text), samples=4, seq_len=64, tokens=64)


def run(model: Path, options: Options, **given) -> Analysis:
    return analyze(model, options, **given)


def test_every_layer_and_every_input_is_measured(tiny_llama: Path, options: Options) -> None:
    found = run(tiny_llama, options)
    assert [block.name for block in found.blocks] == ["model.layers.0", "model.layers.1"]
    first = found.blocks[0]
    weights = [tensor for tensor in first.tensors if tensor.role == "weight"]
    inputs = [tensor for tensor in first.tensors if tensor.role == "input"]
    assert len(weights) == len(first.layers) == 7
    assert [len(tensor.layers) for tensor in inputs] == [3, 1, 2, 1]
    assert all(tensor.first_tokens is not None for tensor in inputs)
    # q/k/v and gate/up read norms, which balancing folds into
    forms = {tensor.name.rpartition(".")[2]: len(tensor.variants) for tensor in weights}
    assert forms["q_proj"] == forms["gate_proj"] == 4
    assert {len(layer.errors) for layer in first.layers} <= {2, 4}


def test_weights_are_those_of_the_file_however_they_were_balanced(
    tiny_llama: Path, options: Options
) -> None:
    found = run(tiny_llama, options)
    stored = load_file(tiny_llama / "model.safetensors")
    for block in found.blocks:
        for tensor in block.tensors:
            if tensor.role == "weight":
                w = stored[f"{tensor.name}.weight"].float()
                noise = (w - rounded(w, NVFP4, "absmax")).square().sum()
                wanted = float(10 * torch.log10(w.square().sum() / noise))
                assert tensor.variants[0].formats["nvfp4"].qsnr == pytest.approx(wanted, abs=1e-3)


def test_outputs_of_balanced_layers_are_the_same_in_wide_formats(
    tiny_llama: Path, options: Options
) -> None:
    layer = run(tiny_llama, options).blocks[1].layers[0]
    assert {form.balanced for form in layer.errors} == {False, True}
    for form in layer.errors:
        assert 0 < form.both["mxint8"] < 1e-3
        assert form.weights["nvfp4"] < form.both["nvfp4"]


def test_an_interrupted_analysis_goes_on(
    tiny_llama: Path, options: Options, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop(block: BlockAnalysis, count: int, resumed: bool) -> None:
        raise Stop

    with pytest.raises(Stop):
        run(tiny_llama, options, folder=tmp_path, on_block=stop)
    assert (tmp_path / PARTIAL).exists()
    told: list[tuple[str, int, bool]] = []
    found = run(
        tiny_llama,
        options,
        folder=tmp_path,
        on_block=lambda block, count, resumed: told.append((block.name, count, resumed)),
    )
    assert told == [("model.layers.0", 2, True), ("model.layers.1", 2, False)]
    assert found.blocks == run(tiny_llama, options).blocks


def test_experts_are_measured_where_tokens_reach_them(make_tiny_model, options: Options) -> None:
    found = run(make_tiny_model("qwen3_moe"), options)
    layers = {layer.name: layer for layer in found.blocks[0].layers}
    experts = [layer for name, layer in layers.items() if ".experts." in name]
    assert len(experts) == 4 * 3 and any(layer.errors for layer in experts)


def test_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown scales 'up'; choose from absmax, mse"):
        Options(scales="up")
    with pytest.raises(ValueError, match="samples must be at least 1, not 0"):
        Options(samples=0)
    with pytest.raises(ValueError, match="balance must be from 0 to 1, not 2"):
        Options(balance=2)


def test_samples_keep_first_positions_apart() -> None:
    samples = Samples(tokens=6, batches=2)
    x = torch.arange(2 * 5.0).reshape(2, 5, 1).expand(2, 5, 4)
    assert samples("a", x) is x
    samples("a", x)
    taken = samples.take("a")
    assert taken is not None
    assert taken[0][:, 0].tolist() == [1, 3, 7] * 2
    assert taken[1][:, 0].tolist() == [0, 5, 0, 5]
    assert samples.take("b") is None
    samples("b", torch.ones(3, 4))  # tokens of an expert have no position
    taken = samples.take("b")
    assert taken is not None and len(taken[1]) == 0


def test_factors_of_columns_are_read_off_weights() -> None:
    weight, factor = torch.randn(8, 16), torch.exp(torch.randn(16))
    weight[:, 3] = 0
    found = column_factor(weight, weight / factor)
    assert found is not None and found[3] == 1
    live = weight.abs().amax(0) > 0
    torch.testing.assert_close(found[live], factor[live], rtol=1e-5, atol=0)
    assert column_factor(weight, weight * torch.rand(8, 1) / factor) is None
