"""``import ptq`` alone: nothing heavy, and from_pretrained opens our checkpoints."""

import subprocess
import sys

import pytest

from ptq.runtime import transformers_hook
from ptq.runtime.transformers_plugin import HANDLERS

# Opens every path given, and says from what; orders differ in what is imported first.
OPEN = """
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto
assert "ptq.runtime.transformers_plugin" not in sys.modules, "before anybody asked"
assert "ptq" in auto.AUTO_QUANTIZER_MAPPING and "gptq" in auto.AUTO_QUANTIZER_MAPPING
assert "nonsense" not in auto.AUTO_QUANTIZER_MAPPING
assert auto.AUTO_QUANTIZER_MAPPING.get("nonsense") is None
assert "ptq.runtime.transformers_plugin" not in sys.modules, "for others"
for path in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    print(type(model.model.layers[0].mlp.down_proj).__name__)
import ptq.hf
assert auto.AUTO_QUANTIZER_MAPPING["ptq"] is ptq.hf.PtqQuantizer
"""
FIRST = """
import sys
import ptq
assert not {"torch", "transformers", "safetensors"} & set(sys.modules)
import ptq
assert sum(type(f).__name__ == "Finder" for f in sys.meta_path) == 1
"""
AFTER = """
import sys
import transformers.quantizers.auto
import ptq
"""
HF = """
import sys
import ptq.hf
import ptq
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    print(type(AutoModelForCausalLM.from_pretrained(path).model.layers[0].mlp.down_proj).__name__)
"""


@pytest.fixture(scope="module")
def checkpoints(make_run, tmp_path_factory):
    """One of our dialect; one in compressed-tensors that transformers alone computes wrongly."""
    place = tmp_path_factory.mktemp("hook")
    make_run("llama", "nvfp4", rotation=16)(place / "ours", dialect="ptq")
    rotated = make_run("llama", "nvfp4", scheme="w4a4", rotation=16)
    rotated(place / "theirs", dialect="compressed-tensors")
    return place / "ours", place / "theirs"


@pytest.mark.parametrize("program", [FIRST + OPEN, AFTER + OPEN, HF], ids=["before", "after", "hf"])
def test_from_pretrained_opens_both_dialects(checkpoints, program):
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, checkpoints)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["StoredLinear", "StoredLinear"], done.stderr


def test_the_module_is_found_with_its_own_loader():
    """Who looks at the module, or asks for it without importing, sees what is always there."""
    code = (
        "import sys, ptq, inspect, importlib.util; "
        "spec = importlib.util.find_spec('transformers.quantizers.auto'); "
        "assert spec.loader.get_filename().endswith('auto.py'); "
        "import transformers.quantizers.auto as auto; "
        "assert 'Prepared' not in type(auto.__spec__.loader).__name__; "
        "assert auto.__loader__ is auto.__spec__.loader; "
        "assert 'AUTO_QUANTIZER_MAPPING' in inspect.getsource(auto)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_names_are_those_of_the_plugin():
    assert HANDLERS.keys() == transformers_hook.NAMES
