"""Ranges of keys and values are those of everything that came by, and leave no trace."""

import torch
from families import FAMILIES, random_model

from ptq.calib.key_value_ranges import Range, ranges_of
from ptq.model.attention import cached_attentions, tap
from ptq.model.structure import find_blocks


@torch.no_grad()
def test_ranges_are_the_largest_over_batches() -> None:
    model = random_model(FAMILIES["Llama"]).eval()
    block = model.get_submodule(find_blocks(model)[0])
    # both ways round: the largest comes first once, and last once
    batches = [torch.arange(1, 9)[None], torch.arange(40, 56)[None]]
    kept: list[tuple[float, float]] = []
    (attention,) = cached_attentions(block).values()

    def note(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept.append((float(k.abs().max()), float(v.abs().max())))
        return k, v

    for order in (batches, batches[::-1]):
        kept.clear()
        watched = tap(attention, note)
        with ranges_of(block, torch.device("cpu")) as ranges:
            for batch in order:
                model(batch, use_cache=False)
        watched.remove()
        assert list(ranges) == ["self_attn"] and len(kept) == 2
        seen = ranges["self_attn"]
        assert float(seen.keys) == max(k for k, _ in kept)
        assert float(seen.values) == max(v for _, v in kept)
        assert not attention._forward_pre_hooks


def test_one_rank_has_nothing_to_combine() -> None:
    seen = Range(keys=torch.tensor(3.0), values=torch.tensor(2.0))
    seen.reduce()
    assert (float(seen.keys), float(seen.values)) == (3, 2)
