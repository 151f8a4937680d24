"""Fused experts become modules of Linears, and rare experts borrow statistics (G30).

transformers keeps the experts of a layer as 3-D parameters (``gate_up_proj`` [E, 2I, H],
``down_proj`` [E, H, I]): there is no ``nn.Linear`` whose input could be observed or whose weight
could be replaced. :func:`unfuse` puts a module in their place that computes the same from one
Linear per expert and projection, under the names that the model's checkpoints use.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from ptq.model.expert_layouts import FUSED, ExpertNames, Layout, fused_layout

Gate = Callable[
    [Tensor], Tensor
]  # (tokens, 2 I), gate and up as the fused module has them → (tokens, I)


class Expert(nn.Module):
    """One gated MLP: ``down(act(gate(x)) · up(x))``. The projections carry the checkpoint's
    names."""

    def __init__(self, layout: Layout, dtype: torch.dtype):
        super().__init__()
        self.names, self.interleaved = layout.names, layout.interleaved
        hidden, intermediate, bias = layout.hidden, layout.intermediate, layout.biased
        self.add_module(self.names.gate, nn.Linear(hidden, intermediate, bias=bias, dtype=dtype))
        self.add_module(self.names.up, nn.Linear(hidden, intermediate, bias=bias, dtype=dtype))
        self.add_module(self.names.down, nn.Linear(intermediate, hidden, bias=bias, dtype=dtype))

    def forward(self, x: Tensor, gating: Gate) -> Tensor:  # (tokens, hidden) → (tokens, hidden)
        gate, up, down = (
            self.get_submodule(name) for name in (self.names.gate, self.names.up, self.names.down)
        )
        both = (
            torch.stack([gate(x), up(x)], dim=-1)
            if self.interleaved
            else torch.cat([gate(x), up(x)], dim=-1)
        )
        return down(gating(both.flatten(1)))


class Experts(nn.Module):
    """Experts as a module of Linears, called like the fused module it replaces.

    ``routed`` holds, while an expert runs, the positions of its tokens among all tokens of the
    layer: whoever watches the Linears can tell which sequence a row belongs to. With ``everywhere``
    every token runs through every expert, so that all of them are seen by whoever watches; what is
    returned still counts only the experts that were chosen.
    """

    def __init__(self, layout: Layout, gating: Gate, dtype: torch.dtype):
        super().__init__()
        self.num_experts, self.gating = layout.count, gating
        self.routed: Tensor | None = None
        self.everywhere = False
        for i in range(layout.count):
            self.add_module(str(i), Expert(layout, dtype))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden_states)  # (tokens, hidden)
        everyone = (
            torch.arange(len(hidden_states), device=hidden_states.device)
            if self.everywhere
            else None
        )
        called = range(self.num_experts) if self.everywhere else top_k_index.unique().tolist()
        for expert in called:  # ascending: sums in the order of the fused module
            if expert >= self.num_experts:  # a marker for "nowhere"
                continue
            slot, token = _routed(top_k_index, expert)
            self.routed = token if everyone is None else everyone
            y = self.get_submodule(str(expert))(hidden_states[self.routed], self.gating)
            y = (y if everyone is None else y[token]) * top_k_weights[token, slot, None]
            result.index_add_(0, token, y.to(result.dtype))
        self.routed = None
        return result

    def run(self, hidden_states: Tensor, top_k_index: Tensor, experts: Iterable[int]) -> None:
        """Some experts on the tokens that a forward with these arguments gave them; what they
        return is dropped. For whoever watches the Linears."""
        for expert in experts:
            token = _routed(top_k_index, expert)[1]
            if self.everywhere:
                token = torch.arange(len(hidden_states), device=hidden_states.device)
            if len(token):
                self.routed = token
                self.get_submodule(str(expert))(hidden_states[token], self.gating)
        self.routed = None


def _routed(top_k_index: Tensor, expert: int) -> tuple[Tensor, ...]:
    """(slots, tokens) of an expert; slots first, as the fused module does."""
    return torch.where(top_k_index.T.eq(expert))


@contextmanager
def routed_everywhere(module: nn.Module, everywhere: bool = True) -> Iterator[None]:
    """While it lasts, every token runs through all experts in ``module``; the outputs stay those of
    the chosen ones."""
    layers = [m for m in module.modules() if isinstance(m, Experts)] if everywhere else []
    for experts in layers:
        experts.everywhere = True
    try:
        yield
    finally:
        for experts in layers:
            experts.everywhere = False


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of ``model`` that hold fused experts, by name.

    Raises ValueError, with the class, for modules with fused experts that are no stack of plain
    gated MLPs: with other parameters, without gate, or normed afterwards.
    """
    modules = {}
    for name, module in model.named_modules():
        fused = {k: p for k, p in module.named_parameters(recurse=False) if p.ndim == 3}
        if (
            not fused
            or isinstance(module, nn.modules.conv._ConvNd)
            or "expert" not in f"{name}.{type(module)}".lower()
        ):
            continue
        if reason := _unlike_plain(module):
            raise ValueError(
                f"{name} ({type(module).__name__}) holds fused experts {reason}; this architecture "
                "is not supported "
                "(only gated experts in gate_up_proj and down_proj are)"
            )
        modules[name] = module
    return modules


def _unlike_plain(module: nn.Module) -> str | None:
    biased = getattr(module, "has_bias", False)
    expected = {*FUSED, *(f"{name}_bias" for name in FUSED)} if biased else {*FUSED}
    if getattr(module, "has_gate", True) is False:
        return "without a gate"
    if getattr(module, "has_post_expert_norm", False):
        return "with a norm after each expert"
    if set(dict(module.named_parameters(recurse=False))) != expected:
        return (
            f"in the parameters {', '.join(k for k, _ in module.named_parameters(recurse=False))}"
        )
    return None if hasattr(module, "_apply_gate") else "with a forward of their own"


def unfuse(model: nn.Module, names: Callable[[str], ExpertNames]) -> dict[str, Layout]:
    """Replace every module of fused experts in ``model``, in place; return how the experts of each
    were stored.

    ``names(path)`` says what the projections of the experts at ``path`` are called. Parameters on
    the meta device stay there; real ones become views of the fused tensors. Raises ValueError for
    experts that cannot be split.
    """
    layouts = {}
    for path, fused in fused_experts(model).items():
        layouts[path] = fused_layout(fused, names(path))
        model.set_submodule(path, _split(fused, layouts[path]))
    return layouts


def _split(fused: nn.Module, layout: Layout) -> Experts:
    stacked = {name: p.detach() for name, p in fused.named_parameters(recurse=False)}
    for name in stacked:
        delattr(fused, name)
    gating = cast(
        Gate, fused._apply_gate
    )  # bound to what is left of the fused module: activation, limits
    with init_empty_weights(include_buffers=False):
        experts = Experts(layout, gating, stacked[FUSED[1]].dtype)
    if not stacked[FUSED[1]].is_meta:
        for name, source, _, part in layout.parts():
            owner, _, leaf = name.rpartition(".")
            value = nn.Parameter(part.take(stacked[source]), requires_grad=False)
            setattr(experts.get_submodule(owner), leaf, value)
    return experts.train(fused.training)
