"""A direct cast is the model with rounded layers as the evaluation sees it, and goes on after an
interruption."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ptq.numerics.formats import FORMATS
from ptq.numerics.rotation import Rotation
from ptq.pipeline.analysis import rounded
from ptq.pipeline.cast_results import DirectCast
from ptq.pipeline.direct_cast import CastOptions, direct_cast
from ptq.runtime.evaluate import Evaluation, evaluate
from ptq.text.windows import load_text, load_tokenizer


@pytest.fixture
def options(tiny_text: Path) -> CastOptions:
    return CastOptions(
        text=str(tiny_text), seq_len=32, max_tokens=96, formats=("nvfp4", "nvint4", "mxint8")
    )


class Rounded(nn.Module):
    """The law of a direct cast, a layer at a time."""

    def __init__(self, layer: nn.Linear, format: str, rotated: bool) -> None:
        super().__init__()
        self.format = FORMATS[format]
        self.rotation = Rotation(self.format.group_size if rotated else 1)
        self.weight, self.bias = self._round(layer.weight.detach()), layer.bias

    def _round(self, x: Tensor) -> Tensor:
        return rounded(self.rotation.exact(x), self.format, "absmax")

    def forward(self, x: Tensor) -> Tensor:
        read = self._round(x.flatten(0, -2)).view(x.shape)
        return nn.functional.linear(read, self.weight, self.bias)


def expected(path: Path, options: CastOptions, format: str, rotated: bool) -> Evaluation:
    original = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for name, layer in list(model.model.layers.named_modules()):
        if isinstance(layer, nn.Linear):
            model.model.layers.set_submodule(name, Rounded(layer, format, rotated))
    ids = load_tokenizer(path)(load_text(options.text), add_special_tokens=False)["input_ids"]
    return evaluate(
        model, torch.tensor(ids), reference=original, seq_len=32, max_tokens=options.max_tokens
    )


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_figures_are_those_of_the_rounded_model(
    make_tiny_model, kind: str, options: CastOptions
) -> None:
    path = make_tiny_model(kind)
    steps: list[tuple[int, int, str]] = []
    found = direct_cast(path, options, on_step=lambda *step: steps.append(step))
    assert [step[:2] for step in steps] == [(i, 5) for i in range(1, 6)]
    assert (found.tokens, found.seq_len) == (3 * 31, 32) and len(found.casts) == 6
    for format, rotated in (("nvfp4", False), ("nvint4", True)):
        cast, wanted = found.cast(format, rotated=rotated), expected(path, options, format, rotated)
        assert cast.nll == pytest.approx(wanted.nll, rel=1e-6)
        assert cast.kl == pytest.approx(wanted.kl, rel=1e-4)
        assert cast.kl_top25 == pytest.approx(wanted.kl_top25, rel=1e-4)
        assert cast.top1_agreement == pytest.approx(wanted.top1_agreement)
        assert found.reference_nll == pytest.approx(wanted.reference_nll, rel=1e-6)
        assert cast.kl_top25 == pytest.approx(sum(cast.windows) / 3)
    assert found.cast("mxint8", rotated=False).kl < 0.05 * found.cast("nvfp4", rotated=False).kl


def comparable(found: DirectCast) -> tuple[object, ...]:
    return found.identity, found.reference_nll, found.casts


def test_an_interrupted_cast_goes_on(
    tiny_llama: Path, options: CastOptions, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int, text: str) -> None:
        if done == 1:
            raise Stop

    folder = tmp_path / "states"
    with pytest.raises(Stop):
        direct_cast(tiny_llama, options, folder=folder, on_step=stop)
    assert sorted(file.name for file in folder.iterdir()) == ["000001.safetensors", "run.json"]
    (tmp_path / "mine").write_text("keep", "utf-8")
    steps: list[int] = []
    other = CastOptions(**{**vars(options), "max_tokens": 64})
    with pytest.raises(FileExistsError, match="unfinished direct cast of another model"):
        direct_cast(tiny_llama, other, folder=folder)
    found = direct_cast(
        tiny_llama, options, folder=folder, on_step=lambda done, *_: steps.append(done)
    )
    assert steps == [2, 3, 4, 5] and not folder.exists()
    assert comparable(found) == comparable(direct_cast(tiny_llama, options))
    assert direct_cast(tiny_llama, options, known=found) is found
    assert direct_cast(tiny_llama, other, known=found).tokens == 2 * 31


def test_experts_without_tokens_are_no_obstacle(make_tiny_model, options: CastOptions) -> None:
    few = CastOptions(text=options.text, seq_len=2, max_tokens=4, formats=("nvfp4",))
    found = direct_cast(make_tiny_model("qwen3_moe", num_experts=8), few)
    assert all(cast.kl > 0 for cast in found.casts)


def test_what_cannot_be_cast_is_refused(
    make_tiny_model, tiny_llama: Path, options: CastOptions
) -> None:
    with pytest.raises(ValueError, match="unknown format 'int3'"):
        CastOptions(formats=("int3",))
    ragged = make_tiny_model("llama", intermediate_size=112)
    with pytest.raises(ValueError, match=r"down_proj.*--ignore down_proj"):
        direct_cast(ragged, options)
    left_out = CastOptions(**{**vars(options), "ignore": ("down_proj",)})
    assert direct_cast(ragged, left_out).casts[0].kl > 0
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        direct_cast(tiny_llama, CastOptions(**{**vars(options), "text": "none.txt"}))
