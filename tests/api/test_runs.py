"""quantize and forecast from Python: the call of the command line, and what it gives back."""

import json

import pytest
from transformers import AutoModelForCausalLM

import ptq
from ptq.text.windows import load_tokenizer

QUICK = {"samples": 4, "seq_len": 64, "device": "cpu"}


def test_choices_and_a_recipe_write_the_same_checkpoint(tiny_llama, tiny_text, tmp_path, capfd):
    options = {**QUICK, "calibration": str(tiny_text), "seed": 5}
    made = ptq.quantize(
        str(tiny_llama), str(tmp_path / "a"), format="nvfp4", scheme="w4a4", **options
    )
    del options["device"]
    recipe = ptq.Recipe.default("nvfp4", scheme="w4a4", **options)
    ptq.quantize(tiny_llama, tmp_path / "b", recipe=recipe, device="cpu", progress=False)
    first, second = (tmp_path / x / "model.safetensors" for x in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert made.path == tmp_path / "a" and made.report == ptq.inspect(tmp_path / "a")
    assert made.dialect == made.report.dialect and made.reason in str(made)
    assert "down_proj" in str(made) and "<table>" in made._repr_html_()
    assert "quantizing 2/2" in capfd.readouterr().err  # of the first call alone


def test_progress_may_be_a_function_or_nothing(tiny_llama, tmp_path, capfd):
    seen = []
    options = {**QUICK, "format": "mxfp4", "quality": "fast"}
    ptq.quantize(tiny_llama, tmp_path / "a", progress=seen.append, **options)
    ptq.quantize(tiny_llama, tmp_path / "b", progress=False, **options)
    assert [(done.index, done.count) for done in seen] == [(0, 2), (1, 2)]
    assert capfd.readouterr() == ("", "")


def test_a_model_in_memory_is_given_back(tiny_llama, tiny_text):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    options = {**QUICK, "calibration": str(tiny_text), "progress": False}
    done = ptq.quantize(
        model, tokenizer=load_tokenizer(tiny_llama), format="nvfp4", algorithm="rtn", **options
    )
    assert done is model
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "QuantLinear"


def test_a_missing_model_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such model at revision v1 could be") as error:
        ptq.quantize("nobody/nothing", tmp_path / "out", format="nvfp4", revision="v1")
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="revision"):
        ptq.quantize("demo", tmp_path / "out", format="nvfp4", revision="v1")


def test_the_forecast_is_that_of_the_run(demo_model):
    found = ptq.forecast("demo", format="nvfp4", scheme="w4a4", device="cpu", overwrite=True)
    assert found.fits and found.parameters > 3_000_000
    shown = str(found)
    assert "peak" in shown and "blocks: GPTQ" in shown and "needs: about" in shown
    assert json.loads(json.dumps(found.to_dict()))["blocks"] == found.blocks
    wider = ptq.forecast("demo", format="mxfp8", device="cpu")
    assert wider.quantized == found.quantized and wider.output_bytes > found.output_bytes
    with pytest.raises(ValueError, match="unknown device"):
        ptq.forecast("demo", format="nvfp4", device="tpu")
