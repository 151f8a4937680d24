"""A nested checkpoint runs at both of its widths; any other says that it has one."""

from pathlib import Path

import pytest
import torch

from ptq.checkpoint.quantization_config import LayerInfo
from ptq.checkpoint.reader import Checkpoint
from ptq.numerics.nested import drop
from ptq.numerics.tensor import Scales, pack
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.run import quantize_model
from ptq.runtime.load import load
from ptq.runtime.nested_width import at_width, converted
from ptq.runtime.quant_linear import QuantLinear
from ptq.runtime.verify import verify

HERE = Path("here")


@pytest.fixture(scope="module")
def nested(make_tiny_model, tiny_text, tmp_path_factory) -> Path:
    """An MXINT8 checkpoint with MXINT4 in it, but for one kind of layer; not to be changed."""
    out = tmp_path_factory.mktemp("nested") / "out"
    recipe = Recipe.default(
        "mxint8",
        nested=4,
        calibration=str(tiny_text),
        samples=4,
        seq_len=64,
        rules=(("o_proj", {"nested": 0}),),
    )
    quantize_model(make_tiny_model("qwen2", dtype=torch.bfloat16), out, recipe=recipe)
    return out


def test_both_widths_are_the_numbers_of_the_file(nested: Path, token_ids: torch.Tensor) -> None:
    checkpoint = Checkpoint(nested)
    assert verify(nested).ok
    wide, narrow = load(nested), load(nested, bits=4)
    assert load(nested, bits=8).state_dict().keys() == wide.state_dict().keys()
    for name, info in checkpoint.layers.items():
        one, other = wide.get_submodule(name), narrow.get_submodule(name)
        assert isinstance(one, QuantLinear) and isinstance(other, QuantLinear)
        expected = one.quantized_weight()
        if name.endswith("o_proj"):
            assert info.nested == 0 and other.format.name == "mxint8"
        else:
            assert info.nested == 4 and other.format.name == "mxint4" and other.nested == 0
            expected = drop(expected, 4)
        assert torch.equal(other.quantized_weight().codes, expected.codes)
        assert torch.equal(other.weight_scale, expected.scales.bits)
        assert (one.bias is None) == (other.bias is None)
    with torch.no_grad():
        logits = [model(token_ids).logits for model in (wide, narrow)]
    assert not torch.equal(*logits)


def test_reports_say_what_each_width_costs(nested: Path) -> None:
    for report in Checkpoint(nested).reports:
        if report.name.endswith("o_proj"):
            assert report.wide_error is None
        else:
            assert report.wide_error is not None and report.wide_error < report.error / 4


def test_widths_that_are_not_there_are_refused(nested: Path, tmp_path: Path, make_run) -> None:
    with pytest.raises(ValueError, match=r"has 4 or 8 bits, not 6"):
        load(nested, bits=6)
    make_run("llama", "mxint8")(tmp_path / "plain", dialect="ptq")
    with pytest.raises(ValueError, match=r"does not have two widths .*--nested 4"):
        load(tmp_path / "plain", bits=4)


def test_layers_keep_what_they_are_without_a_width() -> None:
    layers = {
        "a": LayerInfo(format="mxint8", nested=4),
        "b": LayerInfo(format="mxint8", nested=6),
        "c": LayerInfo(format="nvfp4"),
    }
    assert at_width(layers, None, HERE) == layers
    assert at_width(layers, 8, HERE) == layers
    with pytest.raises(ValueError, match="b in here has 6 or 8 bits, not 4"):
        at_width(layers, 4, HERE)


def test_a_scale_that_is_too_large_names_its_layer() -> None:
    stored = LayerInfo(format="mxint8", nested=4)
    wanted = at_width({"a": stored}, 4, HERE)["a"]
    from ptq.numerics.formats import MXINT8

    scales = Scales(torch.full((2, 1), 252, dtype=torch.uint8), torch.ones(()), MXINT8)
    tensors = {
        "weight_packed": pack(torch.ones(2, 32, dtype=torch.uint8), MXINT8),
        "weight_scale": scales.bits,
    }
    with pytest.raises(ValueError, match="a: its scales are so large"):
        converted(tensors, stored, wanted, "a")
    tensors["weight_scale"] = scales.bits - 100
    left = converted(tensors, stored, wanted, "a")
    assert left["weight_packed"].shape == (2, 16) and int(left["weight_scale"][0, 0]) == 156
