"""Tuning as a stage of a run: what is loaded is what was judged, nothing gets worse, and a run that
was interrupted ends in the same bytes."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ptq.calib.block_by_block import BlockByBlock
from ptq.checkpoint.reader import Checkpoint
from ptq.checkpoint.writer import CheckpointWriter
from ptq.model.blueprint import Blueprint
from ptq.pipeline import tuned_codes, tuning, tuning_text
from ptq.pipeline.forecast import forecast
from ptq.pipeline.plan import Plan
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.run import quantize_model
from ptq.pipeline.tuning import Step, Tuning, check_tunable, interval
from ptq.pipeline.tuning_text import load_tuning_text
from ptq.runtime.evaluate import kl_divergence
from ptq.runtime.inspect import inspect
from ptq.runtime.load import load
from ptq.text.windows import load_tokenizer

Make = Callable[..., Path]
STEPS = 5


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuned_codes, "LATENT_RATE", 0.05)  # codes flip in a few steps
        patch.setattr(tuned_codes, "SHARE", 0.001)  # and jump
        patch.setattr(tuned_codes, "TRUST", 0.1)
        patch.setattr(tuned_codes, "WAIT", 1)
        patch.setattr(tuning, "EVERY", 1)
        patch.setattr(tuning_text, "STEP_TOKENS", 96)
        patch.setattr(tuning_text, "HELD_TOKENS", 256)
        yield


@pytest.fixture(scope="module")
def recipe(tiny_text: Path) -> Callable[..., Recipe]:
    def make(format: str = "nvfp4", **given: object) -> Recipe:
        usual = {"calibration": str(tiny_text), "samples": 8, "seq_len": 32, "batch_size": 3}
        return Recipe.default(format, **{**usual, "algorithm": "rtn", "tune": STEPS, **given})

    return make


def held_out_kl(model: Path, out: Path, recipe: Recipe) -> float:
    """Of the model that is loaded, on the text that tuning was judged by."""
    text = load_tuning_text(Plan.of(Blueprint.of(model), recipe), load_tokenizer(model))
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = load(out, dtype=torch.float32, inputs="quantized")
    total = 0.0
    with torch.no_grad():
        for tokens in text.held:
            both = (m(tokens).logits.flatten(0, 1) for m in (original, found))
            total += float(kl_divergence(*both).sum())
    return total / text.held_tokens


def tensors(out: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(out)
    return {name: checkpoint.tensor(name) for name in checkpoint.names()}


@pytest.mark.parametrize(
    ("kind", "dialect", "given"),
    [
        ("llama_tied", "ptq", {"format": "mxfp4", "scheme": "w4a4", "rotation": 32}),
        ("qwen2", "compressed-tensors", {"balance": 0.5, "scheme": "w4a4"}),
        ("qwen3", "compressed-tensors", {"format": "nvint4", "ignore": ("v_proj",)}),
        ("qwen3_moe", "ptq", {"rules": (("down_proj", "mxfp8"),)}),
        ("qwen3_moe", "ptq", {"rules": (("down_proj", "mxfp8"),), "tune_codes": "pv"}),
        ("llama_tied", "ptq", {"format": "mxfp4", "scheme": "w4a4", "tune_codes": "pv"}),
    ],
)
def test_what_is_loaded_is_what_was_judged_and_better_than_before(
    make_tiny_model: Make, recipe, tmp_path: Path, kind: str, dialect: str, given: dict
) -> None:
    model = make_tiny_model(kind, dtype=torch.bfloat16)
    chosen, plain = recipe(**given), recipe(**given, tune=0)
    steps: list[object] = []
    arguments = {"device": "cpu", "dialect": dialect}
    quantize_model(model, tmp_path / "tuned", recipe=chosen, on_block=steps.append, **arguments)
    quantize_model(model, tmp_path / "plain", recipe=plain, **arguments)
    assert [step.done for step in steps if isinstance(step, Step)] == list(range(1, STEPS + 1))
    report = Checkpoint(tmp_path / "tuned").tuning
    assert report is not None and Checkpoint(tmp_path / "plain").tuning is None
    before, after = (held_out_kl(model, tmp_path / n, chosen) for n in ("plain", "tuned"))
    assert report.before == pytest.approx(before, rel=1e-3)
    assert report.after == pytest.approx(after, rel=1e-3)
    assert after < before and report.kept > 0
    assert report.flipped < 0.1 and (report.flipped > 0 or chosen.format == "nvint4")
    # only codes of four bits and norms are others
    old, new = tensors(tmp_path / "plain"), tensors(tmp_path / "tuned")
    assert old.keys() == new.keys()
    changed = {n for n in old if not torch.equal(old[n], new[n])}
    assert changed and all("_packed" in n or "norm" in n for n in changed)
    if kind == "qwen3_moe":
        assert not any("down_proj" in n for n in changed)


def test_nothing_changes_where_nothing_is_gained(
    tiny_llama: Path, recipe, tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks: list[float] = []

    def look(self: Tuning) -> float:
        looks.append(0.5 + 0.1 * len(looks))
        return looks[-1]

    monkeypatch.setattr(Tuning, "look", look)
    chosen = recipe(tune=30)
    with caplog.at_level(logging.WARNING):
        quantize_model(tiny_llama, tmp_path / "tuned", recipe=chosen, device="cpu")
    monkeypatch.undo()
    quantize_model(tiny_llama, tmp_path / "plain", recipe=recipe(tune=0), device="cpu")
    told = [r.getMessage() for r in caplog.records if "tuning" in r.getMessage()]
    assert len(told) == 1 and "gained nothing: KL" in told[0] and "was 0.5" in told[0]
    report = Checkpoint(tmp_path / "tuned").tuning
    assert report is not None and (report.kept, report.flipped) == (0, 0.0)
    assert report.done == tuning.PATIENCE * interval(30) < 30  # it ends early
    old, new = tensors(tmp_path / "plain"), tensors(tmp_path / "tuned")
    assert old.keys() == new.keys() and all(torch.equal(old[n], new[n]) for n in old)


class Killed(BaseException):
    """What no code of ours catches."""


def finish(model: Path, out: Path, recipe: Recipe, stop: Callable[[Step], None] | None) -> None:
    def told(done: object) -> None:
        if stop is not None and isinstance(done, Step):
            stop(done)

    quantize_model(model, out, recipe=recipe, device="cpu", on_block=told, dialect="ptq")


def contents(out: Path) -> dict[str, bytes]:
    """All files; of the report what does not depend on the time of day."""
    files = {p.name: p.read_bytes() for p in out.iterdir() if p.name != "SHA256SUMS"}
    report = json.loads(files["ptq_report.json"])
    for timed in (*report["layers"], report["tuning"]):
        timed["seconds"] = 0.0
    return files | {"ptq_report.json": json.dumps(report).encode()}


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, recipe, _short: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run that is never interrupted writes."""
    out = tmp_path_factory.mktemp("whole") / "q"
    finish(tiny_llama, out, recipe(scheme="w4a4"), None)
    return out


@pytest.fixture(scope="module")
def jumped(
    tiny_llama: Path, recipe, _short: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same in the manner of PV-Tuning."""
    out = tmp_path_factory.mktemp("jumped") / "q"
    finish(tiny_llama, out, recipe(scheme="w4a4", tune_codes="pv"), None)
    return out


@pytest.mark.parametrize("by", ["latents", "pv"])
def test_an_interrupted_run_ends_in_the_same_bytes(
    tiny_llama: Path, recipe, tmp_path: Path, request: pytest.FixtureRequest, by: str
) -> None:
    whole: Path = request.getfixturevalue("jumped" if by == "pv" else "whole")
    out, taken = tmp_path / "q", list[int]()
    chosen = recipe(scheme="w4a4", tune_codes=by)

    def stop(step: Step) -> None:
        taken.append(step.done)
        if step.done == 2:
            raise Killed

    with pytest.raises(Killed):
        finish(tiny_llama, out, chosen, stop)
    assert not out.exists()
    finish(tiny_llama, out, chosen, lambda step: taken.append(step.done))
    assert taken == list(range(1, STEPS + 1))  # every step is saved here
    assert contents(out) == contents(whole)
    assert not out.with_name("q.partial").exists()


@pytest.mark.parametrize("where", ["replace", "finish"])
def test_a_run_killed_while_it_writes_goes_on(
    tiny_llama: Path, recipe, tmp_path: Path, whole: Path, monkeypatch, where: str
) -> None:
    out, method = tmp_path / "q", getattr(CheckpointWriter, where)
    broken: list[int] = []

    def dies(self, *args):
        if not broken:
            broken.append(1)
            if where != "finish":
                method(self, *args)
            raise Killed
        return method(self, *args)

    monkeypatch.setattr(CheckpointWriter, where, dies)
    with pytest.raises(Killed):
        finish(tiny_llama, out, recipe(scheme="w4a4"), None)
    finish(tiny_llama, out, recipe(scheme="w4a4"), None)
    assert contents(out) == contents(whole)
    finish(tiny_llama, out, recipe(scheme="w4a4"), None)  # complete: nothing is left to do


def test_a_damaged_state_is_not_gone_on_from(
    tiny_llama: Path, recipe, tmp_path: Path, whole: Path
) -> None:
    out, taken = tmp_path / "q", list[int]()

    def stop(step: Step) -> None:
        taken.append(step.done)
        if len(taken) == 2:
            raise Killed

    with pytest.raises(Killed):
        finish(tiny_llama, out, recipe(scheme="w4a4"), stop)
    (state,) = out.with_name("q.partial").glob("tuning-*.safetensors")
    raw = bytearray(state.read_bytes())
    raw[-1] ^= 1
    state.write_bytes(raw)
    finish(tiny_llama, out, recipe(scheme="w4a4"), stop)
    assert taken == [1, 2, *range(1, STEPS + 1)]
    assert contents(out) == contents(whole)


def test_a_loss_that_is_not_finite_ends_it_and_the_best_is_kept(
    tiny_llama: Path, recipe, tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    divergence = BlockByBlock.divergence

    def broken(self, *args, differentiate: bool):
        total, gradient = divergence(self, *args, differentiate=differentiate)
        taken.append(differentiate)
        lost = taken.count(True) > 1
        return (float("nan") if lost else total), gradient

    taken: list[bool] = []
    monkeypatch.setattr(BlockByBlock, "divergence", broken)
    with caplog.at_level(logging.WARNING):
        quantize_model(tiny_llama, tmp_path / "q", recipe=recipe(), device="cpu")
    assert "tuning ends: KL of its own text is NaN" in caplog.text
    report = Checkpoint(tmp_path / "q").tuning
    assert report is not None and (report.done, report.held_out[-1]) == (2, (2, tuning.BROKEN))
    assert report.kept in (0, 1) and report.after <= report.before


def test_what_cannot_be_tuned_is_refused_before_any_work(
    make_tiny_model: Make, recipe, tmp_path: Path
) -> None:
    model = make_tiny_model("llama")

    def plan(**given: object) -> Plan:
        return Plan.of(Blueprint.of(model), recipe(**given))

    check_tunable(plan(tune=0), on_disk=False, ranks=2)
    check_tunable(plan(), on_disk=True, ranks=1)
    for given, options, reason in (
        ({}, {"on_disk": False, "ranks": 1}, "give the directory of a model"),
        ({}, {"on_disk": True, "ranks": 2}, "runs in one process"),
        ({"lm_head": True}, {"on_disk": True, "ranks": 1}, "leave out --lm-head"),
        ({"kv_cache": "fp8"}, {"on_disk": True, "ranks": 1}, "leave out one of the two"),
        ({"format": "mxfp8"}, {"on_disk": True, "ranks": 1}, r"4 bits .* none \(mxfp8\)"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_tunable(plan(**given), **options)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with pytest.raises(ValueError, match="give the directory of a model"):
        quantize_model(loaded, recipe=recipe(), device="cpu", tokenizer=load_tokenizer(model))
    with pytest.raises(ValueError, match="leave out --lm-head"):
        quantize_model(model, tmp_path / "q", recipe=recipe(lm_head=True), device="cpu")
    with pytest.raises(ValueError, match="runs in one process"):
        forecast(model, recipe(), ranks=2)
    assert not list(tmp_path.iterdir())


def test_what_was_done_is_told(whole: Path) -> None:
    out, checkpoint = whole, Checkpoint(whole)
    assert (
        checkpoint.recipe["tune"] == STEPS
        and f"| tune | `{STEPS}` |" in (out / "README.md").read_text()
    )
    text = checkpoint.parsed.provenance["calibration"]["tuning"]  # pyright: ignore[reportIndexIssue, reportCallIssue, reportArgumentType]
    assert text["tokens"] > 0 and len(text["sha256"]) == 64
    card = (out / "README.md").read_text()
    assert f"| tuning | {checkpoint.tuning} |" in card and "as they were before tuning" in card
    assert inspect(out).tuning == checkpoint.tuning


def test_the_report_says_how_codes_were_moved(whole: Path, jumped: Path) -> None:
    assert [Checkpoint(out).tuning.codes for out in (whole, jumped)] == ["latents", "pv"]  # pyright: ignore[reportOptionalMemberAccess]
    assert Checkpoint(jumped).recipe["tune_codes"] == "pv"
    assert "steps in the manner of PV-Tuning" in (jumped / "README.md").read_text()
    stored = json.loads((jumped / "ptq_report.json").read_text())
    assert stored["tuning"]["codes"] == "pv" and stored["tuning"]["flipped"] > 0
