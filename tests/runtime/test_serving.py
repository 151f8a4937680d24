"""Which server runs what: vLLM where it can, transformers where that has what it needs."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from ptq.checkpoint.quantization_config import LayerInfo
from ptq.runtime import serving
from ptq.runtime.serving import choose_server, find_program, without_vllm

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """``installed("vllm", "fastapi", …)``: those and no others are here."""

    def install(*names: str) -> None:
        monkeypatch.setattr(serving, "find_spec", lambda name: name if name in names else None)
        monkeypatch.setattr(
            serving, "find_program", lambda name: f"/bin/{name}" if name in names else None
        )

    return install


def test_vllm_serves_what_it_computes_rightly(installed, tiny_llama: Path):
    installed("vllm", "fastapi", "uvicorn")
    for path in (tiny_llama, GOLDEN / "compressed-tensors"):
        server = choose_server(path, host="0.0.0.0", port=80, more=["--max-model-len", "64"])
        assert server.reason is None
        assert server.command == [
            *("/bin/vllm", "serve", str(path), "--host", "0.0.0.0", "--port", "80"),
            *("--max-model-len", "64"),
        ]


def test_transformers_serves_what_vllm_does_not_know(installed):
    installed("vllm", "fastapi", "uvicorn")
    server = choose_server(GOLDEN / "ptq", host="h", port=1)
    assert "vLLM does not know the ptq dialect" in (server.reason or "")
    assert server.command[:2] == [sys.executable, "-c"]
    assert "import ptq.hf" in server.command[2]
    assert server.command[3:] == ["serve", str(GOLDEN / "ptq"), "--host", "h", "--port", "1"]


def test_vllm_serves_with_the_plugin_where_that_is_beside_it(
    installed, monkeypatch: pytest.MonkeyPatch
):
    installed("vllm", "fastapi", "uvicorn")
    monkeypatch.setattr(serving, "without_vllm", lambda path: None)
    monkeypatch.setattr(serving, "needs_plugin", lambda path: True)
    server = choose_server(GOLDEN / "ptq", host="h", port=1)
    assert server.command[0] == sys.executable  # that vLLM is of another environment
    assert (server.reason or "").endswith("`pip install ptq-llm` in its environment")
    monkeypatch.setattr(serving, "has_plugin", lambda program: True)
    server = choose_server(GOLDEN / "ptq", host="h", port=1)
    assert server.command[:2] == ["/bin/vllm", "serve"] and server.reason is None


def test_a_plugin_is_that_of_this_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    entries = [SimpleNamespace(name="ptq")]
    monkeypatch.setattr(serving, "entry_points", lambda group: entries)
    assert serving.has_plugin(str(tmp_path / "vllm"))
    assert not serving.has_plugin("/elsewhere/vllm")
    entries[0].name = "another"
    assert not serving.has_plugin(str(tmp_path / "vllm"))


def test_what_is_missing_is_named(installed):
    installed("fastapi")
    with pytest.raises(ValueError, match=r"the ptq dialect.*; transformers needs uvicorn: ") as e:
        choose_server(GOLDEN / "ptq", host="h", port=1)
    assert str(e.value).endswith("pip install 'transformers[serving]'")
    installed("fastapi", "uvicorn")
    with pytest.raises(
        ValueError, match=r"not installed; .*compressed_tensors: pip install compressed-tensors$"
    ):
        choose_server(GOLDEN / "compressed-tensors", host="h", port=1)


def test_a_rotation_that_vllm_computes_wrongly_is_not_given_to_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Rotated weight-only NVFP4; no writer of ours makes such a file, others may."""
    info = LayerInfo(format="nvfp4", rotation=16, quantize_inputs=False)
    layers = {"model.layers.0.mlp.down_proj": info}
    config = {"dtype": "bfloat16", "quantization_config": {"quant_method": "compressed-tensors"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = SimpleNamespace(config=config, layers=layers)
    monkeypatch.setattr(serving, "Checkpoint", lambda path: found)
    reason = without_vllm(tmp_path)
    assert reason is not None and reason.startswith("vLLM does not run it rightly: ")
    layers["model.layers.0.mlp.down_proj"] = replace(info, rotation=1)
    assert without_vllm(tmp_path) is None


def test_programs_are_looked_for_beside_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    program = tmp_path / "vllm"
    program.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert find_program("vllm") == str(program)
    assert find_program("no-such-program") is None
