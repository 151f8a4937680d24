"""load, evaluate, inspect, verify and convert from Python."""

import shutil

import pytest
import torch
from transformers import PreTrainedModel

import ptq
from ptq.runtime.load import load as load_checkpoint


@pytest.fixture(scope="module")
def checkpoint(make_run, tmp_path_factory):
    place = tmp_path_factory.mktemp("made") / "out"
    make_run("llama", "nvfp4", scheme="w4a4")(place)
    return place


def test_load_gives_what_from_pretrained_gives(checkpoint, token_ids):
    model, tokenizer = ptq.load(checkpoint, tokenizer=True)
    assert isinstance(model, PreTrainedModel) and not model.training
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert model.device.type == expected
    ids = tokenizer("the walk", return_tensors="pt").to(model.device)
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > 3
    plain = ptq.load(str(checkpoint), "cpu", dtype="float32", inputs="quantized")
    reference = load_checkpoint(checkpoint, dtype=torch.float32, inputs="quantized")
    with torch.no_grad():
        assert torch.equal(plain(token_ids).logits, reference(token_ids).logits)


def test_a_device_map_takes_the_place_of_a_device(checkpoint):
    model = ptq.load(checkpoint, device_map={"": "cpu"})
    assert model.device.type == "cpu"


def test_evaluate_by_name_and_in_memory(checkpoint, tiny_text, tmp_path, make_tiny_model, capfd):
    original = make_tiny_model("llama", dtype=torch.bfloat16, num_hidden_layers=2)
    options = {"text": str(tiny_text), "seq_len": 64, "max_tokens": 640, "device": "cpu"}
    found = ptq.evaluate(checkpoint, original, **options)
    assert found.kl is not None and found.kl > 0
    assert str(checkpoint) in str(found) and "KL top 25" in found._repr_html_()
    assert "evaluating" in capfd.readouterr().err
    model, tokenizer = ptq.load(
        checkpoint, "cpu", tokenizer=True, dtype="float32", inputs="quantized"
    )
    again = ptq.evaluate(model, tokenizer=tokenizer, progress=False, **options)
    assert again.nll == found.nll and again.kl is None
    assert capfd.readouterr().err == ""


def test_inspect_and_verify(checkpoint, tmp_path):
    report = ptq.inspect(checkpoint)
    assert "nvfp4 w4a4" in str(report) and "by kind of module" in str(report)
    assert repr(report) == str(report)
    verdict = ptq.verify(str(checkpoint))
    assert verdict.ok and "ok (" in str(verdict)
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    with open(copy / "config.json", "a") as file:
        file.write("\n")
    found = ptq.verify(copy)
    assert not found.ok and found.problems[0] in str(found)


def test_convert_says_what_it_wrote(checkpoint, tmp_path):
    made = ptq.convert(checkpoint, str(tmp_path / "ours"), to="ptq")
    assert made.dialect == "ptq" == ptq.inspect(tmp_path / "ours").dialect
    assert made.report.bytes > 0


@pytest.mark.parametrize("call", [ptq.load, ptq.inspect])
def test_no_such_checkpoint_is_one_line(call):
    with pytest.raises(FileNotFoundError, match="no directory nobody/nothing") as error:
        call("nobody/nothing", revision="main")
    assert "\n" not in str(error.value)
