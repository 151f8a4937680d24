"""The training experiment: blocks rounded as it says, gradients through rounded products, a record
that is continued."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn


@pytest.fixture
def script(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "scripts"))  # it imports its neighbour
    file = root / "scripts" / "train_mxint8.py"
    spec = importlib.util.spec_from_file_location("train_mxint8", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_spare_code_is_what_differs(script: ModuleType) -> None:
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    one, other = (script.RUNS[f"int8, bf16 scales, {kind}"] for kind in script.KINDS)
    scales = one.scales(x.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)).float()
    integers = [(y(x).unflatten(-1, (-1, 32)) / scales).round() for y in (one, other)]
    assert (integers[0].min(), integers[0].max()) == (-127, 127)
    assert (integers[1].min(), integers[1].max()) == (-128, 127)
    moved = integers[0] != integers[1]
    assert bool(moved.any()) and set(integers[1][moved].tolist()) == {-128.0}
    assert script.bias(one) == 0 and -60 < script.bias(other) < -40


def test_all_three_products_are_of_rounded_operands(script: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    rounded = script.RUNS["mxint8, symmetric"]
    layer = script.BlockLinear(nn.Linear(64, 32, bias=False), rounded)
    x = torch.randn(2, 32, 64, generator=generator, requires_grad=True)
    gradient = torch.randn(2, 32, 32, generator=generator)
    y = layer(x)
    y.backward(gradient.bfloat16())
    rows, flat = x.detach().flatten(0, 1).bfloat16(), gradient.flatten(0, 1).bfloat16()
    weight = layer.weight.detach().bfloat16()
    expected = (rounded(rows) @ rounded(weight).T).bfloat16()
    assert torch.equal(y.flatten(0, 1), expected)
    to_input = rounded(flat) @ rounded(weight.T.contiguous()).T
    assert x.grad is not None and layer.weight.grad is not None
    assert torch.equal(x.grad.flatten(0, 1), to_input.bfloat16().float())
    to_weight = rounded(flat.T.contiguous()) @ rounded(rows.T.contiguous()).T
    assert torch.equal(layer.weight.grad, to_weight)


def test_a_record_of_another_experiment_is_refused(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    out = tmp_path / "record.json"
    out.write_text(json.dumps({"settings": {"steps": 7}, "runs": []}), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["train_mxint8.py", "--out", str(out)])
    assert script.main() == 2
    assert "other settings" in capsys.readouterr().err


def test_the_summary_pairs_runs_of_a_seed(script: ModuleType) -> None:
    runs = [
        {"run": name, "seed": seed, "held_out": 5 + seed + gap * (seed + 1)}
        for name, gap in (("bfloat16", 0.0), ("mxfp8", 0.25))
        for seed in (0, 1)
    ]
    row = script.summary(runs)["mxfp8"]
    assert row["to_bfloat16"] == 0.375 and row["standard_error"] == 0.125


def test_the_picture_has_a_mark_for_every_run(script: ModuleType, tmp_path: Path) -> None:
    runs = [
        {"run": name, "seed": seed, "losses": [8 - 0.1 * step + gap for step in range(20)]}
        for name, gap in zip(script.RUNS, (0.0, 0.1, 0.2, 0.3, 0.4, 0.5), strict=True)
        for seed in (0, 1)
    ]
    script.draw(runs, tmp_path / "curves.svg")
    picture = (tmp_path / "curves.svg").read_text(encoding="utf-8")
    assert 'data-marks="12"' in picture.partition(">")[2]
    assert "mxint8, asymmetric: 0.3000 at step 20" in picture
