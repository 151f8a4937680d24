"""The entry point of vLLM: what it registers, what it takes over, and what vLLM then computes."""

import logging
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import ptq
from ptq.checkpoint.dialects import DIALECTS
from ptq.checkpoint.engines import NARROW, PLUGGED, WORKS
from ptq.checkpoint.quantization_config import LayerInfo, summarize
from ptq.runtime import vllm_plugin
from ptq.runtime.engine_check import ENGINES, check_engines
from ptq.runtime.vllm_plugin import NAME, register, takes_over

ENTRY = "vllm.general_plugins"
LAYER = "model.layers.0.mlp.down_proj"


def config(dialect: str = "compressed-tensors", **info) -> dict:
    """The ``quantization_config`` of one layer."""
    layers = {LAYER: LayerInfo(**{"format": "nvfp4", **info})}
    said = summarize(layers, ["lm_head"], recipe={}, provenance={})
    return DIALECTS[dialect].config(said, layers, ["lm_head"])


def test_the_package_says_where_it_is(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"][ENTRY][NAME].partition(":")
    assert getattr(import_module(module), name) is register


def test_nothing_of_vllm_is_needed_to_import_ptq() -> None:
    code = "import sys, ptq, ptq.runtime.vllm_plugin; print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_it_registers_once(stand_in_vllm) -> None:
    register()
    entered = dict(stand_in_vllm.registered)
    register()
    assert [*entered] == [NAME] and stand_in_vllm.registered == entered
    assert entered[NAME].__name__ == "PtqConfig"


def test_an_older_vllm_starts_without_it(stand_in_vllm, monkeypatch, caplog) -> None:
    from vllm.model_executor.layers.quantization import base_config

    monkeypatch.setattr(base_config, "QuantizationConfig", type("Old", (), {}))
    with caplog.at_level(logging.WARNING, logger=vllm_plugin.__name__):
        register()
    assert stand_in_vllm.registered == {}
    (record,) = caplog.records
    assert "older than 0.32" in record.message and "update vLLM" in record.message


CPU = {"asked": None, "cpu": True, "blackwell": False, "moe": False}
HOPPER, BLACKWELL = CPU | {"cpu": False}, CPU | {"cpu": False, "blackwell": True}
W4A4 = {"quantize_inputs": True, "static_inputs": True}


@pytest.mark.parametrize(
    ("said", "where", "mine"),
    [
        (config(), CPU, True),
        (config(format="mxfp4"), CPU, True),
        (config(format="mxfp8"), CPU, True),
        (config(format="nvint4"), CPU, False),  # which vLLM runs itself
        (config(format="mxint4"), CPU, False),
        (config(format="int4-g128"), CPU, False),
        (config(format="fp8-channel"), CPU, True),
        (config(format="fp8-channel"), HOPPER, False),
        (config(format="nvint4"), CPU | {"moe": True}, True),
        (config(format="nvint4", rotation=16), CPU, True),
        (config("modelopt"), CPU, True),
        (config(rotation=16), HOPPER, False),
        (config(rotation=16), BLACKWELL, True),
        (config(rotation=16, **W4A4), BLACKWELL, False),
        (config(format="mxfp4", rotation=16), BLACKWELL, False),
        (config(), BLACKWELL, False),
        (config(), HOPPER | {"asked": "ptq"}, True),
        (config(), CPU | {"asked": "compressed-tensors"}, False),
        ({"quant_method": "gptq", "bits": 4}, CPU | {"asked": "ptq"}, False),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {}}}, CPU, False),
    ],
)
def test_what_vllm_computes_itself_stays_with_it(said: dict, where: dict, mine: bool) -> None:
    assert takes_over(said, **where) is mine


# ---------------------------------------------------------------- vLLM itself

MODELS = {
    "llama": {"num_attention_heads": 2, "num_key_value_heads": 1},
    "mixtral": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64},
}
CHECKPOINTS = [
    ("llama", "nvfp4", {"scheme": "w4a4", "rotation": 16, "input_rule": "absmax"}, "auto"),
    ("mixtral", "mxfp4", {"rotation": 32}, "ptq"),
    ("llama", "nvint4", {"rotation": 1}, "ptq"),
]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here")
@pytest.mark.parametrize(("kind", "fmt", "recipe", "dialect"), CHECKPOINTS)
def test_vllm_computes_what_load_computes(
    make_tiny_model, tmp_path: Path, kind: str, fmt: str, recipe: dict, dialect: str
) -> None:
    """Log-probabilities of the whole vocabulary, in a process of their own."""
    model = make_tiny_model(kind, dtype=torch.bfloat16, hidden_size=128, **MODELS[kind])
    settings = {"algorithm": "rtn", "samples": 4, "seq_len": 32, **recipe}
    chosen = ptq.Recipe.default(fmt, **settings)
    ptq.quantize(model, tmp_path / "out", recipe=chosen, dialect=dialect, progress=False)
    engine = next(engine for engine in ENGINES if engine.name == PLUGGED)
    (found,) = check_engines(tmp_path / "out", [engine])
    assert found.outcome == WORKS and found.outcome != NARROW, found
