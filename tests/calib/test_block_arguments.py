"""With what blocks are called: stored once, imitated in form, and refused where a model cannot be
cut into blocks."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

from ptq.calib.block_arguments import Recorder
from ptq.calib.walk import Watch, walk
from ptq.model.memory_source import MemorySource

Build = Callable[..., transformers.PreTrainedModel]
Batches = list[torch.Tensor]


def outputs(model: nn.Module, batches: Batches) -> list[torch.Tensor]:
    """The hidden states at the end of a walk that changes nothing."""
    finals: list[torch.Tensor] = []
    source = MemorySource(model)
    blocks = walk(source, batches, Watch(), device="cpu", finished=lambda _, x: finals.append(x))
    assert len(list(blocks)) == 4
    return finals


def test_arguments_equal_for_all_batches_are_stored_once(tiny_model: Build, batches: Batches):
    source = MemorySource(tiny_model("gemma3"))
    recorder = Recorder(source.skeleton(), [m for _, m in source.blocks()], torch.device("cpu"))
    calls = [recorder(batch)[1] for batch in batches[:2]]
    tensors = {
        id(t)
        for batch in calls
        for call in batch
        for v in call.kwargs.values()
        for t in (v if isinstance(v, tuple) else (v,))
        if isinstance(t, torch.Tensor)
    }
    masks = [call.kwargs["attention_mask"] for call in calls[0]]
    assert masks[0] is masks[2] is calls[1][0].kwargs["attention_mask"]
    assert masks[0] is not masks[1]  # sliding window, full
    assert len(tensors) <= 7  # two masks, cosine and sine of two rotary tables, positions


class Chain(nn.Module):
    """A model of four blocks, called in the way of ``kind``; only "plain" can be cut into
    blocks."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.config = kind, transformers.LlamaConfig()
        self.embed = nn.Embedding(100, 16)
        self.layers = nn.ModuleList(Block() for _ in range(4))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        x = first = self.embed(input_ids)
        handed = first.mean()
        for layer in self.layers[::-1] if self.kind == "reversed" else self.layers:
            if self.kind == "scaled between":
                x = x * 1.5
            extra = first.mean()
            if self.kind == "depends":
                extra = x.mean()
            elif self.kind == "hands on":
                extra = handed
            x, handed = layer(hidden_states=x, extra=extra)
        return self.layers[0](x, first.mean())[0] if self.kind == "again" else x


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(
        self, hidden_states: torch.Tensor, extra: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden_states + self.linear(hidden_states) * extra, extra + 1


def test_blocks_called_by_keyword_that_return_tuples(batches: Batches):
    model = Chain("plain")
    assert all(
        torch.equal(x, model(b, use_cache=False))
        for x, b in zip(outputs(model, batches), batches, strict=True)
    )


class InPlace(nn.Module):
    """Writes into what it is given, between two layers that read it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(
        self, hidden_states: torch.Tensor, extra: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        hidden_states.add_(self.first(hidden_states))
        return hidden_states.add_(self.second(hidden_states)), None


def test_blocks_may_write_into_what_they_are_given(batches: Batches):
    model = Chain("plain")
    model.layers = nn.ModuleList(InPlace() for _ in range(4))
    with torch.no_grad():
        expected = [model(b, use_cache=False) for b in batches]
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, batches), expected, strict=True))
    blocks = walk(MemorySource(model), batches, Watch(), device="cpu")
    groups = [list(group.layers) for group in next(blocks).groups]
    assert groups == [["first"], ["second"]]  # one tensor, two contents


@pytest.mark.parametrize(
    "kind, message",
    [
        ("scaled between", "changes the hidden states between blocks 0 and 1"),
        ("depends", "gives block 1 arguments that depend on earlier blocks"),
        ("hands on", "hands more than hidden states from block to block"),
        ("reversed", "does not call its blocks once, one after the other"),
        ("again", "does not call its blocks once, one after the other"),
    ],
)
def test_models_that_cannot_be_cut_into_blocks_are_refused(
    kind: str, message: str, batches: Batches
):
    with pytest.raises(ValueError, match=message):
        outputs(Chain(kind), batches)
