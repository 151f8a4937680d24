"""Post-training 4-bit quantization of language models.

    import ptq
    ptq.quantize("path/to/model", "out", recipe=ptq.Recipe.default("nvfp4"))
    model = ptq.load("out")

Nothing heavy is imported until one of these names is used: ``ptq --help`` must not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ptq.loading import load
    from ptq.pipeline import quantize_model as quantize
    from ptq.recipe import Recipe

__all__ = ["Recipe", "__version__", "load", "quantize"]

__version__ = "0.1.0"

_LAZY = {
    "Recipe": ("ptq.recipe", "Recipe"),
    "load": ("ptq.loading", "load"),
    "quantize": ("ptq.pipeline", "quantize_model"),
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'ptq' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
