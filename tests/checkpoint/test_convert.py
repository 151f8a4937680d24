"""A conversion is the checkpoint that would have been written at once, or is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import ptq
from ptq.checkpoint import convert as module
from ptq.checkpoint.convert import convert
from ptq.checkpoint.reader import Checkpoint
from ptq.numerics.formats import FORMATS
from ptq.pipeline.recipe import Recipe
from ptq.runtime.verify import verify

CASES = [
    ("llama", "nvfp4", "w4a16", 1),
    ("qwen2", "nvint4", "w4a16", 1),
    ("llama_tied", "mxfp4", "w4a16", 32),
    ("llama", "nvfp4", "w4a4", 16),
    ("qwen3_moe", "mxfp4", "w4a4", 1),
    ("llama", "int4-g32", "w4a16", 1),
    ("llama", "mxint4", "w4a16", 1),
]


def step(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """What a code of 1 stands for, by group."""
    scale = FORMATS[name].decode_scale(tensors["weight_scale"])
    return scale * tensors.get("weight_global_scale", torch.ones(()))


def assert_same(one: Path, other: Path) -> None:
    """All but where they say that they come from."""
    a, b = Checkpoint(one), Checkpoint(other)
    assert a.dialect == b.dialect and a.names() == b.names() and a.layers == b.layers
    for name in a.names():
        x, y = a.tensor(name), b.tensor(name)
        if name.endswith((".weight_scale", ".weight_global_scale")):
            continue
        assert x.dtype == y.dtype and x.shape == y.shape
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), name
    for layer in a.layers:
        # int4 with folded scales does not say which power of two was taken out of them
        x, y = a.layer(layer), b.layer(layer)
        assert torch.equal(*(step(tensors, a.layers[layer].format) for tensors in (x, y))), layer
    first, second = (
        {k: v for k, v in c.quantization.items() if k not in ("provenance", "ptq")} for c in (a, b)
    )
    assert first == second and a.recipe == b.recipe and a.reports == b.reports


@pytest.mark.parametrize(("kind", "fmt", "scheme", "rotation"), CASES)
def test_it_is_what_would_have_been_written(make_run, tmp_path, kind, fmt, scheme, rotation):
    rules = (("re:.*[qkv]_proj", {"rotation": 1}),) if kind == "qwen2" else ()
    for dialect in ("ptq", "compressed-tensors"):
        make_run(kind, fmt, scheme=scheme, rotation=rotation, rules=rules)(
            tmp_path / dialect, dialect=dialect
        )
    for source, target in (("ptq", "compressed-tensors"), ("compressed-tensors", "ptq")):
        out = tmp_path / f"to-{target}"
        choice = convert(tmp_path / source, out, target)
        assert choice.dialect == target and verify(out).ok
        assert_same(out, tmp_path / target)
        companions = {path.name for path in (tmp_path / target).iterdir()}
        assert {path.name for path in out.iterdir()} == companions
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        provenance = config.get("provenance") or config["ptq"]["provenance"]
        assert provenance["converted"] == f"from {source}"


def test_what_a_dialect_cannot_express_is_refused_and_leaves_nothing(make_run, tmp_path):
    make_run("llama", "nvfp4", rotation=16)(tmp_path / "in", dialect="ptq")
    with pytest.raises(ValueError, match=r"cannot write compressed-tensors: .*weight-only NVFP4"):
        convert(tmp_path / "in", tmp_path / "out", "compressed-tensors")
    assert not (tmp_path / "out").exists()
    assert convert(tmp_path / "in", tmp_path / "out", "auto").dialect == "ptq"
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert(tmp_path / "in", tmp_path / "out", "ptq")
    with pytest.raises(ValueError, match="is the directory of the model"):
        convert(tmp_path / "in", tmp_path / "in", "ptq", overwrite=True)
    with pytest.raises(ValueError, match="not quantized"):
        (tmp_path / "plain").mkdir()
        (tmp_path / "plain" / "config.json").write_text("{}")
        convert(tmp_path / "plain", tmp_path / "other", "ptq")


@pytest.mark.parametrize("dialect", ["compressed-tensors", "modelopt"])
def test_a_quantized_head_is_kept_or_refused(tiny_llama, tmp_path, dialect):
    """Engines would look for a head in 16 bits."""
    recipe = Recipe(format="nvfp4", algorithm="rtn", lm_head=True)
    ptq.quantize(tiny_llama, tmp_path / "in", recipe=recipe, progress=False)
    assert "lm_head" in Checkpoint(tmp_path / "in").layers
    said = f"cannot write {dialect}: engines do not look for a quantized output head; use dialect"
    with pytest.raises(ValueError, match=said):
        convert(tmp_path / "in", tmp_path / "out", dialect)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    assert convert(tmp_path / "in", tmp_path / "out", "auto").dialect == "ptq"
    before, after = (Checkpoint(tmp_path / name) for name in ("in", "out"))
    assert before.layers == after.layers and before.names() == after.names()
    for name in before.names():
        x, y = (found.tensor(name).view(torch.uint8) for found in (before, after))
        assert torch.equal(x, y), name


def test_an_interrupted_conversion_goes_on(make_run, tmp_path, monkeypatch):
    make_run("llama", "mxfp4")(tmp_path / "in", dialect="ptq")
    convert(tmp_path / "in", tmp_path / "whole", "compressed-tensors")

    def stops(found):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_others", stops)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "in", tmp_path / "out", "compressed-tensors")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    read = []
    original = Checkpoint.stored_layer
    monkeypatch.setattr(
        Checkpoint, "stored_layer", lambda self, name: read.append(name) or original(self, name)
    )
    convert(tmp_path / "in", tmp_path / "out", "compressed-tensors")
    assert read == [], "finished blocks are not read again"
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_what_is_not_read_is_not_lost_in_silence(tmp_path):
    golden = Path(__file__).parents[1] / "golden" / "peers" / "modelopt-nvfp4"
    shutil.copytree(golden, tmp_path / "in")
    config = json.loads((golden / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 4, "type": "float"}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"cannot convert .*keys and values in .*would be lost"):
        convert(tmp_path / "in", tmp_path / "out", "compressed-tensors")
    assert not (tmp_path / "out").exists()
