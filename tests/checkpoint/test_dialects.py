"""The table of dialects: what a new row has to bring, and nothing else has to change."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ptq.checkpoint import dialect_choice
from ptq.checkpoint.dialect import Conversion, Dialect, Layers, Tensors
from ptq.checkpoint.dialect_ptq import guard_tensors, parse_ptq, ptq_config
from ptq.checkpoint.dialects import DIALECTS, READ, dialect_of, parse
from ptq.checkpoint.engines import ENGINES, Opening, Verdict
from ptq.checkpoint.quantization_config import JsonDict, LayerInfo, Quantization, summarize
from ptq.checkpoint.reader import Checkpoint
from ptq.runtime.inspect import inspect
from ptq.runtime.load import load

LAYERS = {"model.layers.0.mlp.down_proj": LayerInfo(format="nvfp4")}
SUMMARY = summarize(LAYERS, ["lm_head"], recipe={"r": 1}, provenance={"p": 1})


@pytest.mark.parametrize("name", DIALECTS)
def test_a_dialect_reads_the_configuration_that_it_writes(name: str) -> None:
    written = json.loads(json.dumps(DIALECTS[name].config(SUMMARY, LAYERS, ["lm_head"])))
    assert written["quant_method"] == name and dialect_of(written) is DIALECTS[name]
    again = parse(written)
    assert {layer: again.layer(layer, bias=False) for layer in LAYERS} == LAYERS
    assert (again.recipe, again.provenance, again.ignore) == ({"r": 1}, {"p": 1}, ("lm_head",))


def test_errors_say_where_and_what_is_read_instead() -> None:
    with pytest.raises(ValueError, match=r"^here is quantized by 'awq'; ptq reads .*ptq, mxfp4$"):
        parse({"quant_method": "awq"}, "here")
    with pytest.raises(ValueError, match=r"^here: .*version 9"):
        parse({"quant_method": "ptq", "version": 9}, "here")


# ---------------------------------------------------------------- a dialect that nobody else knows


def _rename(old: str, new: str, tensors: Tensors) -> dict[str, Tensor]:
    return {new if leaf == old else leaf: tensor for leaf, tensor in tensors.items()}


def _config(quantization: Quantization, layers: Layers, others: Iterable[str]) -> JsonDict:
    return {"quant_method": "toy", "said": ptq_config(quantization, layers, others)}


def _parse(config: Mapping[str, object]) -> Quantization:
    assert isinstance(config["said"], dict)
    return parse_ptq(config["said"])


TOY = Dialect(
    name="toy",
    config=_config,
    parse=_parse,
    refusal=lambda export: "toys do not rotate" if _rotated(export.layers) else None,
    opens=lambda layers: {
        **dict.fromkeys(ENGINES, Opening(Verdict.STOPS)),
        "transformers": Opening(Verdict.IMPORT),
    },
    caveats=lambda layers: ["**nobody**: an error."],
    why_import=lambda layers: "or nothing happens",
    conversion=lambda info: Conversion(
        types={"qweight": (torch.uint8,)},
        packed="qweight",
        write=lambda tensors: _rename("weight_packed", "qweight", tensors),
        read=lambda tensors: _rename("qweight", "weight_packed", tensors),
    ),
    extra_tensors=lambda layers: {"toy.table": torch.arange(4)},
    is_extra=lambda name: name == "toy.table",
    extra_files=lambda config: {"toy.json": {"method": config["quant_method"]}},
)


def _rotated(layers: Layers) -> bool:
    return any(info.rotation > 1 for info in layers.values())


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row."""
    monkeypatch.setitem(DIALECTS, TOY.name, TOY)
    monkeypatch.setitem(READ, TOY.name, TOY)
    monkeypatch.setattr(dialect_choice, "CHOICES", ("auto", *DIALECTS))


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("fmt", ["nvfp4", "mxint6"])
def test_a_row_is_enough_to_write_read_run_and_describe(make_run, tmp_path, token_ids, fmt) -> None:
    ours, theirs = tmp_path / "ptq", tmp_path / "toy"
    make_run("llama", fmt)(ours, dialect="ptq")
    model = make_run("llama", fmt)(theirs, dialect="toy")
    a, b = Checkpoint(ours), Checkpoint(theirs)
    assert b.dialect == "toy" and a.layers == b.layers and a.sizes["weights"] == b.sizes["weights"]
    stored = set(a.names()) - set(guard_tensors(a.layers))
    assert set(b.names()) == {n.replace("weight_packed", "qweight") for n in stored} | {"toy.table"}
    assert a.other_names() == b.other_names() and a.recipe == b.recipe
    for name in a.layer_names():
        one, other = a.layer(name), b.layer(name)
        assert one.keys() == other.keys() and a.shape(name) == b.shape(name)
        assert all(torch.equal(one[leaf], other[leaf]) for leaf in one), name
    assert json.loads((theirs / "toy.json").read_text()) == {"method": "toy"}
    card = (theirs / "README.md").read_text()
    assert "**nobody**: an error." in card and "import ptq  # or nothing happens" in card
    rows = [inspect(path).layers for path in (ours, theirs)]
    assert rows[0] == rows[1]
    with torch.no_grad():
        assert torch.equal(load(theirs)(token_ids).logits, model(token_ids).logits)


@pytest.mark.usefixtures("toy")
def test_a_row_is_offered_and_may_refuse(make_run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"choose one of auto, .*toy$"):
        make_run("llama")(tmp_path / "out", dialect="gguf")
    with pytest.raises(ValueError, match="cannot write toy: toys do not rotate"):
        make_run("llama", rotation=16)(tmp_path / "rotated", dialect="toy")


@pytest.mark.usefixtures("toy")
def test_a_tensor_that_a_conversion_needs_is_missed_by_name(make_run, tmp_path: Path) -> None:
    make_run("llama")(tmp_path / "out", dialect="toy")
    checkpoint = Checkpoint(tmp_path / "out")
    name = checkpoint.layer_names()[0]
    assert checkpoint.layers[name].format == "nvfp4"
    del checkpoint.entries[f"{name}.qweight"]
    with pytest.raises(ValueError, match=rf"{name}.qweight is missing"):
        checkpoint.layer(name)
