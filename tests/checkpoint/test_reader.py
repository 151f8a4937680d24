"""The on-disk schema and its reader."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptq.checkpoint.quantization_config import LayerInfo
from ptq.checkpoint.reader import INDEX, REPORT, SINGLE, Checkpoint, from_disk, to_disk
from ptq.checkpoint.safetensors_files import write_tensors
from ptq.numerics.formats import FORMATS
from ptq.numerics.rotation import Rotation
from ptq.numerics.rtn import rtn
from ptq.numerics.scales import Grid
from ptq.numerics.tensor import QuantizedTensor, Scales
from ptq.runtime.quant_linear import QuantLinear

LAYER = "model.layers.0.mlp.down_proj"
# every code of the element, in the order in which it is stored
CODES = {
    "nvfp4": [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6],
    "nvint4": [0, 1, 2, 3, 4, 5, 6, 7, -7, -6, -5, -4, -3, -2, -1, 0],
}


def state(fmt, *, inputs=True, bias=True, seed=0):
    """(tensors in memory form, description) of a layer of random numbers."""
    fmt, generator = FORMATS[fmt], torch.Generator().manual_seed(seed)
    columns = max(64, fmt.size(64))
    weight = torch.randn(8, columns, generator=generator)
    grid = Grid(fmt, fmt.global_scale(weight.abs().amax(), 1.5), "absmax")
    layer = QuantLinear.from_quantized(
        rtn(weight, torch.eye(columns), grid),
        Rotation(16),
        torch.randn(8, generator=generator).to(torch.bfloat16) if bias else None,
        quantize_inputs=inputs,
        input_global_scale=fmt.global_scale(torch.rand((), generator=generator) * 9, 2.0)
        if inputs
        else None,
    )
    return {f"{LAYER}.{k}": v for k, v in layer.state_dict().items()}, layer.info


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("inputs", [True, False])
def test_memory_to_disk_to_memory_changes_no_bit(fmt, inputs, tmp_path):
    for seed in range(20):
        tensors, info = state(fmt, inputs=inputs, seed=seed)
        tensors["model.norm.weight"] = torch.ones(3)
        write_tensors(tmp_path / "x.safetensors", to_disk(tensors, {LAYER: info}))
        again = from_disk(load_file(tmp_path / "x.safetensors"), {LAYER: info})
        assert again.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert again[name].dtype == tensor.dtype and again[name].shape == tensor.shape
            assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize(
    ("fmt", "dtype", "global_scale"),
    [
        ("nvfp4", torch.float8_e4m3fn, True),
        ("nvint4", torch.float8_e4m3fn, True),
        ("mxfp4", torch.uint8, False),
    ],
)
def test_types_and_shapes_on_disk(fmt, dtype, global_scale):
    tensors, info = state(fmt)
    stored = {k.removeprefix(f"{LAYER}."): v for k, v in to_disk(tensors, {LAYER: info}).items()}
    group = FORMATS[fmt].group_size
    expected = {
        "weight_packed": (torch.uint8, (8, 32)),
        "weight_scale": (dtype, (8, 64 // group)),
        "bias": (torch.bfloat16, (8,)),
    }
    if global_scale:
        expected |= dict.fromkeys(
            ("weight_global_scale", "input_global_scale"), (torch.float32, (1,))
        )
    assert {k: (v.dtype, tuple(v.shape)) for k, v in stored.items()} == expected


@pytest.mark.parametrize(
    ("fmt", "packed"), [("nvfp4", "1032547690badcfe"), ("nvint4", "10325476a9cbed0f")]
)
def test_the_bytes_of_a_tiny_layer(fmt, packed, tmp_path):
    record, numbers = FORMATS[fmt], CODES[fmt]
    codes = record.element.encode(torch.tensor([numbers]).float())
    scales = Scales(
        torch.tensor([[0x3C]], dtype=torch.uint8), torch.tensor(0.25), record
    )  # E4M3: 1.5
    layer = QuantLinear.from_quantized(
        QuantizedTensor(codes, scales),
        Rotation(1),
        None,
        quantize_inputs=True,
        input_global_scale=torch.tensor(0.5),
    )
    tensors = {f"l.{k}": v for k, v in layer.state_dict().items()}
    write_tensors(tmp_path / "x.safetensors", to_disk(tensors, {"l": layer.info}))
    raw = (tmp_path / "x.safetensors").read_bytes()
    head = int.from_bytes(raw[:8], "little")
    assert json.loads(raw[8 : 8 + head]) == {
        "__metadata__": {"format": "pt"},
        "l.input_global_scale": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "l.weight_global_scale": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        "l.weight_scale": {"dtype": "F8_E4M3", "shape": [1, 1], "data_offsets": [8, 9]},
        "l.weight_packed": {"dtype": "U8", "shape": [1, 8], "data_offsets": [9, 17]},
    }
    # divisors 1/0.5 = 2 and 1/0.25 = 4 in float32, the scale byte, the codes with the even column
    # in the low nibble
    assert raw[8 + head :].hex() == "00000040" + "00008040" + "3c" + packed
    assert layer.quantized_weight().dequantize().tolist() == [
        [(n or 0.0) * 1.5 * 0.25 for n in numbers]
    ]


def test_a_global_scale_that_would_not_survive_is_never_written():
    tensors, info = state("nvfp4")
    t = torch.linspace(1.0, 2.0, 999)
    worst = t[1 / (1 / t) != t][0]
    with pytest.raises(AssertionError, match="two reciprocals"):
        to_disk(tensors | {f"{LAYER}.weight_global_scale": worst}, {LAYER: info})


@pytest.mark.parametrize(("fmt", "byte"), [("mxfp4", 255), ("nvfp4", 0x7F), ("nvfp4", 0xFF)])
def test_scale_bytes_that_stand_for_nan_are_refused_by_name(fmt, byte):
    tensors, info = state(fmt)
    tensors[f"{LAYER}.weight_scale"][3, 1] = byte
    with pytest.raises(ValueError, match=rf"{LAYER}\.weight_scale holds NaN"):
        from_disk(to_disk(tensors, {LAYER: info}), {LAYER: info})


@pytest.mark.parametrize(
    "leaf", ["weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"]
)
def test_a_missing_tensor_or_a_wrong_type_is_refused_by_name(leaf):
    tensors, info = state("nvfp4")
    stored = to_disk(tensors, {LAYER: info})
    wrong = stored | {f"{LAYER}.{leaf}": torch.zeros(1, dtype=torch.int64)}
    with pytest.raises(ValueError, match=rf"{LAYER}\.{leaf} is torch.int64"):
        from_disk(wrong, {LAYER: info})
    del stored[f"{LAYER}.{leaf}"]
    with pytest.raises(ValueError, match=rf"{LAYER}\.{leaf} is missing"):
        from_disk(stored, {LAYER: info})


# ---------------------------------------------------------------- reading a directory


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A hand-written checkpoint of one layer in two files."""
    path = tmp_path_factory.mktemp("written")
    tensors, info = state("nvfp4", inputs=False)
    stored = to_disk(tensors, {LAYER: info})
    files = {
        "model-00001-of-00002.safetensors": stored,
        "model-00002-of-00002.safetensors": {"model.norm.weight": torch.ones(8)},
    }
    for file, content in files.items():
        save_file(content, path / file, metadata={"format": "pt"})
    (path / INDEX).write_text(
        json.dumps({"weight_map": {n: f for f, c in files.items() for n in c}})
    )
    quantization = {
        "quant_method": "ptq",
        "version": 1,
        "format": "nvfp4",
        "hadamard": 16,
        "ignore": ["lm_head"],
    }
    quantization |= {"recipe": {"format": "nvfp4"}}
    (path / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization_config": quantization})
    )
    return path


@pytest.fixture
def copied(written, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / "copy")


def edit(path: Path, **quantization) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= quantization
    (path / "config.json").write_text(json.dumps(config))


def test_a_checkpoint_tells_what_it_holds(written):
    tensors, info = state("nvfp4", inputs=False)
    checkpoint = Checkpoint(written)
    assert (
        checkpoint.dialect == "ptq"
        and checkpoint.recipe == {"format": "nvfp4"}
        and checkpoint.reports == []
    )
    assert checkpoint.layer_names() == [LAYER] and checkpoint.layers == {LAYER: info}
    assert checkpoint.layers[LAYER] == LayerInfo(format="nvfp4", rotation=16, bias=True)
    assert checkpoint.other_names() == ["model.norm.weight"]
    assert checkpoint.names() == sorted([*tensors, "model.norm.weight"])
    layer = checkpoint.layer(LAYER)
    assert all(torch.equal(layer[k.removeprefix(f"{LAYER}.")], v) for k, v in tensors.items())
    packed, scales = 8 * 32, 8 * 4
    assert checkpoint.sizes == {
        "total": packed + scales + 4 + 16 + 32,
        "quantized": packed + scales + 4 + 16,
        "weights": 512,
    }
    with pytest.raises(ValueError, match=r"no tensor model\.other"):
        checkpoint.tensor("model.other")


def test_one_file_without_index_is_a_checkpoint_too(copied):
    tensors = {}
    for file in sorted(copied.glob("model-*")):
        tensors |= load_file(file)
        file.unlink()
    (copied / INDEX).unlink()
    save_file(tensors, copied / SINGLE)
    assert Checkpoint(copied).layer_names() == [LAYER]


def test_what_is_no_directory_of_ours_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Checkpoint(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not quantized"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    with pytest.raises(ValueError, match="quantized by 'awq'"):
        Checkpoint(tmp_path)


def test_an_unfinished_checkpoint_says_how_to_go_on(tmp_path):
    (tmp_path / "out.partial").mkdir()
    for name in ("out", "out.partial"):
        with pytest.raises(FileNotFoundError, match=r"out\.partial is unfinished: run the same"):
            Checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"version": 9}, "version 9"), ({"format": "fp3"}, "'fp3'"), ({"surprise": 1}, "surprise")],
)
def test_what_this_version_does_not_know_is_refused_with_the_path(copied, change, message):
    edit(copied, **change)
    with pytest.raises(ValueError, match=message) as caught:
        Checkpoint(copied)
    assert str(caught.value).startswith(str(copied))


def test_incomplete_copies_are_refused_by_file(copied):
    first, second = sorted(copied.glob("model-*"))
    whole = first.read_bytes()
    first.write_bytes(whole[:-1])
    with pytest.raises(
        ValueError, match=rf"{first.name} is truncated.* has {len(whole) - 1} bytes"
    ):
        Checkpoint(copied)
    first.write_bytes(whole)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=f"{second.name} is missing"):
        Checkpoint(copied)
    save_file({"x": torch.ones(1)}, second)
    with pytest.raises(ValueError, match=r"lacks the tensor model\.norm\.weight"):
        Checkpoint(copied)
    (copied / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match="has neither"):
        Checkpoint(copied)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"is not JSON"),
        ("{}", "has no 'layers'"),
        ('{"layers": [{"layer": "q"}]}', r"has no 'layers\[0\].out'"),
    ],
)
def test_a_report_that_is_not_ours_is_refused_by_file_and_key(copied, text, message):
    (copied / REPORT).write_text(text)
    checkpoint = Checkpoint(copied)  # loads: nothing but what shows reports reads them
    with pytest.raises(ValueError, match=message) as caught:
        _ = checkpoint.reports
    assert str(caught.value).startswith(str(copied / REPORT)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"x": []}}']
)
def test_a_damaged_index_is_refused(copied, text):
    (copied / INDEX).write_text(text)
    with pytest.raises(ValueError, match="index"):
        Checkpoint(copied)


@pytest.mark.parametrize("file", ["../written.safetensors", "/dev/zero", "", 7])
def test_an_index_does_not_lead_out_of_the_directory(copied, file):
    (copied / INDEX).write_text(json.dumps({"weight_map": {"x": file}}))
    with pytest.raises(ValueError, match=r"weight_map\.x is .*, it should be a (file of|valid)"):
        Checkpoint(copied)
