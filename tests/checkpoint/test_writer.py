"""CheckpointWriter: complete or absent, and continued where it stopped."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ptq.checkpoint.checksums import SUMS, read_sums
from ptq.checkpoint.companions import companion_files
from ptq.checkpoint.layer_report import LayerReport
from ptq.checkpoint.reader import INDEX, REPORT, Checkpoint, to_disk
from ptq.checkpoint.safetensors_files import sha256
from ptq.checkpoint.writer import CheckpointWriter
from ptq.numerics.formats import FORMATS
from ptq.numerics.rotation import Rotation
from ptq.numerics.rtn import rtn
from ptq.numerics.scales import Grid
from ptq.runtime.quant_linear import QuantLinear

BLOCKS = [f"model.layers.{i}" for i in (0, 1, 2, 10)]
CALIBRATION = {"sha256": "c0ffee", "samples": 4}


def report(name: str, fmt: str) -> LayerReport:
    return LayerReport(
        name=name,
        out_features=16,
        in_features=32,
        format=fmt,
        rotation=1,
        algorithm="rtn",
        damping=0.0,
        error=0.25,
        held_out_error=None,
        rtn_error=0.25,
        input_error=None,
        tokens=7,
        topped_up=False,
        seconds=0.0,
    )


def block(name: str, fmt: str = "nvfp4"):
    """(tensors on disk, layers, reports) of a block with two random layers and a norm."""
    record, generator = FORMATS[fmt], torch.Generator().manual_seed(BLOCKS.index(name))
    weights = {
        leaf: torch.randn(16, 32, generator=generator) for leaf in ("mlp.gate_proj", "mlp.up_proj")
    }
    t = record.global_scale(torch.stack(list(weights.values())).abs().amax())
    tensors, layers = {f"{name}.norm.weight": torch.ones(32, dtype=torch.bfloat16)}, {}
    for leaf, weight in weights.items():
        layer = QuantLinear.from_quantized(
            rtn(weight, torch.eye(32), Grid(record, t, "absmax")),
            Rotation(1),
            None,
            quantize_inputs=False,
            input_global_scale=None,
        )
        layers[f"{name}.{leaf}"] = layer.info
        tensors |= {f"{name}.{leaf}.{k}": v for k, v in layer.state_dict().items()}
    return to_disk(tensors, layers), layers, [report(n, fmt) for n in layers]


def rest():
    yield "model.embed_tokens.weight", torch.arange(64.0).reshape(2, 32).to(torch.bfloat16)
    yield "lm_head.weight", torch.ones(2, 32, dtype=torch.bfloat16)


def writer(out: Path, **change) -> CheckpointWriter:
    arguments = {
        "source_config": {"model_type": "llama", "dtype": "bfloat16"},
        "recipe": {"format": "nvfp4", "ignore": ()},
        "provenance": {"calibration": CALIBRATION, "source": "some/model"},
        "fingerprint": "f1",
    }
    return CheckpointWriter(out, **(arguments | change))


def run(
    out: Path, *, stop_after: int | None = None, fmt: str = "nvfp4", extra=(), **change
) -> list[str]:
    """Write a checkpoint, or be interrupted after so many blocks; returns the blocks that were
    made."""
    finished = []
    with writer(out, **change) as w:
        for name in BLOCKS:
            if stop_after is not None and len(finished) == stop_after:
                raise KeyboardInterrupt
            if not w.has(name):
                w.add(name, *block(name, fmt))
                finished.append(name)
        w.finish(rest(), extra)
    return finished


def bytes_of(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(out)
    return bytes_of(out)


def test_a_finished_checkpoint_is_a_model_directory(tmp_path):
    out, source = tmp_path / "out", tmp_path / "source"
    source.mkdir()
    for file in (
        "tokenizer.json",
        "generation_config.json",
        "model.safetensors",
        "config.json",
        "chat_template.jinja",
    ):
        (source / file).write_text(file)
    run(out, extra=companion_files(source))
    names = {"model.safetensors", INDEX, "config.json", "README.md", REPORT, SUMS}
    contents = {p.name for p in out.iterdir()}
    assert contents == names | {
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
    }
    assert read_sums(out) == {name: sha256(out / name) for name in contents if name != SUMS}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("out")] == ["out"]
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama" and config["quantization_config"]["ignore"] == [
        "lm_head"
    ]
    assert config["quantization_config"]["ptq"]["recipe"] == {"format": "nvfp4", "ignore": []}
    index = json.loads((out / INDEX).read_text())
    checkpoint = Checkpoint(out)
    assert index["metadata"]["total_size"] == checkpoint.sizes["total"]
    assert index["weight_map"].keys() == checkpoint.entries.keys()
    assert checkpoint.reports == [report for b in BLOCKS for report in block(b)[2]]
    for name, tensor in [*rest(), *((n, t) for b in BLOCKS for n, t in block(b)[0].items())]:
        read = checkpoint.tensor(name)
        assert read.dtype == tensor.dtype and torch.equal(
            read.view(torch.uint8), tensor.view(torch.uint8)
        ), name


def test_equal_runs_give_equal_bytes(tmp_path, whole):
    run(tmp_path / "out")
    assert bytes_of(tmp_path / "out") == whole


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path, whole, stop_after):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(out, stop_after=stop_after)
    assert not out.exists() and not (tmp_path / "out.partial" / "config.json").exists()
    with pytest.raises(FileNotFoundError, match="unfinished"):
        Checkpoint(out)
    assert run(out) == BLOCKS[stop_after:]
    assert bytes_of(out) == whole and not (tmp_path / "out.partial").exists()


def test_a_finished_block_can_be_read_back(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", stop_after=1)
    with writer(tmp_path / "out") as w:
        tensors, layers, _ = block(BLOCKS[0])
        again = w.read(BLOCKS[0])
        assert w.layers(BLOCKS[0]) == layers and again.keys() == tensors.keys()
        assert all(
            torch.equal(again[n].view(torch.uint8), t.view(torch.uint8)) for n, t in tensors.items()
        )


def test_a_finished_block_knows_what_it_was_made_of(tmp_path):
    with pytest.raises(KeyboardInterrupt), writer(tmp_path / "out") as w:
        w.add(BLOCKS[0], *block(BLOCKS[0]), {"up": "1f"})
        raise KeyboardInterrupt
    with writer(tmp_path / "out") as w:
        w.check_weights(BLOCKS[0], {"up": "1f"})
        with pytest.raises(ValueError, match=r"out\.partial is of a different run \(up is not the"):
            w.check_weights(BLOCKS[0], {"up": "2e"})


def test_an_interruption_before_the_first_block_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", stop_after=0)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_writer
class Deadly(dict):
    def __getitem__(self, key):
        if self.reads == 2:
            os.kill(os.getpid(), signal.SIGKILL)  # two tensors are in the file that is being
            written
        self.reads += 1
        return dict.__getitem__(self, key)
with test_writer.writer(Path({out!r})) as w:
    w.add(test_writer.BLOCKS[0], *test_writer.block(test_writer.BLOCKS[0]))
    tensors, layers, reports = test_writer.block(test_writer.BLOCKS[1])
    tensors = Deadly(tensors)
    tensors.reads = 0
    w.add(test_writer.BLOCKS[1], tensors, layers, reports)
"""


def test_a_process_killed_in_the_middle_of_a_file_is_continued(tmp_path, whole, root):
    out = tmp_path / "out"
    code = KILLED.format(tests=str(Path(__file__).parent), out=str(out))
    killed = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    partial = tmp_path / "out.partial"
    assert (partial / f"block-{BLOCKS[1]}.safetensors.tmp").exists() and not out.exists()
    assert run(out) == BLOCKS[1:]
    assert bytes_of(out) == whole


@pytest.mark.parametrize(
    "during", ["shards.merge_tensors", "writer.model_card", "writer.write_json"]
)
def test_a_run_that_dies_while_it_finishes_is_continued(tmp_path, whole, during, monkeypatch):
    out = tmp_path / "out"

    def die(*_):
        raise KeyboardInterrupt

    module, _, function = during.rpartition(".")
    original: Callable = getattr(sys.modules[f"ptq.checkpoint.{module}"], function)
    # write_json also writes the reports: die in the last call of finish, config.json
    dying = (
        die
        if function != "write_json"
        else lambda p, d: die() if p.name == "config.json" else original(p, d)
    )
    monkeypatch.setattr(f"ptq.checkpoint.{during}", dying)
    with pytest.raises(KeyboardInterrupt):
        run(out)
    assert not out.exists()
    monkeypatch.undo()
    assert run(out) == []
    assert bytes_of(out) == whole


@pytest.mark.parametrize(
    "damage", [lambda p: p.write_bytes(p.read_bytes()[:-1]), lambda p: p.unlink(), None]
)
def test_a_damaged_block_is_made_again(tmp_path, whole, damage):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(out, stop_after=3)
    file = tmp_path / "out.partial" / f"block-{BLOCKS[1]}.safetensors"
    if damage:
        damage(file)
    else:  # a flipped bit, which no header shows
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
    assert run(out) == [BLOCKS[1], BLOCKS[3]]
    assert bytes_of(out) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"recipe": {"format": "mxfp4", "ignore": ()}},
            r"recipe\.format was 'nvfp4' and is 'mxfp4'",
        ),
        ({"fingerprint": "f2"}, "source was 'f1' and is 'f2'"),
        ({"weights": {"lm_head.weight": "2e"}}, r"lm_head\.weight is not the weight that it was"),
        (
            {"provenance": {"calibration": CALIBRATION, "torch": "3.0"}},
            r"versions\.torch was None and is '3\.0'",
        ),
        (
            {"provenance": {"calibration": CALIBRATION | {"sha256": "x"}}},
            r"calibration\.sha256 was 'c0ffee' and is 'x'",
        ),
    ],
)
def test_a_different_run_is_not_continued(tmp_path, change, message):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", stop_after=1)
    before = bytes_of(tmp_path / "out.partial")
    with pytest.raises(ValueError, match=message) as caught:
        run(tmp_path / "out", **change)
    assert "delete" in str(caught.value) and "\n" not in str(caught.value)
    assert bytes_of(tmp_path / "out.partial") == before


def test_damaged_progress_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", stop_after=1)
    (tmp_path / "out.partial" / "progress.json").write_text("{")
    with pytest.raises(ValueError, match="damaged: delete"):
        run(tmp_path / "out")


def test_existing_results_are_kept_unless_told_otherwise(tmp_path, whole):
    out = tmp_path / "out"
    out.mkdir()
    run(out)  # an empty directory is no result
    (out / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(out)
    with pytest.raises(KeyboardInterrupt):
        run(out, overwrite=True, stop_after=2)
    assert (out / "mine.txt").exists()  # the old one stays until the new one is complete
    assert run(out, overwrite=True) == BLOCKS[2:]
    assert bytes_of(out) == whole and [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        run(tmp_path / "file", overwrite=True)


def test_a_death_between_the_two_renames_loses_nothing(tmp_path, whole, monkeypatch):
    out = tmp_path / "out"
    run(out)
    rename = os.rename

    def die(path, target):
        if Path(path).name == "finished":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(os, "rename", die)
    with pytest.raises(KeyboardInterrupt):
        run(out, overwrite=True)
    monkeypatch.undo()
    assert not out.exists()
    assert run(out, overwrite=True) == []
    assert bytes_of(out) == whole and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("at", [0, 5, 9, 12])
def test_a_full_device_is_one_line_and_no_checkpoint(tmp_path, whole, at, monkeypatch):
    out, count, fsync = tmp_path / "out", iter(range(1000)), os.fsync

    def full(descriptor):
        if next(count) >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left") as caught:
        run(out)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert not out.exists() and not list(tmp_path.glob("*/config.json"))
    run(out)
    assert bytes_of(out) == whole


def test_a_layer_that_no_reader_would_take_is_not_written(tmp_path):
    tensors, layers, reports = block(BLOCKS[0])
    name = f"{BLOCKS[0]}.mlp.up_proj.weight_global_scale"
    with writer(tmp_path / "out") as w:
        with pytest.raises(ValueError, match=f"{name} is inf"):
            w.add(BLOCKS[0], tensors | {name: torch.tensor([float("inf")])}, layers, reports)
        assert not w.has(BLOCKS[0])
    assert list(tmp_path.iterdir()) == []


def test_two_processes_do_not_write_the_same_checkpoint(tmp_path):
    with writer(tmp_path / "out") as first:
        first.add(BLOCKS[0], *block(BLOCKS[0]))
        with pytest.raises(ValueError, match="another process"), writer(tmp_path / "out"):
            pass
        assert first.has(BLOCKS[0]) and (tmp_path / "out.partial").is_dir()


def test_another_process_may_read_what_is_finished(tmp_path):
    with writer(tmp_path / "out") as first:
        first.add(BLOCKS[0], *block(BLOCKS[0]))
        second = writer(tmp_path / "out")
        assert [n for n in BLOCKS if second.has(n)] == BLOCKS[:1] and second.layers(
            BLOCKS[0]
        ) == block(BLOCKS[0])[1]
        assert second.read(BLOCKS[0]).keys() == first.read(BLOCKS[0]).keys()
        with pytest.raises(AssertionError, match="inside the context"):
            second.add(BLOCKS[1], *block(BLOCKS[1]))


def test_shards_are_limited_and_named_as_the_hub_does(tmp_path, whole):
    out = tmp_path / "out"
    size = sum(t.numel() * t.element_size() for t in block(BLOCKS[0])[0].values())
    run(out, shard_bytes=2 * size)
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    weight_map = json.loads((out / INDEX).read_text())["weight_map"]
    assert {weight_map[n] for b in BLOCKS[:2] for n in block(b)[0]} == {files[0]}
    assert {weight_map[n] for b in BLOCKS[2:] for n in block(b)[0]} == {files[1]}  # 10 after 2
    one = tmp_path / "one"
    run(one)
    assert all(
        torch.equal(
            Checkpoint(out).tensor(n).view(torch.uint8), Checkpoint(one).tensor(n).view(torch.uint8)
        )
        for n in Checkpoint(one).names()
    )


def test_the_dialect_may_change_until_the_end(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", stop_after=1, fmt="nvint4", dialect="compressed-tensors")
    run(tmp_path / "out", fmt="nvint4", dialect="ptq")
    assert Checkpoint(tmp_path / "out").dialect == "ptq"


def test_nvint4_is_written_as_int4_and_read_as_the_same_numbers(tmp_path):
    run(tmp_path / "ct", fmt="nvint4", dialect="compressed-tensors")
    run(tmp_path / "ours", fmt="nvint4", dialect="ptq")
    ct, ours = Checkpoint(tmp_path / "ct"), Checkpoint(tmp_path / "ours")
    assert ct.dialect == "compressed-tensors" and ct.layers == ours.layers
    assert ct.tensor(f"{BLOCKS[0]}.mlp.up_proj.weight_packed").dtype == torch.int32
    for name in ours.layer_names():
        steps = []
        for layer in (ct.layer(name), ours.layer(name)):
            scale = FORMATS["nvint4"].decode_scale(layer["weight_scale"])
            steps.append((layer["weight_packed"], scale * layer["weight_global_scale"]))
        assert torch.equal(steps[0][0], steps[1][0]) and torch.equal(steps[0][1], steps[1][1])


def test_a_dialect_that_cannot_carry_the_result_is_refused_at_the_end_too(tmp_path):
    with pytest.raises(
        ValueError, match="cannot write compressed-tensors: it has no format for mxint6"
    ):
        run(tmp_path / "out", fmt="mxint6", dialect="compressed-tensors")
    assert not (tmp_path / "out").exists()
    assert run(tmp_path / "out", fmt="mxint6", dialect="auto") == []  # and nothing was lost
