"""Where hidden states wait: the same values from every place, as copies, and nothing left
behind."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ptq.calib.hidden_states import HiddenStates

CPU = torch.device("cpu")


@pytest.mark.parametrize("storage", ["ram", "device", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_put_in_comes_out_as_a_copy(storage: str, dtype: torch.dtype) -> None:
    first, second = (torch.randn(3, 5, 8).to(dtype) for _ in range(2))
    with HiddenStates(storage, CPU) as states:
        states[0], states[1] = first, second
        assert torch.equal(states[0], first) and torch.equal(states[1], second)
        states[1] = first  # overwritten
        states[1].zero_()  # blocks may write into what they are given
        assert torch.equal(states[1], first)


def test_the_disk_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KeyboardInterrupt), HiddenStates("disk", CPU) as states:
        states[0] = torch.randn(2, 4, 8)
        assert sum(f.stat().st_size for f in tmp_path.rglob("*.bin")) == 2 * 4 * 8 * 4
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("module", "name"), [(os, "mkdir"), (shutil, "rmtree")])
def test_an_interrupt_as_the_folder_is_made_or_removed_leaves_nothing(
    module: object, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    real: Callable[..., object] = getattr(module, name)
    called = []

    def interrupted(*args: object, **options: object) -> None:
        if called:
            real(*args, **options)
        else:
            called.append(args)
            if name == "mkdir":
                real(*args, **options)
            raise KeyboardInterrupt

    monkeypatch.setattr(module, name, interrupted)
    try:
        with HiddenStates("disk", CPU) as states:
            states[0] = torch.randn(2, 4, 8)
        pytest.fail("was not interrupted")
    except KeyboardInterrupt:
        pass
    states = None  # what the program would drop at its end
    assert called and list(tmp_path.iterdir()) == []


def test_another_place_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="'ram', 'device' or 'disk', not 'tape'"):
        HiddenStates("tape", CPU)
