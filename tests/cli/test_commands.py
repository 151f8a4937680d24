"""The command line: what it prints, where, and with which exit code."""

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import Result, Run
from safetensors.torch import load_file, save_file

from ptq.cli import commands as cli


def process(*args: object, **options) -> subprocess.CompletedProcess[str]:
    """``python -m ptq …`` in a process of its own."""
    command = [sys.executable, "-m", "ptq", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def small(tiny_text: Path) -> list[object]:
    """Options that make a quantization quick."""
    return ["--calibration", tiny_text, "--samples", 8, "--seq-len", 64, "--algorithm", "rtn"]


@pytest.fixture(scope="module")
def checkpoint(
    tiny_llama: Path, small: list[object], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A quantized tiny model, made by a process of its own; its stdout must be the JSON of the
    report."""
    path = tmp_path_factory.mktemp("checkpoint") / "q"
    done = process(
        "quantize", "--model", tiny_llama, "--format", "NVFP4", "--out", path, "--json", *small
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["formats"] == ["nvfp4"]
    assert "quantizing 2/2" in done.stderr
    return path


def copy(model: Path, to: Path) -> Path:
    shutil.copytree(model, to)
    return to


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def change(model: Path, name: str, edit: Callable[[torch.Tensor], None]) -> Path:
    """Edit one tensor of a model in place."""
    file = model / "model.safetensors"
    tensors = load_file(file)
    edit(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})
    return model


# ---------------------------------------------------------------- the program


def test_help_is_quick_and_imports_no_torch():
    code = (
        "import sys, time; start = time.perf_counter(); sys.argv = ['ptq', '--help']\n"
        "from ptq.cli.commands import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'triton', 'numpy', 'accelerate'} & set(sys.modules)\n"
        "print(sorted(heavy), time.perf_counter() - start, file=sys.stderr)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        for _ in range(3)
    ]
    for done in runs:
        assert done.returncode == 0 and "quantize" in done.stdout
        assert done.stderr.startswith("[] "), done.stderr
    # a machine under load is slow at times: the best of three is the program's own time
    assert min(float(done.stderr.split()[-1]) for done in runs) < 0.5


@pytest.mark.parametrize("command", ["quantize", "eval", "inspect", "verify", "generate"])
def test_every_command_has_help(ptq: Run, command: str):
    result = ptq(command, "--help")
    assert result.code == 0 and result.err == ""
    assert "--json" in result.out


def test_no_command_is_a_request_for_help(ptq: Run):
    result = ptq()
    assert result.code == 0 and "quantize" in result.out


def test_version(ptq: Run):
    from ptq import __version__

    assert ptq("--version").out == f"ptq {__version__}\n"


def test_the_options_are_those_that_users_were_promised(ptq: Run):
    promised = (
        "--model --format --out --scheme --algorithm --rotation --balance --scales --calibration "
        "--samples --seq-len "
        "--batch-size --recipe --ignore --device --dtype --seed --overwrite --json --quiet"
    )
    text = ptq("quantize", "--help").out
    assert [option for option in promised.split() if not re.search(rf"{option}\b", text)] == []
    text = ptq("eval", "--help").out
    assert [
        o for o in ("--reference", "--text", "--max-tokens", "--seq-len", "--json") if o not in text
    ] == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["quantise"], "No such command 'quantise'"),
        (["eval"], "Missing argument 'MODEL'"),
        (["eval", "x", "--frobnicate"], "No such option: --frobnicate"),
        (["quantize", "--model", "m", "--out", "o", "--samples", "many"], "--samples"),
    ],
)
def test_a_wrong_command_line_is_one_line(ptq: Run, args: list[str], message: str):
    error = ptq(*args).error
    assert message in error and "--help" in error


def test_the_name_of_the_usage_error_is_what_we_think():
    assert cli.UsageError.__name__ == "UsageError"


def test_programming_errors_keep_their_traceback(
    ptq: Run, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
):
    def broken(path: Path) -> None:
        raise KeyError("oops")

    monkeypatch.setattr("ptq.runtime.inspect.inspect", broken)
    monkeypatch.setattr(sys, "argv", ["ptq", "inspect", str(checkpoint)])
    with pytest.raises(KeyError):
        cli.main()


def test_debug_shows_where_an_error_came_from(ptq: Run, tmp_path: Path):
    result = ptq("inspect", tmp_path / "nothing", "--debug")
    assert result.code == 2
    assert "Traceback" in result.err and result.err.splitlines()[-1].startswith("error: ")


def test_memory_that_runs_out_is_no_traceback(
    ptq: Run, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
):
    def hungry(path: Path) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB\nmore lines")

    monkeypatch.setattr("ptq.runtime.inspect.inspect", hungry)
    assert "out of memory; lower --batch-size" in ptq("inspect", checkpoint).error


# ---------------------------------------------------------------- quantize, inspect, eval


def test_the_model_is_the_first_argument_and_model_an_alias(
    ptq: Run, tiny_llama: Path, checkpoint: Path
):
    for model in ([tiny_llama], ["--model", tiny_llama], ["-m", tiny_llama]):
        result = ptq("quantize", *model, "--format", "nvfp4", "--dry-run", "--json")
        assert json.loads(result.out)["blocks"] == 2
    assert ptq("inspect", "--model", checkpoint).out == ptq("inspect", checkpoint).out


def test_a_nested_checkpoint_is_run_at_either_width(
    ptq: Run, tiny_llama: Path, checkpoint: Path, small: list[object], tmp_path: Path
):
    options = ["--format", "mxint8", "--nested", 4, "--out", tmp_path / "q", *small]
    assert "--bits 4" in ptq("quantize", tiny_llama, *options).out
    figures = []
    for bits in (["--bits", 4], ["--bits", 8], []):
        done = ptq(
            *("eval", tmp_path / "q", "--reference", tiny_llama, "--seq-len", 64),
            *("--max-tokens", 256, "--json", *bits),
        )
        figures.append(json.loads(done.out))
    assert figures[1]["kl"] == figures[2]["kl"] < figures[0]["kl"] / 4
    assert [figure.get("bits") for figure in figures] == [4, 8, None]
    generated = ptq("generate", tmp_path / "q", "--prompt", "a", "--bits", 4, "--json")
    assert json.loads(generated.out)["tokens"] > 0
    assert "does not have two widths" in ptq("generate", checkpoint, "-p", "a", "--bits", 4).error
    assert "no two widths" in ptq("generate", tiny_llama, "-p", "a", "--bits", 4).error


def test_tuning_is_told_and_predicted(
    ptq: Run, tiny_llama: Path, small: list[object], tmp_path: Path
):
    options = ["quantize", tiny_llama, "--format", "nvfp4", *small, "--tune", 1]
    assert "tuning, afterwards" in ptq(*options, "--dry-run").out
    done = ptq(*options, "--out", tmp_path / "q")
    assert "tuning 1/1" in done.err and "1 steps of tuning" in done.err
    assert "tuning: 1 " in ptq("inspect", tmp_path / "q").out  # of 1 steps, or steps gained nothing
    error = ptq(*options, "--out", tmp_path / "other", "--lm-head").error
    assert "--tune leaves the output head as it is" in error
    assert not (tmp_path / "other.partial").exists()


def test_what_quantize_cannot_do_without(ptq: Run, tiny_llama: Path):
    assert "ptq quantize MODEL" in ptq("quantize", "--format", "nvfp4").error
    assert "--out DIR" in ptq("quantize", tiny_llama, "--format", "nvfp4").error


def test_the_recipe_that_is_shown_can_be_fed_back(ptq: Run, tmp_path: Path):
    options = ["--format", "mxfp4", "--scheme", "w4a4", "--samples", 7, "--ignore", "*.o_proj"]
    shown = ptq("quantize", "--show-recipe", *options).out
    file = tmp_path / "recipe.toml"
    file.write_text(shown)
    assert "samples = 7" in shown and 'ignore = ["*.o_proj"]' in shown
    assert ptq("quantize", "--show-recipe", "--recipe", file).out == shown


def test_a_shell_completes_values():
    environment = {
        **os.environ,
        "_PTQ_COMPLETE": "complete_bash",
        "COMP_WORDS": "ptq quantize m --format nv",
        "COMP_CWORD": "4",
    }
    script = "from ptq.cli.commands import app; app(prog_name='ptq')"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["nvfp4", "nvint4"]


def test_inspect_counts_every_byte(ptq: Run, checkpoint: Path):
    report = json.loads(ptq("inspect", checkpoint, "--json").out)
    tensors = load_file(checkpoint / "model.safetensors")
    assert report["bytes"] == sum(t.nbytes for t in tensors.values())
    assert report["file_bytes"] == sum(f.stat().st_size for f in checkpoint.iterdir())
    assert (
        sum(layer["bytes"] for layer in report["layers"]) + sum(k["bytes"] for k in report["kept"])
        == report["bytes"]
    )
    assert report["quantized_parameters"] == 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128)
    assert report["parameters"] == report["quantized_parameters"] + 2 * 256 * 64 + 5 * 64


def test_inspect_tells_bits_and_errors_of_every_layer(ptq: Run, checkpoint: Path):
    report = json.loads(ptq("inspect", checkpoint, "--json").out)
    layers = {layer["layer"]: layer for layer in report["layers"]}
    assert len(layers) == 14
    down = layers["model.layers.1.mlp.down_proj"]
    assert (down["shape"], down["format"], down["scheme"], down["algorithm"]) == (
        [64, 128],
        "nvfp4",
        "w4a16",
        "rtn",
    )
    assert down["bits_per_weight"] == pytest.approx(4 + 8 / 16 + 32 / (64 * 128))
    assert 0 < down["error"] < 0.05
    assert report["recipe"]["algorithm"] == "rtn" and report["recipe"]["samples"] == 8
    assert {k["name"] for k in report["kept"]} >= {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    }


def test_inspect_shows_kinds_and_blocks(ptq: Run, checkpoint: Path):
    text = ptq("inspect", checkpoint).out
    for word in (
        "nvfp4",
        "w4a16",
        "down_proj",
        "lm_head.weight",
        "model.layers.1",
        "bits per quantized weight",
    ):
        assert word in text


def test_verify_of_what_was_written_and_of_what_was_changed(
    ptq: Run, checkpoint: Path, tmp_path: Path
):
    done = ptq("verify", checkpoint)
    assert done.code == 0 and ": ok (" in done.out and "not checked: " in done.err
    quiet = ptq("verify", checkpoint, "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    there = copy(checkpoint, tmp_path / "copy")
    change(there, "model.norm.weight", lambda t: t[3].fill_(float("nan")))
    (there / "note.txt").write_text("")
    done = ptq("verify", there, "--quiet")
    assert done.code == 2 and done.err == ""
    changed, added, norm = done.out.splitlines()
    assert changed.startswith("model.safetensors is changed") and "note.txt" in added
    assert norm.startswith("model.norm.weight holds NaN")
    found = ptq("verify", there, "--json")
    assert found.code == 2 and json.loads(found.out)["problems"] == [changed, added, norm]
    missing = ptq("verify", tmp_path / "nothing")
    assert missing.code == 2 and "is no directory" in missing.error


def test_inspect_loads_neither_model_nor_transformers(checkpoint: Path):
    code = (
        "import sys; from ptq.cli import display; from ptq.runtime import inspect; found = "
        f"inspect.inspect({str(checkpoint)!r})\n"
        "display.print_report(found, layers=True); assert 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_eval_against_the_original(ptq: Run, checkpoint: Path, tiny_llama: Path, tiny_text: Path):
    args = ["--reference", tiny_llama, "--text", tiny_text, "--seq-len", 64, "--max-tokens", 1000]
    result = ptq("eval", checkpoint, *args, "--json")
    found = json.loads(result.out)
    assert found.keys() >= {"perplexity", "nll", "kl", "kl_top25", "top1_agreement", "tokens"}
    assert found["tokens"] == 15 * 63 and found["windows"] == 15
    assert (
        0 < found["kl"] < 0.1 and 0 < found["kl_top25"] < 0.1 and 0.5 < found["top1_agreement"] <= 1
    )
    assert "evaluating" in result.err
    table = ptq("eval", checkpoint, *args, "--quiet")
    assert "KL top 25" in table.out and f"{found['kl']:.4g}" in table.out and table.err == ""


def test_eval_of_a_model_against_itself_is_zero(ptq: Run, tiny_llama: Path, tiny_text: Path):
    args = [
        "--reference",
        tiny_llama,
        "--text",
        tiny_text,
        "--seq-len",
        64,
        "--max-tokens",
        128,
        "--json",
        "--quiet",
    ]
    result = ptq("eval", tiny_llama, *args)
    found = json.loads(result.out)
    assert (found["kl"], found["kl_top25"], found["top1_agreement"]) == (
        0,
        0,
        1,
    ) and result.err == ""


def test_eval_without_a_reference(ptq: Run, tiny_llama: Path, tiny_text: Path):
    found = json.loads(
        ptq("eval", tiny_llama, "--text", tiny_text, "--max-tokens", 512, "--json").out
    )
    assert found["kl"] is None and found["seq_len"] == 256  # as many positions as the model has


def test_quiet_prints_nothing(ptq: Run, tiny_llama: Path, small: list[object], tmp_path: Path):
    result = ptq(
        "quantize",
        "--model",
        tiny_llama,
        "--format",
        "mxfp4",
        "--out",
        tmp_path / "q",
        "--quiet",
        *small,
    )
    assert result == Result(0, "", "")


def test_options_override_the_recipe_file(
    ptq: Run, tiny_llama: Path, tiny_text: Path, tmp_path: Path
):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'format = "mxfp4"\nscheme = "w4a4"\nalgorithm = "rtn"\n'
        f'calibration = "{tiny_text}"\nsamples = 8\nseq_len = 64\n'
    )
    result = ptq(
        "quantize",
        "--model",
        tiny_llama,
        "--recipe",
        recipe,
        "--seq-len",
        32,
        "--out",
        tmp_path / "q",
        "--json",
    )
    report = json.loads(result.out)
    made = report["recipe"]
    assert (made["format"], made["samples"], made["seq_len"], made["scheme"]) == (
        "mxfp4",
        8,
        32,
        "w4a4",
    )
    again = tmp_path / "recipe.json"  # what a checkpoint says of itself is a recipe file
    again.write_text(json.dumps(made))
    result = ptq(
        "quantize", "--model", tiny_llama, "--recipe", again, "--out", tmp_path / "r", "--json"
    )
    assert json.loads(result.out)["recipe"] == made
    assert (tmp_path / "q" / "model.safetensors").read_bytes() == (
        tmp_path / "r" / "model.safetensors"
    ).read_bytes()


def test_ignored_layers_stay_as_they_are(
    ptq: Run, tiny_llama: Path, small: list[object], tmp_path: Path
):
    ignore = ["--ignore", "o_proj", "--ignore", "model.layers.0.mlp.*"]
    result = ptq(
        "quantize",
        "--model",
        tiny_llama,
        "-f",
        "nvfp4",
        "-o",
        tmp_path / "q",
        *ignore,
        *small,
        "--json",
    )
    report = json.loads(result.out)
    assert len(report["layers"]) == 14 - 2 - 3
    kept = {tensor["name"] for tensor in report["kept"]}
    assert (
        "model.layers.0.mlp.up_proj.weight" in kept
        and "model.layers.1.self_attn.o_proj.weight" in kept
    )


def test_the_python_interface_has_the_same_names(tiny_llama: Path, tiny_text: Path, tmp_path: Path):
    import ptq

    recipe = ptq.Recipe.default(
        "nvfp4", algorithm="rtn", calibration=str(tiny_text), samples=8, seq_len=64
    )
    ptq.quantize(tiny_llama, tmp_path / "q", recipe=recipe)
    model = ptq.load(tmp_path / "q")
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 256)
    assert {"load", "quantize", "Recipe"} <= set(dir(ptq))
    with pytest.raises(AttributeError, match="no attribute 'frobnicate'"):
        _ = ptq.frobnicate


# ---------------------------------------------------------------- bad input: one line, exit code 2


@pytest.fixture
def quantize(ptq: Run, small: list[object], tmp_path: Path) -> Run:
    """``quantize(model, …)`` to ``tmp_path/q``; after an error nothing may be there that looks like
    a checkpoint."""

    def run(model: object, *args: object, format: str = "nvfp4") -> Result:
        out = tmp_path / "q"
        before = out.exists()
        result = ptq("quantize", "--model", model, "--format", format, "--out", out, *small, *args)
        assert before or not (out / "config.json").exists()
        return result

    return run


def test_an_unknown_format_lists_the_formats(quantize: Run, tiny_llama: Path):
    error = quantize(tiny_llama, format="nvfp5").error
    assert "nvfp5" in error and all(
        name in error for name in ("mxfp4", "nvfp4", "nvint4", "mxint8")
    )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--scheme", "w8a8", "choose from w4a16, w4a4"),
        ("--algorithm", "magic", "gptq"),
        ("--rotation", "turn", "none"),
        ("--rotation", "24", "power of two"),
        ("--balance", "2", "less than or equal to 1"),
        ("--scales", "guess", "absmax"),
        ("--device", "tpu", "cpu"),
        ("--device", "cuda:99", "CUDA"),
        ("--dtype", "int3", "float32"),
        ("--dialect", "gguf", "compressed-tensors"),
        ("--samples", "0", "samples"),
        ("--ignore", "k_porj", "k_proj"),
        ("--recipe", "/no/such/file", "no such file"),
    ],
)
def test_an_unknown_choice_says_what_there_is(
    quantize: Run, tiny_llama: Path, option: str, value: str, message: str
):
    assert message in quantize(tiny_llama, option, value).error


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.json", "{", "r.json"),
        ("r.toml", "a = ", "r.toml"),
        ("r.json", "[1]", "table of choices"),
        ("r.json", '{"sample_count": 8}', "sample_count"),
    ],
)
def test_a_damaged_recipe_file(
    quantize: Run, tiny_llama: Path, tmp_path: Path, name: str, text: str, message: str
):
    (tmp_path / name).write_text(text)
    assert message in quantize(tiny_llama, "--recipe", tmp_path / name).error


def test_no_format_at_all(ptq: Run, tiny_llama: Path, tmp_path: Path):
    assert "--format" in ptq("quantize", "--model", tiny_llama, "--out", tmp_path / "q").error


def test_a_missing_model(quantize: Run, tmp_path: Path):
    assert "no/such/model" in quantize("./no/such/model").error
    (tmp_path / "file").write_text("x")
    assert "is a file" in quantize(tmp_path / "file").error


def test_a_directory_without_config(quantize: Run, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert "config.json" in quantize(tmp_path / "empty").error


def test_a_directory_without_weights(quantize: Run, tiny_llama: Path, tmp_path: Path):
    model = copy(tiny_llama, tmp_path / "m")
    (model / "model.safetensors").unlink()
    assert "safetensors" in quantize(model).error


def test_a_truncated_weights_file(quantize: Run, tiny_llama: Path, tmp_path: Path):
    file = copy(tiny_llama, tmp_path / "m") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "model.safetensors" in quantize(tmp_path / "m").error


def test_a_corrupt_weights_file(quantize: Run, tiny_llama: Path, tmp_path: Path):
    file = copy(tiny_llama, tmp_path / "m") / "model.safetensors"
    file.write_bytes(b"\x08\0\0\0\0\0\0\0garbage!" + file.read_bytes()[16:])
    assert "model.safetensors" in quantize(tmp_path / "m").error


def test_a_model_that_is_not_causal(quantize: Run, tiny_llama: Path, tmp_path: Path):
    from transformers import BertConfig, BertForMaskedLM

    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
    }
    BertForMaskedLM(BertConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "bert")
    assert "not a causal language model" in quantize(tmp_path / "bert").error


def test_features_that_form_no_groups(quantize: Run, make_tiny_model: Callable[..., Path]):
    error = quantize(make_tiny_model("llama", intermediate_size=120)).error
    assert (
        "model.layers.0.mlp.down_proj" in error and "120" in error and "--ignore down_proj" in error
    )


def test_a_rotation_that_does_not_divide(quantize: Run, make_tiny_model: Callable[..., Path]):
    error = quantize(make_tiny_model("llama", intermediate_size=96), "--rotation", 64).error
    assert "model.layers.0.mlp.down_proj" in error and "96" in error


def test_calibration_text_that_is_empty_or_too_short(
    quantize: Run, tiny_llama: Path, tmp_path: Path
):
    text = tmp_path / "short.txt"
    text.write_text("")
    gptq = ("--algorithm", "gptq", "--calibration")  # round to nearest would read none
    assert "short.txt" in quantize(tiny_llama, *gptq, text).error
    text.write_text("a few words")
    error = quantize(tiny_llama, *gptq, text).error
    assert "short.txt" in error and "11" in error
    assert "missing.txt" in quantize(tiny_llama, *gptq, tmp_path / "missing.txt").error


def test_a_field_that_is_not_in_the_data(quantize: Run, tiny_llama: Path, tmp_path: Path):
    text = tmp_path / "data.jsonl"
    text.write_text('{"body": "the walk", "id": 1}\n')
    options = ("--algorithm", "gptq", "--calibration", text, "--field", "text")
    assert "body" in quantize(tiny_llama, *options).error


def test_weights_that_are_no_numbers(quantize: Run, tiny_llama: Path, tmp_path: Path):
    name = "model.layers.1.mlp.up_proj.weight"
    model = change(copy(tiny_llama, tmp_path / "m"), name, lambda t: t[3, 4].fill_(float("nan")))
    error = quantize(model, "--quiet").error
    assert "model.layers.1.mlp.up_proj" in error and "NaN" in error


def test_activations_that_are_no_numbers(quantize: Run, tiny_llama: Path, tmp_path: Path):
    model = copy(tiny_llama, tmp_path / "m")
    for leaf in ("gate_proj", "up_proj"):
        model = change(model, f"model.layers.0.mlp.{leaf}.weight", lambda t: t.fill_(1e19))
    error = quantize(model, "--quiet").error
    assert "model.layers.0.mlp.down_proj" in error


def test_a_directory_that_is_not_empty(quantize: Run, tiny_llama: Path, tmp_path: Path):
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "notes.txt").write_text("mine")
    assert "--overwrite" in quantize(tiny_llama).error
    assert (tmp_path / "q" / "notes.txt").read_text() == "mine"
    refused = quantize(tiny_llama, "--overwrite")  # not a checkpoint of ours
    assert refused.code == 2 and "it holds notes.txt" in refused.error
    assert (tmp_path / "q" / "notes.txt").read_text() == "mine"
    (tmp_path / "q" / "notes.txt").unlink()
    assert quantize(tiny_llama).code == 0 and quantize(tiny_llama, "--overwrite").code == 0
    assert (tmp_path / "q" / "config.json").is_file()


@pytest.mark.parametrize("out", ["", " ", "."])
@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_a_result_without_a_directory_of_its_own(
    ptq: Run,
    tiny_llama: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    out: str,
    more: list[str],
):
    """Not even where --overwrite would find a checkpoint of ours."""
    place = copy(checkpoint, tmp_path / "here")
    monkeypatch.chdir(place)
    before = contents(place)
    error = ptq("quantize", "-m", tiny_llama, "-f", "nvfp4", "-o", out, *more).error
    assert "--out" in error
    assert contents(place) == before


def test_a_model_is_not_replaced_by_its_own_result(ptq: Run, checkpoint: Path, tmp_path: Path):
    model = copy(checkpoint, tmp_path / "m")
    before = contents(model)
    error = ptq("quantize", "-m", model, "-f", "nvfp4", "-o", model, "--overwrite").error
    assert "is the directory of the model" in error
    assert contents(model) == before


def test_no_space_left(
    quantize: Run, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    result = quantize(tiny_llama, "--quiet")
    assert "no space left" in result.error.lower()
    assert not (tmp_path / "q").exists()


def test_eval_of_bad_input(ptq: Run, tiny_llama: Path, tiny_text: Path, tmp_path: Path):
    assert "nothing" in ptq("eval", "./nothing").error
    text = tmp_path / "short.txt"
    text.write_text("short")
    assert "5 tokens" in ptq("eval", tiny_llama, "--text", text).error
    assert "missing.txt" in ptq("eval", tiny_llama, "--text", tmp_path / "missing.txt").error
    assert "--max-tokens" in ptq("eval", tiny_llama, "--text", tiny_text, "--max-tokens", 3).error
    assert "256 positions" in ptq("eval", tiny_llama, "--text", tiny_text, "--seq-len", 512).error
    file = copy(tiny_llama, tmp_path / "m") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "model.safetensors" in ptq("eval", tmp_path / "m", "--text", tiny_text).error


def test_eval_of_a_damaged_model(ptq: Run, tiny_llama: Path, tiny_text: Path, tmp_path: Path):
    model = change(
        copy(tiny_llama, tmp_path / "m"), "lm_head.weight", lambda t: t[3].fill_(float("inf"))
    )
    assert "NaN or infin" in ptq("eval", model, "--text", tiny_text, "--quiet").error


def test_eval_of_models_with_different_vocabularies(
    ptq: Run,
    tiny_llama: Path,
    make_tiny_model: Callable[..., Path],
    tiny_text: Path,
    tmp_path: Path,
):
    wider = make_tiny_model("llama", vocab_size=300)
    error = ptq("eval", tiny_llama, "--reference", wider, "--text", tiny_text, "--quiet").error
    assert "vocabulary of 256 tokens, the reference of 300" in error
    other = copy(tiny_llama, tmp_path / "m")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert (
        "different vocabularies"
        in ptq("eval", tiny_llama, "--reference", other, "--text", tiny_text).error
    )


def test_inspect_of_bad_input(ptq: Run, tiny_llama: Path, tmp_path: Path, checkpoint: Path):
    assert "does not exist" in ptq("inspect", tmp_path / "nothing").error
    assert "not quantized" in ptq("inspect", tiny_llama).error
    file = copy(checkpoint, tmp_path / "q") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "copy" in ptq("inspect", tmp_path / "q").error


# ---------------------------------------------------------------- interruption


@pytest.fixture(scope="module")
def deep_llama(make_tiny_model: Callable[..., Path]) -> Path:
    """Enough blocks that no machine is done before a signal arrives."""
    return make_tiny_model("llama", num_hidden_layers=24)


def interrupted(
    deep_llama: Path, tiny_text: Path, out: Path, number: int, *more: str, after: float = 0.0
) -> subprocess.Popen[str]:
    """A run that got ``number`` so many seconds ``after`` it had started to write, or has ended."""
    options = ["--calibration", str(tiny_text), "--samples", "64", "--seq-len", "128"]
    command = [
        sys.executable,
        "-m",
        "ptq",
        "quantize",
        "--model",
        str(deep_llama),
        "--format",
        "nvfp4",
        "--out",
        str(out),
    ]

    # a shell that starts the tests in the background, or nohup, lets its children ignore some
    # signals, and we respect that
    def listen() -> None:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    run = subprocess.Popen([*command, *options, *more], text=True, preexec_fn=listen, **pipes)
    limit = time.monotonic() + 120
    while (
        not out.with_name(out.name + ".partial").exists()
        and run.poll() is None
        and time.monotonic() < limit
    ):
        time.sleep(0.01)
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.wait(after)
    run.send_signal(number)
    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_end_is_one_line_and_leaves_no_checkpoint(
    deep_llama: Path,
    tiny_text: Path,
    tmp_path: Path,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    run = interrupted(deep_llama, tiny_text, tmp_path / "q", number, "--activations", "disk")
    out, err = run.communicate(timeout=120)
    assert run.returncode == 128 + number and out == ""
    assert err.splitlines()[-1].startswith("error: interrupted") and "Traceback" not in err
    assert not (tmp_path / "q").exists()
    assert list((tmp_path / "tmp").iterdir()) == []


KILLS = int(os.environ.get("PTQ_KILLS", "1"))  # at random moments


def test_a_run_killed_at_any_moment_is_finished_by_the_same_command(
    ptq: Run, make_tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
):
    """With the bytes of an undisturbed one. tests/checkpoint/test_work_folder.py kills at every
    single operation, in one process."""
    model = make_tiny_model("llama", num_hidden_layers=4)
    options = ["--calibration", tiny_text, "--samples", 64, "--seq-len", 128, "--quiet"]
    command = ["quantize", "--model", model, "--format", "nvfp4", *options, "--out"]
    place = tmp_path / "undisturbed" / "q"
    start = time.monotonic()
    assert ptq(*command, place).code == 0
    whole, seconds = results(place), time.monotonic() - start
    generator = random.Random(0)
    for number in range(KILLS):
        out = tmp_path / str(number) / "q"
        out.parent.mkdir()
        after = generator.uniform(0, seconds)
        run = interrupted(model, tiny_text, out, signal.SIGKILL, after=after)
        run.communicate(timeout=120)
        assert run.returncode in (0, -signal.SIGKILL)
        if out.exists():
            assert results(out) == whole, number
        assert ptq(*command, out).code == 0, number
        assert results(out) == whole, number
        assert os.listdir(out.parent) == ["q"], number


def results(checkpoint: Path) -> dict[str, bytes]:
    """The files of a checkpoint; of the report, all but what time it took and its hash."""
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    sums = files["SHA256SUMS"].splitlines(keepends=True)
    files["SHA256SUMS"] = b"".join(line for line in sums if b"ptq_report.json" not in line)
    report = json.loads(files["ptq_report.json"])
    for layer in report["layers"]:
        del layer["seconds"]
    return files | {"ptq_report.json": json.dumps(report).encode()}


# ---------------------------------------------------------------- the bundled model


@pytest.mark.slow
def test_the_bundled_model_is_worse_after_quantization_and_the_reference_is_itself(
    ptq: Run, demo_model: Path, tmp_path: Path
):
    options = ["--algorithm", "rtn", "--scheme", "w4a4", "--samples", 8, "--seq-len", 128]
    assert (
        ptq(
            "quantize", "--model", "demo", "--format", "mxfp4", "--out", tmp_path / "q", *options
        ).code
        == 0
    )
    measure = ["--max-tokens", 8192, "--seq-len", 512, "--json"]
    found = json.loads(ptq("eval", tmp_path / "q", "--reference", "demo", *measure).out)
    assert found["perplexity"] > 1.02 * found["reference_perplexity"]
    assert found["kl"] > 0.02 and found["top1_agreement"] > 0.5
    assert found["reference_perplexity"] < 40
