"""analyze, quantize and forecast from Python: the calls of the command line, and what they give."""

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


def test_analyze_is_that_of_the_command_line(tiny_llama, tiny_text, tmp_path, capfd):
    few = {"samples": 4, "seq_len": 32, "tokens": 32, "device": "cpu"}
    chosen = {**few, "calibration": str(tiny_text), "formats": ("nvfp4", "mxint8"), "budget": 5.5}
    found = ptq.analyze(tiny_llama, tmp_path / "a", advise=True, **chosen)
    told = capfd.readouterr().err
    assert "analyzing 2/2" in told and "measuring damage 4/4" in told
    assert isinstance(found, ptq.Study) and len(found.layers) == 14 and len(found.worst) == 10
    assert found.report == tmp_path / "a" / "report.html" and found.report.exists()
    assert "the layers that will hurt" in str(found) and "<table>" in found._repr_html_()
    made = ptq.quantize(
        tiny_llama, tmp_path / "q", recipe=found.recipe_file, progress=False, **QUICK
    )
    assert set(made.report.formats) <= {"nvfp4", "mxint8"}
    with pytest.raises(FileExistsError, match="finished analysis: choose another"):
        ptq.analyze(tiny_llama, str(tmp_path / "a"), **few)
    seen = []
    again = ptq.analyze(  # what was measured is not measured again
        tiny_llama, tmp_path / "a", advise=True, progress=lambda *step: seen.append(step),
        **{**chosen, "budget": 6.0},
    )  # fmt: skip
    assert seen == [] and again.analysis.blocks == found.analysis.blocks
    assert again.advice.budget == 6.0 and capfd.readouterr().err == ""
    ptq.analyze(tiny_llama, progress=lambda *step: seen.append(step), balance=0.0, **few)
    assert [step[:3] for step in seen] == [("analyzing", 1, 2), ("analyzing", 2, 2)]


def test_mistakes_of_an_analysis_are_one_line(tiny_llama, tmp_path):
    for wrong, message in (
        ({"sample": 4}, r"unknown argument 'sample'; did you mean samples\? help\(ptq.analyze\)"),
        ({"budget": 5.0}, "are for --advise"),
        ({"advise": True}, "either --budget"),
        ({"activations": "tape"}, "activations must be 'ram'"),
        ({"device": "tpu"}, "unknown device"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            ptq.analyze(tiny_llama, tmp_path / "a", **wrong)
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="which no analysis wrote"):
        ptq.analyze(tiny_llama, tmp_path)
    with pytest.raises(FileNotFoundError, match="no such model at revision v1"):
        ptq.analyze("nobody/nothing", revision="v1")
