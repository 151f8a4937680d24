"""Which modules route tokens to experts: they stay in high precision unless somebody asks for them by name."""

from torch import nn


def is_router(model: nn.Module, name: str) -> bool:
    """Whether the module ``name`` of ``model`` decides which experts a token goes to, or how much they count.

    That is so if it, or what holds it, is called ``router``, or ``gate`` or ``…_gate`` beside experts. The gate
    projection of an MLP is none.
    """
    parts = name.split(".")
    if any("router" in part for part in parts[-2:]):
        return True
    for depth in range(1, min(2, len(parts)) + 1):
        leaf, beside = parts[-depth], model.get_submodule(".".join(parts[:-depth]))
        if (leaf == "gate" or leaf.endswith("_gate")) and any("expert" in n for n, _ in beside.named_children()):
            return True
    return False
