"""The comparison with other tools: what runs and in which order, what it costs, one scorer, and
what is told of it."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ptq.checkpoint.reader import Checkpoint
from ptq.numerics.formats import NVFP4
from ptq.pipeline.recipe import Recipe
from ptq.runtime.evaluate import evaluate
from ptq.runtime.loaded_model import demo_path
from ptq.text.windows import load_tokenizer

NAMES = ("methods", "modelopt_mxfp4", "page", "picture", "run", "score")


@pytest.fixture(scope="module")
def scripts(root: Path):
    """Modules of ``scripts/peers``, and the script as ``main``."""
    sys.path.insert(0, str(root / "scripts"))
    try:
        found = {name: importlib.import_module(f"peers.{name}") for name in NAMES}
        yield {**found, "main": importlib.import_module("compare_peers")}
    finally:
        sys.path.remove(str(root / "scripts"))


@pytest.fixture(scope="module")
def methods(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["methods"]


# ---------------------------------------------------------------- what runs


def everything(methods: ModuleType) -> list[Any]:
    return list(
        methods.runs(tuple(methods.TOOLS), methods.FORMAT_NAMES, methods.SCHEMES, (0, 1, 2))
    )


def test_one_seed_comes_before_others_and_quick_methods_before_slow_ones(methods) -> None:
    runs = everything(methods)
    assert len({run.key for run in runs}) == len(runs)
    ranks = [(run.seed, run.method.late, methods.SCHEMES.index(run.scheme)) for run in runs]
    assert ranks == sorted(ranks)
    assert runs[0].key == "ptq-default-nvfp4-w4a4-0"


def test_what_reads_no_text_runs_for_one_seed(methods) -> None:
    seeds: dict[tuple[str, str, str], set[int]] = {}
    for run in everything(methods):
        if (run.method.tool, run.method.key) == ("ptq", "rtn"):
            seeds.setdefault((run.method.key, run.format, run.scheme), set()).add(run.seed)
    assert seeds == {
        ("rtn", "nvfp4", "w4a4"): {0, 1, 2},  # static scales of inputs
        ("rtn", "nvfp4", "w4a16"): {0},
        ("rtn", "mxfp4", "w4a4"): {0},
        ("rtn", "mxfp4", "w4a16"): {0},
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((["gptqmodel"], ["nvfp4"], ["w4a4"]), "unknown tool 'gptqmodel'"),
        ((["ptq"], ["int4"], ["w4a4"]), "unknown format 'int4'"),
        ((["ptq"], ["nvfp4"], ["w8a8"]), "unknown scheme 'w8a8'"),
    ],
)
def test_unknown_names(methods, given, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(methods.runs(*given, [0]))


def test_every_run_of_ptq_is_a_recipe(methods) -> None:
    runs = [run for run in everything(methods) if run.method.tool == "ptq"]
    assert {run.method.key for run in runs} >= {"default", "rtn", "fast", "paper", "best"}
    for run in runs:
        recipe = Recipe.default(**methods.recipe(run, "text.txt", 32, 512))
        assert (recipe.format, recipe.scheme, recipe.seed) == (run.format, run.scheme, run.seed)
        assert (recipe.samples is None) == run.method.own_text
        if run.method.key in ("rtn", "paper"):
            assert recipe.balance == 0
            assert recipe.rotation == (1 if run.method.key == "rtn" else recipe.fmt.group_size)


def test_every_tool_has_its_driver(methods, root: Path) -> None:
    for tool in methods.TOOLS.values():
        assert not tool.driver or (root / "scripts" / "peers" / tool.driver).is_file()
        assert any(method.tool == tool.name for method in methods.METHODS)


def test_the_last_line_of_what_fails_names_no_folder(methods) -> None:
    said = "Traceback\n  File x\nRuntimeError: /home/me/x/model.py has no GPU\nModel: 0it [00:01]\n"
    assert methods.last_line(said) == "RuntimeError: model.py has no GPU"
    assert methods.last_line("") == "it said nothing"


# ---------------------------------------------------------------- what it costs


def test_time_and_memory_are_those_of_the_process(scripts, tmp_path: Path) -> None:
    mine = bytearray(400_000_000)  # what starts it is larger
    work = (
        "x = bytearray(200_000_000)\nimport time\nwhile time.process_time() < 0.5: pass\nprint(1)"
    )
    run = scripts["run"]
    command = [sys.executable, "-c", work]
    cost = run.measured(command, tmp_path, run.environment("modelopt", 1), tmp_path / "log")
    assert cost.code == 0 and (tmp_path / "log").read_text() == "1\n"
    assert 0.5 <= cost.cpu_seconds < 5 and 0.2 < cost.peak_gb < 0.3 and mine
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    assert run.measured(command, tmp_path, {}, tmp_path / "log").code == 3


def test_other_tools_see_nothing_of_ptq(scripts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    run = scripts["run"]
    assert "PYTHONPATH" not in run.environment("modelopt", 2)
    assert run.environment("modelopt", 2)["OMP_NUM_THREADS"] == "2"
    assert run.environment("ptq", 1)["PYTHONPATH"].endswith("path")


# ---------------------------------------------------------------- the scorer


def test_the_scorer_finds_what_ptq_eval_finds(scripts, tmp_path: Path) -> None:
    score, path = scripts["score"], demo_path()
    text = score.read_text("builtin", load_tokenizer(path), 64, 256)
    assert text.rows.shape == (4, 64) and text.predictions == 4 * 63
    original = score.Original(path, tmp_path, "0" * 64)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    same = score.score(model, original, text)
    assert max(map(abs, same.kl)) < 1e-9 and same.top1 == [1.0] * 4
    assert same.to_dict()["perplexity"] == pytest.approx(original.perplexity(text), rel=1e-6)
    changed = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        changed.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    found = score.score(changed, original, text).to_dict()
    wanted = evaluate(changed, text.rows.reshape(-1), reference=model, seq_len=64)
    assert wanted.kl is not None and wanted.kl > 1e-3
    assert found["kl"] == pytest.approx(wanted.kl, rel=1e-6)
    assert found["perplexity"] == pytest.approx(wanted.perplexity, rel=1e-6)
    assert found["top1"] == pytest.approx(wanted.top1_agreement)


def test_the_error_is_that_of_windows(scripts) -> None:
    score = scripts["score"]
    assert score.standard_error([1.0, 2.0, 3.0, 2.0]) == pytest.approx((2 / 3 / 4) ** 0.5)
    assert score.standard_error([1.0]) is None


def test_mxfp4_of_modelopt_is_renamed_and_nothing_else(scripts, root: Path, tmp_path: Path) -> None:
    """Made of a checkpoint of llm-compressor, which has the same tensors under other names."""
    theirs = root / "tests" / "golden" / "peers" / "llm-compressor-mxfp4"
    config = json.loads((theirs / "config.json").read_text("utf-8"))
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "mxfp4",
        "ignore": ["lm_head"],
    }
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    tensors = load_file(theirs / "model.safetensors")
    named = {name.removesuffix("_packed"): tensor for name, tensor in tensors.items()}
    save_file(named, tmp_path / "out" / "model.safetensors")
    readable = scripts["modelopt_mxfp4"].readable
    found, wanted = Checkpoint(readable(tmp_path / "out")), Checkpoint(theirs)
    assert list(found.layers) == list(wanted.layers) and len(found.layers) == 7
    for name, info in found.layers.items():
        assert (info.format, info.quantize_inputs, info.input_rule) == ("mxfp4", True, "ceil")
        for leaf, tensor in wanted.layer(name).items():
            assert torch.equal(found.layer(name)[leaf], tensor)
    assert readable(theirs) == theirs


@pytest.fixture
def driver(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """That of ModelOpt, without ModelOpt."""
    for name in ("modelopt", "modelopt.torch", "modelopt.torch.quantization"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["modelopt.torch.quantization"].tensor_quant = SimpleNamespace(  # pyright: ignore
        scaled_e4m3_impl=lambda x, amax: (
            (x / amax * 448).to(torch.float8_e4m3fn).float() * (amax / 448)
        )
    )
    export = ModuleType("modelopt.torch.export")
    export.export_hf_checkpoint = None  # pyright: ignore
    monkeypatch.setitem(sys.modules, export.__name__, export)
    file = root / "scripts" / "peers" / "with_modelopt.py"
    spec = importlib.util.spec_from_file_location("with_modelopt", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_stand_in_for_a_kernel_rounds_as_nvfp4_does(driver: ModuleType) -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    x = torch.cat([ties, -ties, torch.linspace(-6, 6, 112)]).reshape(8, 16)
    amax = torch.full((8,), 6.0)
    rounded = driver.fake_quantize(x, amax, quantize_block_scales=False)
    assert torch.equal(rounded, NVFP4.element.round(x))
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    amax = x.reshape(-1, 16).abs().amax(-1)
    t = amax.amax() / (6 * 448)
    weight = x.reshape(64, 2, 16)
    step = NVFP4.decode_scale(NVFP4.encode_scale(amax.reshape(64, 2) / 6 / t)).unsqueeze(-1) * t
    wanted = NVFP4.element.round(weight / step) * step
    found = driver.fake_quantize(x, amax, amax.amax())
    assert (found.reshape(64, 2, 16) - wanted).abs().max() < 1e-5


# ---------------------------------------------------------------- what is told


def record(tool: str, method: str, seed: int, kl: float, **changes: Any) -> dict[str, Any]:
    texts = {
        name: {"kl": kl * by, "kl_error": 0.003, "perplexity": 10.0, "top1": 0.9}
        for name, by in (("wiki", 1.0), ("books", 0.9))
    }
    base = {
        **{"tool": tool, "version": "1.2", "method": method, "note": "", "date": "2026-12-01"},
        **{"format": "nvfp4", "scheme": "w4a4", "seed": seed, "texts": texts, "megabytes": 4.0},
        **{"key": f"{tool}-{method}-{seed}", "cpu_seconds": 10.0 + seed, "peak_gb": 1.0},
    }
    return {**base, **changes}


@pytest.fixture
def told() -> dict[str, Any]:
    texts = [{"name": name, "predictions": 8176, "perplexity": 9.0} for name in ("wiki", "books")]
    failed = {"error": "RuntimeError: no GPU", "scheme": "w4a16"}
    return {
        "settings": {
            **{"model": "small", "calibration": "wiki.txt", "samples": 32, "seq_len": 512},
            **{"threads": 1, "machine": "a machine", "texts": texts},
        },
        "windows": {},
        "absent": ["auto-round"],
        "runs": [
            record("ptq", "default", 0, 0.18),
            record("ptq", "default", 1, 0.20),
            record("llm-compressor", "GPTQ", 0, 0.3, note="a note"),
            record("modelopt", "MSE", 0, 0.0, **failed),
        ],
    }


def test_seeds_are_one_row_with_their_mean_and_range(scripts, told: dict[str, Any]) -> None:
    worse, ours = scripts["page"].rows(told, "nvfp4", "w4a4")
    assert (worse.tool, worse.error["wiki"], worse.range["wiki"]) == ("llm-compressor", 0.003, None)
    assert ours.seeds == (0, 1) and ours.kl["wiki"] == pytest.approx(0.19)
    assert ours.range["wiki"] == (0.18, 0.20) and ours.cpu_seconds == 10.5
    assert ours.best and not worse.ours
    assert scripts["page"].rows(told, "mxfp4", "w4a4") == []


def test_the_page_tells_failures_and_what_is_not_installed(scripts, told) -> None:
    page = scripts["page"].page(told, "comparison")
    assert "| **ptq 1.2: default**, 2 seeds | **0.190 (0.180 … 0.200)** |" in page
    assert "| llm-compressor 1.2: GPTQ [1] | 0.300 ± 0.0030 | 0.270 ± 0.0030 | 10.00 |" in page
    assert "\n1. a note\n" in page and "[comparison.json](comparison.json)" in page
    assert "- modelopt 1.2: RuntimeError: no GPU (MSE at NVFP4 W4A16)" in page
    assert "- auto-round is not installed" in page
    assert "## MXFP4" not in page and "scorer, checked" not in page


def test_the_picture_has_a_bar_for_each_row_and_a_ring_for_the_other_text(scripts, told) -> None:
    theme = {"ink": "#000", "faint": "#888", "line": "#ccc", "ours": "#00f"}
    drawn = scripts["picture"].draw(theme, told)
    assert drawn.count("<rect") == drawn.count("<circle") == 2
    assert drawn.count('fill="#00f"') == 1  # what ptq does unless told otherwise
    assert "ring: on books" in drawn and ">0.190</text>" in drawn


def test_pages_and_pictures_in_docs_are_those_of_the_results(scripts, root: Path) -> None:
    files = sorted((root / "docs").glob("comparison*.json"))
    assert files
    for file in files:
        data = json.loads(file.read_text("utf-8"))
        page = file.with_suffix(".md").read_text("utf-8")
        assert page == scripts["page"].page(data, file.stem)
        for theme, colours in scripts["main"].THEMES.items():
            drawn = file.with_name(f"{file.stem}-{theme}.svg").read_text("utf-8")
            assert drawn == scripts["picture"].draw(colours, data)


# ---------------------------------------------------------------- the whole way


def test_results_are_kept_and_runs_not_repeated(
    scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    out, main = tmp_path / "results" / "peers.json", scripts["main"]
    common = ["compare_peers", "--peers", "ptq", "--formats", "mxfp4", "--schemes", "w4a16"]
    common += ["--methods", "rtn", "--samples", "2", "--max-tokens", "256", "--seeds", "0"]
    common += ["--out", str(out), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", [*common, "--seq-len", "64"])
    assert main.main() == 0
    (run,) = json.loads(out.read_text("utf-8"))["runs"]
    assert run["key"] == "ptq-rtn-mxfp4-w4a16-0" and "error" not in run
    assert 0.01 < run["texts"]["builtin"]["kl"] < 0.2
    assert run["cpu_seconds"] > 0.5 and run["megabytes"] == pytest.approx(3.57, abs=0.1)
    assert len(run["texts"]["builtin"]["kl_by_window"]) == 4
    assert {p.name for p in out.parent.iterdir()} == {
        *(f"peers{end}" for end in (".json", ".md", "-light.svg", "-dark.svg")),
    }
    before = out.read_bytes()
    monkeypatch.setattr(main, "measured", lambda *_: pytest.fail("it ran again"))
    assert main.main() == 0 and out.read_bytes() == before
    monkeypatch.setattr(sys, "argv", [*common, "--seq-len", "32"])
    assert main.main() == 2 and out.read_bytes() == before
    assert "has results with another seq_len; choose another --out" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*common, "--check", "--seq-len", "64"])
    assert main.main() == 2
    assert "needs a finished run of llm-compressor" in capsys.readouterr().err
