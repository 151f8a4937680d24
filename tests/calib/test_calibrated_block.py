"""Rounds: the same statistics, some at a time."""

from collections.abc import Callable

import pytest
import torch
import transformers

from ptq.calib.calibrated_block import CalibratedBlock
from ptq.calib.observer import InputGroup
from ptq.calib.walk import Watch, walk
from ptq.model.memory_source import MemorySource

Build = Callable[..., transformers.PreTrainedModel]
Batches = list[torch.Tensor]
Facts = dict[str, object]


def blocks(model: object, batches: Batches, limit: float, **changes: object):
    options = {"activations": changes.pop("activations", "ram")}
    watch = Watch(**({"probes": {1: lambda x: x, 16: lambda x: x * 2}} | changes))  # pyright: ignore[reportArgumentType]
    source = MemorySource(model)  # pyright: ignore[reportArgumentType]
    return walk(source, batches, watch, device="cpu", limit=lambda: limit, **options)  # pyright: ignore[reportArgumentType]


def facts(block: CalibratedBlock, group: InputGroup) -> Facts:
    """All that a solver asks."""
    kept = group.holdout
    return {
        "layers": list(group.layers),
        "tokens": (group.hessian.tokens, kept.tokens),
        "hessian": block.hessian(group),
        "holdout": kept.mean() if kept.tokens else None,
        "amax": {size: value.clone() for size, value in group.amax.items()},
        "sample": group.sample,
        "borrows": block.borrows(group),
    }


def collected(model: object, batches: Batches, limit: float, **changes: object):
    """Facts by block and first layer, and how many groups came in each round."""
    found: list[dict[str, Facts]] = []
    rounds: list[list[int]] = []
    for block in blocks(model, batches, limit, **changes):
        found.append({})
        rounds.append([])
        for groups in block.rounds():
            rounds[-1].append(len(groups))
            names = [next(iter(group.layers)) for group in groups]
            assert not found[-1].keys() & set(names)  # each comes once
            found[-1] |= {n: facts(block, g) for n, g in zip(names, groups, strict=True)}
        block.forget()
    return found, rounds


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {}),
        ("qwen2_moe", {}),
        ("qwen3_moe", {"activations": "disk"}),
        ("qwen3_moe", {"route_all": True}),
        ("deepseek_v3", {}),
        ("mixtral", {"feed": lambda name, x: x.round(decimals=1)}),
    ],
)
def test_rounds_give_the_same_to_the_bit(
    family: str, changes: dict, tiny_model: Build, batches: Batches
) -> None:
    model = tiny_model(family)
    at_once, whole = collected(model, batches, float("inf"), **changes)
    assert all(len(counts) == 1 for counts in whole)
    some, rounds = collected(model, batches, 1.0, **changes)
    assert max(map(len, rounds)) >= (4 if family == "mixtral" else 8)  # of experts one a round
    rare = 0
    for block, other in zip(at_once, some, strict=True):
        assert block.keys() == other.keys()
        for name, expected in block.items():
            got = other[name]
            assert got.pop("layers") == expected.pop("layers")
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
            rare += bool(expected["borrows"])
    assert rare > 0 or "route_all" in changes or family == "mixtral"


def test_a_round_holds_no_more_than_the_limit(tiny_model: Build, batches: Batches) -> None:
    model = tiny_model("qwen3_moe")
    size = 0
    first = next(blocks(model, batches, float("inf")))
    for group in first.groups:
        size += group.bytes if next(iter(group.layers)).startswith("mlp.experts.0.") else 0
    for block in blocks(model, batches, 3.5 * size):
        for index, groups in enumerate(block.rounds()):
            held = [g for g in block.groups if g.hessian._sum is not None or len(g.sample)]
            experts = [g for g in held if ".experts." in next(iter(g.layers))]
            assert sum(g.bytes for g in experts) <= 3.5 * size
            assert index == 0 or len(experts) == len(held)
            assert all(any(g is h for h in held) or not g.hessian.tokens for g in groups)
        assert block.later is not None
        block.forget()
        assert block.later is None


def test_the_walk_goes_on_as_it_would_have(tiny_model: Build, batches: Batches) -> None:
    finals: list[dict[int, torch.Tensor]] = []
    for limit in (float("inf"), 1.0):
        finals.append(made := {})
        source = MemorySource(tiny_model("deepseek_v3"))
        for block in walk(
            source,
            batches,
            Watch(),
            device="cpu",
            finished=lambda j, x, m=made: m.update({j: x}),
            limit=lambda at=limit: at,
        ):
            for _ in block.rounds():
                pass
            block.forget()
    assert all(torch.equal(finals[0][j], finals[1][j]) for j in finals[0])


def test_every_round_is_combined_over_ranks_before_it_is_used(
    tiny_model: Build, batches: Batches
) -> None:
    steps = blocks(tiny_model("mixtral"), batches, 1.0)
    block = next(steps)
    combined: list[int] = []
    for groups in block.rounds(lambda groups: combined.extend(map(id, groups))):
        assert {id(group) for group in groups} <= set(combined)
    assert set(combined) == {id(group) for group in block.groups}
