"""Post-training 4-bit quantization of language models.

    import ptq
    ptq.quantize("path/to/model", "out", recipe=ptq.Recipe.default("nvfp4"))
    model = ptq.load("out")

Nothing heavy is imported until one of these names is used: ``ptq --help`` must not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ptq.pipeline.recipe import Recipe
    from ptq.pipeline.run import quantize_model as quantize
    from ptq.runtime.load import load

__all__ = ["Recipe", "__version__", "load", "quantize"]

__version__ = "0.1.0"

_LAZY = {
    "Recipe": ("ptq.pipeline.recipe", "Recipe"),
    "load": ("ptq.runtime.load", "load"),
    "quantize": ("ptq.pipeline.run", "quantize_model"),
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'ptq' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
