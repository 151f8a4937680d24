"""``ptq bench``: what it prints and writes, on a machine without a GPU; one test needs one."""

import json
import logging
import os
import re
import sys
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ptq.bench import tile_timing, tune
from ptq.bench.measurement import Measurement, read
from ptq.cli import commands as cli
from ptq.kernels import gpu, tiles

Run = Callable[..., tuple[int, str, str]]
needs_no_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="what happens on a machine without a GPU"
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """``bench("--predict", "h200", …)``: exit code, stdout, stderr."""
    environment, logger = dict(os.environ), logging.getLogger("ptq")
    before = logger.handlers[:], logger.propagate

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ptq", "bench", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code is None or isinstance(end.value.code, int)
        captured = capfd.readouterr()
        return end.value.code or 0, captured.out, captured.err

    yield run
    logger.handlers[:], logger.propagate = before
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The configuration of a quantized model: sizes are all that counts."""
    sizes = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
    }
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "config.json").write_text(
        json.dumps({**sizes, "quantization_config": {"quant_method": "ptq"}})
    )
    return path


def cells(out: str, layer: str, tokens: int, backend: str) -> list[str]:
    """The cells of a row of the printed table, from the backend on."""
    (row,) = [
        line
        for line in out.splitlines()
        if re.match(rf"\s*{layer}\s+{tokens}\s.*\s{re.escape(backend)}\s", line)
    ]
    return re.split(r"\s{2,}", row[row.index(f" {backend} ") :].strip())


# ---------------------------------------------------------------- predictions


def test_a_prediction_says_so_and_shows_every_column(bench: Run):
    code, out, err = bench("--predict", "H200", "--tokens", "1,64", "--format", "nvfp4")
    assert (code, err) == (0, "")
    assert "llama-3.1-8b on H200: predicted from a roofline, not measured" in out
    assert (
        "Predicted, not measured: the roofline of H200, copy 4.30 TB/s, bf16 790 TFLOP/s, fp8 1450"
        in out
    )
    for column in (
        "layer",
        "tokens",
        "format",
        "backend",
        "µs",
        "TB/s",
        "TFLOP/s",
        "of limit",
        "× bf16",
    ):
        assert column in out
    assert cells(out, "gate_up", 1, "w4a16") == [
        "w4a16",
        "15.4",
        "4.30",
        "15.3",
        "100 % copy",
        "3.55",
    ]
    assert cells(out, "gate_up", 64, "w4a16")[4] == "100 % matmul"


def test_the_sum_has_a_row_per_decoder_block(bench: Run):
    _, out, _ = bench(
        "qwen3-8b", "llama-3.1-8b", "--predict", "h200", "--tokens", 1, "-f", "nvfp4", "--sum"
    )
    assert "gate_up" not in out and "qwen3-8b on H200" in out
    assert (
        cells(out[out.index("llama-3.1-8b") :], "block", 1, "w4a16")[1] == "28.6"
    )  # by hand, from bandwidth


def test_json_is_lines_of_measurements_and_nothing_else(bench: Run, tmp_path: Path):
    args = [
        "--predict",
        "b200",
        "--tokens",
        "1",
        "--tokens",
        "8,16",
        "--backend",
        "bf16,w4a4",
        "--json",
    ]
    code, out, err = bench(*args, "--out", tmp_path / "runs.jsonl")
    found = [Measurement.from_dict(json.loads(line)) for line in out.splitlines()]
    assert code == 0 and found == read(tmp_path / "runs.jsonl")
    assert len(found) == 4 * 3 * (1 + 2), "bf16 once, w4a4 for the two formats with such elements"
    assert all(m.predicted and m.device == "B200" for m in found)
    assert [line for line in err.splitlines()] == [f"written: {tmp_path / 'runs.jsonl'}"]
    _, out, err = bench(*args, "--sum", "--quiet")
    assert [json.loads(line)["layer"] for line in out.splitlines()] == ["block"] * 9 and err == ""


def test_the_plot_says_what_is_predicted_and_is_the_same_every_time(bench: Run, tmp_path: Path):
    args = ["--predict", "h200", "--tokens", "1,512", "-f", "nvfp4", "--quiet", "--plot"]
    for name in ("a.svg", "b.svg"):
        assert bench(*args, tmp_path / name)[0] == 0
    svg = (tmp_path / "a.svg").read_text()
    xml.etree.ElementTree.fromstring(svg)
    for text in (
        "predicted from a roofline, not measured",
        "llama-3.1-8b",
        "w4a16 nvfp4 1.00×",
        "3.55×",
    ):
        assert text in svg
    assert svg == (tmp_path / "b.svg").read_text()


def test_the_published_table_is_what_the_command_makes(bench: Run, root: Path, tmp_path: Path):
    """kernels/BENCHMARKS.md names the command; after a change of it, paste what it writes."""
    page = (root / "kernels" / "BENCHMARKS.md").read_text()
    (command,) = re.findall(r"^ptq bench (.*--predict.*)$", page.replace("\\\n", ""), re.MULTILINE)
    args = command.split()
    table, plot = (args.index(option) + 1 for option in ("--markdown", "--plot"))
    shown = root / args[plot]
    args[table], args[plot] = str(tmp_path / "table.md"), str(tmp_path / "plot.svg")
    assert bench(*args, "--quiet")[0] == 0
    assert (tmp_path / "table.md").read_text() in page
    assert f"]({shown.name})" in page
    assert (tmp_path / "plot.svg").read_text() == shown.read_text(), "draw it again"
    args[args.index("h200")] = "h100"
    assert bench(*args, "--quiet")[0] == 0
    other = shown.with_name("predicted-h100.svg")
    assert f"]({other.name})" in page and (tmp_path / "plot.svg").read_text() == other.read_text()


# ---------------------------------------------------------------- measuring without a GPU


@needs_no_gpu
def test_without_a_gpu_small_layers_stand_in_for_large_ones(bench: Run):
    code, out, err = bench("-f", "nvfp4", "--tokens", "2")
    told, *progress = err.splitlines()
    assert (
        code == 0
        and "reference path on the CPU in fp32" in told
        and "instead of those of llama-3.1-8b" in told
    )
    assert "--predict h200" in told and progress[-1].startswith("timing 2/2")
    assert "small layers on CPU" in out and "p20–p80" in out and "predicted" not in out
    name, _, spread, *_, compared = cells(out, "square", 2, "reference")
    assert name == "reference" and re.fullmatch(r"[\d.]+–[\d.]+", spread) and float(compared) > 0
    assert cells(out, "square", 2, "fp32")[-1] == "1.00"


@needs_no_gpu
def test_a_small_model_is_timed_as_it_is(bench: Run, tiny: Path):
    code, out, err = bench(tiny, "--tokens", "1", "-f", "mxfp4", "--json", "--quiet")
    found = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "") and not any(m["predicted"] for m in found)
    assert [(m["layer"], m["backend"], m["shape"]) for m in found[:3]] == [
        ("qkv", "fp32", [1, 128, 64]),
        ("qkv", "reference", [1, 128, 64]),
        ("o", "fp32", [1, 64, 64]),
    ]


# ---------------------------------------------------------------- bad input: one line, exit code 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["no-such-model"],
            "give llama-3.1-8b, llama-3.1-70b, qwen3-8b, qwen3-32b, or a directory",
        ),
        (["/proc"], "/proc has no config.json"),
        (["--tokens", "0"], "--tokens 0: give numbers from 1 to"),
        (["--tokens", "1,many"], "--tokens 'many'"),
        (["--format", "nvfp5"], "choose from mxfp4, nvfp4, nvint4, mxint4"),
        (["--format", "mxint8"], "no kernel for format 'mxint8'"),
        (["--backend", "marlin"], "no backend 'marlin'"),
        (["--backend", "w4a4", "--predict", "h200"], "w4a4 is not predicted for H200"),
        (["--predict", "h1000"], "choose from h100, h200, b200, l40s, rtx4090, rtx5090, a100"),
        (["--predict", "h200", "--device", "cpu"], "--device does not go with --predict"),
        (["--rotation", "24", "--predict", "h200"], "a rotation of 24"),
        (["--predict", "h200", "--out", "/proc/nothing/runs.jsonl"], "/proc/nothing"),
        (["--predict", "h200", "--markdown", "/"], "Is a directory: /"),
        (["--predict", "h200", "--plot", "runs.png"], "ends in .svg"),
        (["--predict", "h200", "--plot", "runs.svg", "--backend", "w4a16"], "time bf16"),
        (["--tune", "--predict", "h200"], "--predict does not go with --tune"),
        (["--tune", "--json"], "--json does not go with --tune"),
        (["--tune", "--tune-seconds", "0"], "--tune-seconds 0: give a number of seconds above 0"),
        (["--tune-seconds", "60"], "give --tune as well"),
    ],
)
def test_bad_input_is_one_line(bench: Run, args: list[str], message: str):
    code, out, err = bench(*args, "--quiet")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith("error: ") and message in err


@needs_no_gpu
def test_tuning_without_a_gpu_is_one_line(bench: Run):
    code, out, err = bench("--tune")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert "--tune needs an NVIDIA GPU" in err


# ---------------------------------------------------------------- tile tables


@pytest.fixture
def pretended_h200(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with a table that nobody timed, and a GPU on which the widest tile with the most
    stages is the fastest."""
    monkeypatch.setattr(tiles, "CONFIGS", tmp_path)
    tune.write(tune.untimed(90))
    tiles.table.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a pretended H200")
    monkeypatch.setattr(gpu, "available", lambda device: True)
    monkeypatch.setattr(gpu, "architecture", lambda device: 90)

    def timer(work, device):
        return lambda tile: 1e-3 if tile.kernel == "dense" else 1e-4 / tile.block_n / tile.stages

    monkeypatch.setattr(tile_timing, "timer", timer)
    return tmp_path


def test_tuning_replaces_the_rows_that_it_timed(bench: Run, pretended_h200: Path):
    before = tiles.table(90)
    code, out, err = bench("--tune", "--tokens", "1,64", "--format", "nvfp4")
    assert (code, out) == (0, "") and "tuning 8/8" in err and "8 rows of" in err
    after = tiles.Table.from_dict(json.loads((pretended_h200 / "sm90.json").read_text()))
    timed = {row for row in after.rows if row.microseconds}
    assert {(r.tile.block_n, r.tile.stages, r.microseconds) for r in timed} == {(256, 7, 0.06)}
    assert {(r.operation, r.format, r.tokens, r.n) for r in timed} == {
        ("w4a16", "nvfp4", tokens, n) for tokens in (1, 64) for n in (6144, 4096, 28672)
    }
    lost = set(before.rows) - set(after.rows)  # the rules of thumb stand on one of the four shapes
    assert {(r.operation, r.format, r.n, r.k) for r in lost} == {
        ("w4a16", "nvfp4", 6144, 4096)
    } and len(lost) == 2
    assert "timed on a pretended H200" in after.source
    assert not list(pretended_h200.glob("*.part"))
    bench("--tune", "--tokens", "1,64", "--format", "nvfp4", "--quiet")
    again = tiles.Table.from_dict(json.loads((pretended_h200 / "sm90.json").read_text()))
    assert replace(again, triton=after.triton) == after, "a second time replaces, and adds nothing"


def test_a_tuning_without_time_goes_on_from_its_log(bench: Run, pretended_h200: Path):
    narrow = ("--tune", "--tokens", "1", "--format", "nvfp4")
    code, _, err = bench(*narrow, "--tune-seconds", "1e-9")
    assert code == 0 and "0 rows of" in err and "4 could go on: call it again" in err
    log = pretended_h200 / "sm90.tuning.jsonl"
    assert len(log.read_text().splitlines()) == 1
    code, _, err = bench(*narrow)
    assert code == 0 and "4 rows of" in err and "go on" not in err
    lines = log.read_text().splitlines()
    assert bench(*narrow, "--quiet")[0] == 0 and log.read_text().splitlines() == lines
    log.write_text(lines[0].replace("a pretended", "another") + "\n")
    code, out, err = bench(*narrow, "--quiet")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and "device another H200" in err


def test_tuning_takes_only_token_counts_of_the_tables(bench: Run, pretended_h200: Path):
    code, _, err = bench("--tune", "--tokens", "3", "--quiet")
    assert code == 2 and "no row for 3 tokens; tune 1, 8, 16" in err


# ---------------------------------------------------------------- around the command


def test_help_names_every_choice(bench: Run):
    code, out, err = bench("--help")
    assert (code, err) == (0, "")
    options = (
        "--tokens --format --backend --rotation --device --predict --sum --out --markdown --plot "
        "--tune --tune-seconds --json"
    )
    assert [option for option in f"{options} --quiet --debug".split() if option not in out] == []


@pytest.mark.gpu
def test_a_gpu_is_measured(bench: Run, tiny: Path):
    code, out, _ = bench(tiny, "--tokens", "1,16", "--json", "--quiet")
    found = [Measurement.from_dict(json.loads(line)) for line in out.splitlines()]
    assert code == 0 and {"bf16", "w4a16", "rotate+w4a16"} <= {m.backend for m in found}
    assert all(m.share is not None and m.bandwidth > 1e11 and not m.predicted for m in found)
