"""What hooks make of what layers read: groups, statistics, samples."""

import pytest
import torch
from torch import Tensor, nn

from ptq.calib.observer import SAMPLE, InputGroup, Observer


class Block(nn.Module):
    """q and k read x; o reads what q made; late reads x after it was written into."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o, self.late, self.idle = (nn.Linear(8, 8) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.o(self.q(x) + self.k(x))
        x += 1
        return y + self.late(x)


def observed(batches: list[Tensor], held: list[Tensor | None] | None = None, **options):
    block = Block()
    linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    settings = {"probes": {1: lambda x: x, 3: lambda x: x}, "feed": None} | options
    observer = Observer(
        block, linears, device=torch.device("cpu"), batches=len(batches), prefix="b.", **settings
    )
    with torch.no_grad(), observer.installed():
        for index, batch in enumerate(batches):
            observer.expect((batch.shape[0], batch.shape[1]), held[index] if held else None)
            block(batch.clone())
    return observer.groups()


def by_first(groups: list[InputGroup]) -> dict[str, InputGroup]:
    return {next(iter(group.layers)): group for group in groups}


def test_layers_that_read_one_tensor_are_a_group_unless_it_changed() -> None:
    groups = observed([torch.randn(2, 6, 8) for _ in range(3)])
    assert [list(group.layers) for group in groups] == [["q", "k"], ["o"], ["late"], ["idle"]]
    assert [group.hessian.tokens for group in groups] == [36, 36, 36, 0]


def test_statistics_are_those_of_all_tokens() -> None:
    batches = [torch.randn(2, 6, 8) for _ in range(3)]
    x = torch.cat([batch.flatten(0, 1) for batch in batches])
    group = by_first(observed(batches))["q"]
    torch.testing.assert_close(group.hessian.mean(), (x.double().T @ x.double()) / len(x))
    assert torch.equal(group.amax[1], x.abs().amax())
    assert set(group.amax) == {1}  # 3 does not divide 8 features
    assert torch.equal(group.sample, x)


def test_held_sequences_are_counted_apart() -> None:
    batches = [torch.randn(2, 6, 8), torch.randn(2, 6, 8)]
    group = by_first(observed(batches, [None, torch.tensor([False, True])]))["q"]
    assert (group.hessian.tokens, group.holdout.tokens) == (18, 6)
    held = batches[1][1].double()
    torch.testing.assert_close(group.holdout.mean(), held.T @ held / 6)


def test_a_feed_changes_what_is_read_later_and_not_what_is_measured() -> None:
    batches = [torch.randn(2, 6, 8)]
    names: list[str] = []

    def feed(name: str, x: Tensor) -> Tensor:
        names.append(name)
        return torch.zeros_like(x)

    groups = by_first(observed(batches, feed=feed))
    x = batches[0].flatten(0, 1).double()
    torch.testing.assert_close(groups["q"].hessian.mean(), x.T @ x / len(x))
    assert names == ["b.q", "b.k", "b.o", "b.late"]


def test_samples_are_bounded_and_spread() -> None:
    groups = by_first(observed([torch.randn(4, 512, 8) for _ in range(3)]))
    assert len(groups["q"].sample) == SAMPLE and len(groups["idle"].sample) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_name_the_layer(bad: float) -> None:
    x = torch.randn(2, 6, 8)
    x[1, 2, 3] = bad
    with pytest.raises(ValueError, match=r"b\.q: its inputs contain NaN or infinity"):
        observed([x])
