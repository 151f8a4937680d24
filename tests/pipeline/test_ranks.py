"""Runs that are killed, and runs of several processes: the command line as a user starts it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

BLOCKS = 5


@pytest.fixture(scope="module")
def model(make_tiny_model: Callable[..., Path]) -> Path:
    return make_tiny_model("llama", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def command(model: Path, tiny_text: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "ptq",
        "quantize",
        "--model",
        str(model),
        "--format",
        "mxfp4",
        "--scheme",
        "w4a4",
        "--calibration",
        str(tiny_text),
        "--samples",
        "16",
        "--seq-len",
        "64",
        "--batch-size",
        "4",
        "--device",
        "cpu",
        "--quiet",
    ]


@pytest.fixture(scope="module")
def whole(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a run that nobody disturbs."""
    out = tmp_path_factory.mktemp("whole") / "out"
    subprocess.run([*command, "--out", str(out)], check=True, env=environment())
    return out


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def finished(out: Path) -> int:
    """Blocks that progress.json names."""
    progress = out.with_name(f"{out.name}.partial") / "progress.json"
    return len(json.loads(progress.read_text())["blocks"]) if progress.is_file() else 0


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_a_killed_run_continues_to_the_same_bytes(
    command: list[str], whole: Path, tmp_path: Path, blocks: int
) -> None:
    """SIGKILL before the first block is finished and after one or three; inside a shard write:
    test_writer.py."""
    out = tmp_path / "out"
    partial = out.with_name("out.partial")
    process = subprocess.Popen([*command, "--out", str(out)], env=environment())
    wait_for(lambda: partial.is_dir() and finished(out) >= blocks, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert not (partial / "config.json").exists()
    assert finished(out) >= blocks
    subprocess.run([*command, "--out", str(out)], check=True, env=environment())
    for file in ("model.safetensors", "config.json", "model.safetensors.index.json"):
        assert (out / file).read_bytes() == (whole / file).read_bytes()
    assert not partial.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [(["--samples", "8"], "recipe.samples"), (["--scheme", "w4a16"], "recipe.scheme")],
)
def test_a_changed_recipe_does_not_continue_a_run(
    command: list[str], tmp_path: Path, change: list[str], message: str
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen([*command, "--out", str(out)], env=environment())
    wait_for(lambda: finished(out) >= 1, process)
    process.kill()
    process.wait()
    again = subprocess.run(
        [*command, "--out", str(out), *change], capture_output=True, text=True, env=environment()
    )
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert message in again.stderr
    assert "delete" in again.stderr


def ranks(command: list[str], out: Path, count: int) -> list[subprocess.Popen[bytes]]:
    """What torchrun starts, without its supervisor, which would end the other ranks itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return [
        subprocess.Popen(
            [*command, "--out", str(out)],
            stderr=subprocess.PIPE,
            env=environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(count),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
        )
        for rank in range(count)
    ]


def test_two_processes_give_the_result_of_one(
    command: list[str], whole: Path, tmp_path: Path
) -> None:
    """Only the order of summation differs: hardly a code does, and errors agree to 1 %."""
    out = tmp_path / "out"
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    started = [*launch, *command[1:], "--out", str(out)]
    done = subprocess.run(started, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    one, two = load_file(whole / "model.safetensors"), load_file(out / "model.safetensors")
    assert one.keys() == two.keys()
    codes = [name for name in one if name.endswith("weight_packed")]
    differing = sum(int((one[name] != two[name]).sum()) for name in codes) / sum(
        one[name].numel() for name in codes
    )
    assert differing < 0.02
    for name, tensor in one.items():
        if not name.endswith(("weight_packed", "weight_scale")):
            torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
    reports = [
        json.loads((path / "ptq_report.json").read_text())["layers"] for path in (whole, out)
    ]
    for single, double in zip(*reports, strict=True):
        assert double["layer"] == single["layer"]
        assert double["tokens"] == single["tokens"]
        assert double["error"] == pytest.approx(single["error"], rel=0.01)
    assert (out / "config.json").read_bytes() == (whole / "config.json").read_bytes()


def test_a_rank_that_dies_ends_the_others_and_the_run_can_continue(
    command: list[str], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first, second = ranks(command, out, 2)
    wait_for(lambda: finished(out) >= 1, first)
    second.kill()
    message = first.communicate(timeout=120)[1].decode()
    second.communicate()
    assert first.returncode == 2
    assert "rank 0 lost another process of the run" in message
    assert "the same command continues" in message
    assert not out.exists()
    kept = finished(out)
    assert kept >= 1
    subprocess.run([*command, "--out", str(out)], check=True, env=environment())
    assert (
        load_file(out / "model.safetensors").keys() == load_file(whole / "model.safetensors").keys()
    )


def test_more_processes_than_batches_are_refused(command: list[str], tmp_path: Path) -> None:
    started = ranks([*command, "--samples", "4"], tmp_path / "out", 2)
    messages = [process.communicate(timeout=120)[1].decode() for process in started]
    assert [process.returncode for process in started] == [2, 2]
    assert all(
        "2 processes need as many batches and there are 1" in message for message in messages
    )
