"""Post-training 4-bit quantization of language models.

    import ptq

    ptq.analyze("path/to/model", "study")                     # which format for which layer, why
    ptq.forecast("path/to/model", format="nvfp4")             # memory, time, size: before anything
    ptq.quantize("path/to/model", "out", format="nvfp4")      # a checkpoint, and its report
    ptq.evaluate("out", "path/to/model")                      # perplexity, KL to the original
    model, tokenizer = ptq.load("out", tokenizer=True)        # a transformers model

    ptq.inspect("out")                                        # sizes, the error of every layer
    ptq.verify("out")                                         # files and tensors are as written
    ptq.convert("out", "other", to="ptq")                     # another dialect, the same numbers

What is left out is the best known choice; ``help(ptq.quantize)`` lists all. Results print as
tables, in notebooks too. After ``import ptq``, ``AutoModelForCausalLM.from_pretrained("out")``
opens what ptq writes.

Nothing heavy is imported until one of these names is used: ``ptq --help`` must not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ptq.runtime import transformers_hook

if TYPE_CHECKING:
    from ptq.api.checkpoints import Written, convert, evaluate, inspect, load, verify
    from ptq.api.runs import analyze, forecast, quantize
    from ptq.pipeline.forecast import Forecast
    from ptq.pipeline.recipe import Recipe
    from ptq.pipeline.study import Study
    from ptq.runtime.evaluate import Evaluation
    from ptq.runtime.inspect import Report
    from ptq.runtime.verify import Verdict

__all__ = [
    "Evaluation",
    "Forecast",
    "Recipe",
    "Report",
    "Study",
    "Verdict",
    "Written",
    "__version__",
    "analyze",
    "convert",
    "evaluate",
    "forecast",
    "inspect",
    "load",
    "quantize",
    "verify",
]

__version__ = "0.1.0"

_LAZY = {
    "Evaluation": "ptq.runtime.evaluate",
    "Forecast": "ptq.pipeline.forecast",
    "Recipe": "ptq.pipeline.recipe",
    "Report": "ptq.runtime.inspect",
    "Study": "ptq.pipeline.study",
    "Verdict": "ptq.runtime.verify",
    "Written": "ptq.api.checkpoints",
    "analyze": "ptq.api.runs",
    "convert": "ptq.api.checkpoints",
    "evaluate": "ptq.api.checkpoints",
    "forecast": "ptq.api.runs",
    "inspect": "ptq.api.checkpoints",
    "load": "ptq.api.checkpoints",
    "quantize": "ptq.api.runs",
    "verify": "ptq.api.checkpoints",
}

transformers_hook.install()


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'ptq' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
