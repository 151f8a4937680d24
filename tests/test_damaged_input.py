"""Whatever a file or an option says, the answer is a result, a ValueError or an OSError.

Every kind of input is changed ``CALLS`` times from a fixed seed, and given to what reads it in this
process. Any other exception, a call of more than ``SECONDS`` or logits that are no numbers fail.
``PTQ_FUZZ=3000 pytest tests/test_damaged_input.py`` looks further.
"""

import copy
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from ptq.checkpoint.progress_file import NAME as PROGRESS
from ptq.checkpoint.progress_file import ProgressFile
from ptq.checkpoint.reader import INDEX, REPORT
from ptq.cli import display
from ptq.cli.commands import main
from ptq.cli.options import make_recipe
from ptq.model.blueprint import Blueprint
from ptq.model.checkpoint_source import CheckpointSource
from ptq.pipeline import forecast
from ptq.pipeline.plan import Plan
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.run import quantize_model
from ptq.pipeline.speed import Speed
from ptq.runtime.inspect import inspect
from ptq.runtime.load import load

CALLS = int(os.environ.get("PTQ_FUZZ", "300"))
SECONDS = 10  # of a call; the slowest that is right takes 0.3
TINY = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 256, "max_position_embeddings": 64,
}  # fmt: skip
VALUES: list[object] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 1000, 2**31, 2**63, 10**20, 10**30, 0.5, -0.0, 1e-320,
    1e308, float("inf"), float("nan"), "", "x", "no", "2", "nvfp4", "float16", "float9", "re:(",
    "re:(a|aa)+$", "re:.*", "*", "../x", "/dev/zero", "\x1b[31m[bold]", "\ud800", "a" * 5000, [],
    [[]], [None], [1, 2], ["x"], {}, {"x": 5}, {"": None}, {"re:(": 1}, {"quant_method": "gptq"},
]  # fmt: skip

Json = dict | list | str | int | float | bool | None


# ---------------------------------------------------------------- mutations


def places(data: Json, path: tuple = ()) -> Iterator[tuple]:
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        yield from places(value, (*path, key)) if isinstance(value, dict | list) else [(*path, key)]


def changed(data: Json, draw: random.Random) -> Json:
    """A copy with one to three values replaced, removed, added, scaled or moved."""
    data = copy.deepcopy(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        path = draw.choice(list(places(data)))
        if not path:
            if draw.random() < 0.1:
                return draw.choice(VALUES)  # pyright: ignore[reportReturnType]
            continue
        owner = data
        for key in path[:-1]:
            owner = owner[key]
        key, value = path[-1], draw.choice(VALUES)
        match draw.randrange(6):
            case 0:
                del owner[key]
            case 1 if isinstance(owner[key], int | float):
                owner[key] = draw.choice((-1, 0, 0.5, 2, 3, 1000, 10**9)) * owner[key]
            case 2 if isinstance(owner, dict):
                owner[draw.choice(("x", "version", "dtype", "\x1b[2J"))] = value
            case 3:
                owner[key] = [owner[key]]
            case 4:
                owner[key] = str(owner[key])
            case _:
                owner[key] = value
        if not isinstance(data, dict | list) or not data:
            return data
    return data


def damaged(raw: bytes, draw: random.Random) -> bytes:
    """Bytes that are cut, flipped, repeated or nested ten thousand deep."""
    at = draw.randrange(len(raw))
    match draw.randrange(5):
        case 0:
            return raw[:at]
        case 1:
            return raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1 :]
        case 2:
            return raw[:at] + raw[at // 2 :]
        case 3:
            return raw[:at] + draw.choice((b"[" * 10**4, b'{"a":' * 10**4, b"9" * 10**4, b"\xff"))
        case _:
            return raw[:at] + draw.randbytes(3) + raw[at:]


def mutated_json(raw: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.15:
        return damaged(raw, draw)
    return json.dumps(changed(json.loads(raw), draw), ensure_ascii=True).encode()


def mutated_header(raw: bytes, draw: random.Random) -> bytes:
    """A safetensors file with another header."""
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], raw[8 + length :]
    match draw.randrange(8):
        case 0:
            wrong = draw.choice((0, 1, length - 1, length + 8, len(raw), 2**40, 2**63, 2**64 - 1))
            return wrong.to_bytes(8, "little") + header + data
        case 1:
            return raw[: draw.randrange(len(raw))]
        case 2:
            return raw + draw.randbytes(8)
        case _:
            header = mutated_json(header, draw)
            return len(header).to_bytes(8, "little") + header + data


# ---------------------------------------------------------------- what reads them


def runs(model: nn.Module) -> None:
    with torch.no_grad():
        logits = model(input_ids=torch.arange(8)[None], use_cache=False).logits
    assert not logits.isnan().any(), "loads, and its logits are NaN"


def read_source(path: Path) -> None:
    """As a dry run and a run do; what remains is a model."""
    recipe = Recipe.default("mxfp4", rotation=1)
    Plan.of(Blueprint.of(path), recipe)
    source = CheckpointSource(path)
    Plan.of(source, recipe)
    model = source.skeleton()
    source.fill(model, "", "cpu")
    model.tie_weights()  # pyright: ignore[reportCallIssue]
    runs(model)


def read_quantized(path: Path) -> None:
    read_report(path)
    runs(load(path))


def read_report(path: Path) -> None:
    display.print_report(inspect(path), layers=True)


def read_progress(path: Path) -> None:
    identity = json.loads((path / "identity").read_text())
    for block in ProgressFile(path, identity).intact().values():
        assert block.to_dict()


def read_recipe(path: Path) -> None:
    recipe = make_recipe(None, path / "recipe.json", {})
    Plan.of(Blueprint.of(path), recipe)
    json.dumps(recipe.to_dict())


@contextmanager
def limited() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError_("a call takes too long")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class TimeoutError_(BaseException):
    """So that nobody handles it."""


def outcome(call: Callable[[], object]) -> str | None:
    """None where the answer is right; else the exception and the place it comes from."""
    try:
        with limited():
            call()
    except (ValueError, OSError) as error:
        return None if "\n" not in str(error) and str(error) else f"message {error!r}"
    except SystemExit as error:
        return None if error.code in (0, 2, None) else f"exit code {error.code}"
    except (KeyboardInterrupt, pytest.fail.Exception):
        raise
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "/ptq/" in f.filename or "/calib/" in f.filename]
        where = (ours or frames)[-1]
        return f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error}"[
            :150
        ]
    return None


# ---------------------------------------------------------------- the inputs


@pytest.fixture(scope="module")
def source(make_tiny_model: Callable[..., Path]) -> Path:
    return make_tiny_model("llama", dtype=torch.bfloat16, **TINY)


@pytest.fixture(scope="module")
def moe(make_tiny_model: Callable[..., Path]) -> Path:
    return make_tiny_model(
        "qwen3_moe", dtype=torch.bfloat16, shard="20KB", moe_intermediate_size=32, **TINY
    )


def quantized(source: Path, out: Path, dialect: str) -> Path:
    format, rotation = ("nvfp4", 16) if dialect == "ptq" else ("mxfp4", 32)
    recipe = Recipe(format=format, rotation=rotation, algorithm="rtn", samples=2, seq_len=16)
    quantize_model(source, out, recipe=recipe, device="cpu", dialect=dialect)
    return out


@pytest.fixture(scope="module")
def ours(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(source, tmp_path_factory.mktemp("ours") / "out", "ptq")


@pytest.fixture(scope="module")
def theirs(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(source, tmp_path_factory.mktemp("theirs") / "out", "compressed-tensors")


@pytest.fixture(scope="module")
def progress(ours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("progress")
    identity = {"recipe": {"format": "nvfp4", "rules": []}, "source": "abc", "calibration": {}}
    (folder / "identity").write_text(json.dumps(identity))
    (folder / "a.st").write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    reports = json.loads((ours / REPORT).read_text())["layers"][:2]
    info = {
        "format": "nvfp4", "rotation": 16, "quantize_inputs": False, "static_inputs": False,
        "input_rule": "default", "bias": False,
    }  # fmt: skip
    block = {
        "file": "a.st",
        "sha256": empty,
        "weights": {},
        "layers": {"a.q": info},
        "reports": reports,
    }
    ProgressFile(folder, identity).write({})
    written = json.loads((folder / PROGRESS).read_text()) | {"blocks": {"a": block}}
    (folder / PROGRESS).write_text(json.dumps(written))
    assert ProgressFile(folder, identity).intact().keys() == {"a"}
    return folder


@pytest.fixture(scope="module")
def recipe(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe") / "model"
    shutil.copytree(source, folder)
    full = Recipe.default(
        "nvfp4", ignore=("lm_head",), rules=(("down_proj", {"rotation": 1}), ("o_proj", "skip"))
    )
    (folder / "recipe.json").write_text(json.dumps(full.to_dict()))
    return folder


# What is read: a fixture, its file, how that is changed, who reads it, and among how many rows the
# calls are divided.
KINDS = {
    "config.json": ("source", "config.json", mutated_json, read_source, 4),
    "config.json of experts": ("moe", "config.json", mutated_json, read_source, 4),
    "quantized config.json": ("ours", "config.json", mutated_json, read_quantized, 4),
    "compressed-tensors config.json": ("theirs", "config.json", mutated_json, read_quantized, 4),
    "index": ("moe", INDEX, mutated_json, read_source, 2),
    "index of a result": ("ours", INDEX, mutated_json, read_quantized, 2),
    "header": ("source", "model.safetensors", mutated_header, read_source, 2),
    "header of a result": ("ours", "model.safetensors", mutated_header, read_quantized, 2),
    "report": ("ours", REPORT, mutated_json, read_report, 1),
    "generation config": ("ours", "generation_config.json", mutated_json, read_quantized, 6),
    "progress": ("progress", PROGRESS, mutated_json, read_progress, 1),
    "recipe": ("recipe", "recipe.json", mutated_json, read_recipe, 1),
}


def told(failures: Counter[str], calls: int) -> str:
    lines = [f"  {count}× {failure}" for failure, count in failures.most_common()]
    return f"{failures.total()} of {calls} calls from {len(failures)} places\n" + "\n".join(lines)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    fixture, name, mutate, read, rows = KINDS[kind]
    calls = CALLS // rows
    folder = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(fixture), folder)
    file, draw, failures = folder / name, random.Random(kind), Counter[str]()
    raw = file.read_bytes()
    assert outcome(lambda: read(folder)) is None, "the file as it is"
    for _ in range(calls):
        file.write_bytes(mutate(raw, draw))
        if failure := outcome(lambda: read(folder)):
            failures[failure] += 1
    assert not failures, told(failures, calls)


NUMBERS = ("0", "-1", "1", "2", "16", "1e3", "nan", "inf", "-inf", "1e400", "1" + "0" * 20, "", "x")
WORDS = ("", "x", "\x1b[31m", "[bold]", "re:(", "re:(a|aa)+$", "*", "/dev/null", "nvfp4", "\ud800")
OPTIONS = {
    "quantize": {
        "--samples": NUMBERS, "--seq-len": NUMBERS, "--batch-size": NUMBERS, "--seed": NUMBERS,
        "--balance": NUMBERS, "--rotation": (*NUMBERS, "none", "auto"), "--ignore": WORDS,
        "--scheme": WORDS, "--scales": WORDS, "--algorithm": WORDS, "--format": WORDS,
        "--dtype": WORDS, "--device": WORDS, "--dialect": WORDS, "--activations": WORDS,
        "--recipe": WORDS, "--calibration": WORDS, "--field": WORDS,
    },
    "bench": {
        "--tokens": NUMBERS, "--rotation": NUMBERS, "--backend": WORDS, "--format": WORDS,
        "--predict": WORDS, "--device": WORDS,
    },
    "eval": {"--seq-len": NUMBERS, "--max-tokens": NUMBERS, "--dtype": WORDS, "--field": WORDS},
    "generate": {
        "--max-new-tokens": NUMBERS[:5], "--temperature": NUMBERS, "--seed": NUMBERS,
        "--dtype": WORDS, "--prompt": ("", "x", "[bold]"),
    },
}  # fmt: skip


def command_line(draw: random.Random, source: Path, folder: Path) -> list[str]:
    command = draw.choice(
        ("quantize", "quantize", "quantize", "bench", "bench", "eval", "generate")
    )
    chosen = draw.sample(list(OPTIONS[command]), draw.choice((1, 1, 2)))
    options = [word for name in chosen for word in (name, draw.choice(OPTIONS[command][name]))]
    text = folder / "text.txt"
    text.write_text("a text " * 20)
    fixed = {
        "quantize": ["-m", str(source), "-o", str(folder / "out"), "-f", "nvfp4", "--dry-run"],
        "bench": ["qwen3-8b", "--predict", "h200", "--tokens", "1"],
        "eval": [str(source), "--text", str(text)],
        "generate": [str(source), "--prompt", "a", "--max-new-tokens", "1"],
    }[command]
    return [command, *fixed, *options]


SPEED = Speed(flop=1e-9, element=0, attention=0, rounded=0, column=0, weight=0, factor=0)


@pytest.mark.filterwarnings("default")
def test_option_values(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(forecast, "measure", lambda *_: SPEED)
    draw, failures = random.Random("options"), Counter[str]()
    for _ in range(CALLS):
        words = command_line(draw, source, tmp_path)
        monkeypatch.setattr(sys, "argv", ["ptq", *words])
        capsys.readouterr()
        if failure := outcome(main):
            failures[f"{failure}  ({' '.join(words[-4:])!r})"] += 1
        assert not (tmp_path / "out").exists()
        output = capsys.readouterr()
        if "\x1b" in output.out + output.err:
            failures["escape sequence on the terminal"] += 1
    assert not failures, told(failures, CALLS)
