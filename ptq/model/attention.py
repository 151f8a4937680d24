"""Where a model keeps keys and values: attention layers, and what they hand to a cache."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# What attention layers call the cache that they are given, in all supported versions.
CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")

KeyValues = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def cached_attentions(module: nn.Module) -> dict[str, nn.Module]:
    """The attention layers in ``module`` that keep keys and values, by name within it.

    They are the innermost modules that take a cache, and have weights.
    """
    takers = {n: m for n, m in module.named_modules() if _cache_parameter(m) is not None}
    return {
        name: m
        for name, m in takers.items()
        if not any(
            other.startswith(f"{name}." if name else "") for other in takers if other != name
        )
        and any(isinstance(child, nn.Linear) or hasattr(child, "weight") for child in m.children())
    }


def check_key_values(blocks: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise ValueError for decoder blocks, with their names, of which none keeps keys and values by
    head, or some keep them compressed. Blocks that keep something else, as a recurrence does, may
    be among them."""
    found = 0
    for name, block in blocks:
        for inner, module in block.named_modules():
            if hasattr(module, "kv_b_proj"):
                raise ValueError(
                    f"{name}.{inner} keeps compressed keys and values (MLA), for which no scales "
                    "are known; leave out --kv-cache"
                )
        found += len(cached_attentions(block))
    if not found:
        raise ValueError(
            "the model has no attention layer that keeps keys and values; leave out --kv-cache"
        )


def tap(attention: nn.Module, see: KeyValues) -> RemovableHandle:
    """Let ``see`` have the keys and values (batch, heads, tokens, features), after position
    embeddings, that ``attention`` hands to its cache, and hand on what it returns.

    So also where no cache is wanted: then attention reads what ``see`` returns.
    """
    parameter = _cache_parameter(attention)
    assert parameter is not None, "no attention layer"
    name, index = parameter

    def hook(
        _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        if index < len(args):
            return (*args[:index], _Tapped(args[index], see), *args[index + 1 :]), kwargs
        return args, kwargs | {name: _Tapped(kwargs.get(name), see)}

    return attention.register_forward_pre_hook(hook, with_kwargs=True)


class _Tapped:
    """A cache, or none, that lets a function see what comes in."""

    def __init__(self, cache: Any, see: KeyValues) -> None:
        self.cache, self.see = cache, see

    def update(
        self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.see(keys, values)
        if self.cache is None:
            return keys, values
        return self.cache.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def _cache_parameter(module: nn.Module) -> tuple[str, int] | None:
    """Name and position of the cache among the arguments of ``module``."""
    names = list(inspect.signature(module.forward).parameters)
    return next(((name, names.index(name)) for name in CACHES if name in names), None)


def stored_stem(attention: nn.Module, name: str, checkpoint_name: Callable[[str], str]) -> str:
    """What a checkpoint calls the attention layer ``name`` of the model, which has no tensor by
    itself: its layers have.

    Args:
        checkpoint_name: what it calls a tensor of the model.
    """
    for inner, _ in attention.named_children():
        ending = f".{inner}.weight"
        stored = checkpoint_name(f"{name}{ending}")
        if stored.endswith(ending):
            return stored.removesuffix(ending)
    return name
