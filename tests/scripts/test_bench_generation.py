"""The benchmark of generation: models of the published sizes, rows that say what they claim, errors
in one line."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def script(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "bench_generation", root / "scripts" / "bench_generation.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple]:
    """``run(*options) -> (exit code, stdout, stderr)``."""

    def call(*options: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bench_generation.py", *map(str, options)])
        code = script.main()
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-3.2-1b", 1_235_814_400), ("llama-3.1-8b", 8_030_261_248), ("qwen3-8b", 8_190_735_360)],
)
def test_models_have_the_published_sizes(script: ModuleType, name: str, parameters: int) -> None:
    config = script.AutoConfig.for_model(**script.MODELS[name])
    model = script.random_model(config, torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_rows_on_a_cpu(run: Callable[..., tuple], tmp_path: Path) -> None:
    out = tmp_path / "runs.jsonl"
    code, told, _ = run("--device", "cpu", "--small", "--tokens", 2, "--repeats", 1, "--out", out)
    assert code == 0 and "this times the reference path" in told
    rows = {row["weights"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == ["bf16", "nvfp4", "mxfp4", "nvint4"]
    assert [row["rotation"] for row in rows.values()] == [1, 1, 32, 16]
    for name, bits in (("nvfp4", 4.5), ("mxfp4", 4.25), ("nvint4", 4.5)):
        row, bf16 = rows[name], rows["bf16"]
        head = 2 * 256 * 1024
        scalars = 0 if name == "mxfp4" else 4 * row["layers"]
        assert row["linear_bytes"] - head - scalars == (bf16["linear_bytes"] - head) * bits / 16
        assert row["times_bf16"] == pytest.approx(bf16["ms_per_token"] / row["ms_per_token"])
        assert row["layers"] == 14 and row["layers_in_kernels"] == 0
        assert f"| {name} | 0 of 14 | static | {row['tokens_per_second']:.1f} |" in told


def test_a_checkpoint_is_compared_with_its_own_shape(
    run: Callable[..., tuple], make_run, tmp_path: Path
) -> None:
    make_run("llama", "nvfp4")(tmp_path / "checkpoint")
    out, options = tmp_path / "runs.jsonl", ("--device", "cpu", "--tokens", 2, "--repeats", 1)
    assert run(*options, "--checkpoint", tmp_path / "checkpoint", "--out", out)[0] == 0
    bf16, packed = map(json.loads, out.read_text().splitlines())
    assert (bf16["weights"], packed["weights"], packed["layers"]) == ("bf16", "checkpoint", 14)
    assert packed["linear_bytes"] < bf16["linear_bytes"]


def test_mistakes_are_told_in_one_line(run: Callable[..., tuple], tmp_path: Path) -> None:
    cases = [
        (("--device", "cpu", "--checkpoint", tmp_path), "config.json"),
        (("--device", "gpu"), "use cpu, cuda"),
    ]
    if not torch.cuda.is_available():
        cases.append(((), "sees no CUDA device here; use --device cpu"))
    for options, message in cases:
        code, _, told = run(*options)
        assert (
            code == 2 and message in told and told.startswith("error: ") and told.count("\n") == 1
        )
