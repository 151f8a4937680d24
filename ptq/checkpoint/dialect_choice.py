"""Which dialect can carry a result exactly, and why another cannot (C1).

An export that its reader would compute wrongly without an error is refused, with the reason and a
way out. All of this needs only descriptions of the layers: it is asked before quantization, and
again when the checkpoint is finished.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ptq.checkpoint.dialect import Export
from ptq.checkpoint.dialect_compressed_tensors import COMPRESSED_TENSORS
from ptq.checkpoint.dialect_ptq import PTQ
from ptq.checkpoint.dialects import DIALECTS
from ptq.checkpoint.quantization_config import LayerInfo, is_expert
from ptq.numerics.activations import default_rule
from ptq.numerics.formats import FORMATS

CHOICES = ("auto", *DIALECTS)
# What "auto" takes: the first that both of these read; the last carries everything.
AUTOMATIC = (COMPRESSED_TENSORS, PTQ)
ENGINES = ("transformers", "vLLM")


@dataclass(frozen=True)
class Choice:
    """The name of a dialect, and one line that says why it was taken."""

    dialect: str
    reason: str


def choose(
    layers: Mapping[str, LayerInfo],
    dialect: str = "auto",
    *,
    dtype: str | None,
    scales: Mapping[str, Tensor] | None = None,
    foreign: str | None = None,
) -> Choice:
    """The dialect in which to write ``layers``, or a refusal.

    Args:
        dialect: one of ``CHOICES``. ``"auto"`` takes compressed-tensors when transformers and vLLM
            both read it; an explicit one is held to what vLLM does, but for the scale
            rule of inputs, which is then told in the reason.
        dtype, scales, foreign: see :class:`ptq.checkpoint.dialect.Export`.

    Raises:
        ValueError: an unknown dialect, or an explicit one that cannot express the layers.
    """
    if dialect not in CHOICES:
        raise ValueError(f"unknown dialect {dialect!r}; choose one of {', '.join(CHOICES)}")
    export = Export(
        layers=layers,
        engines=ENGINES if dialect == "auto" else ("vLLM",),
        dtype=dtype,
        scales=scales or {},
        foreign=foreign,
    )
    if dialect != "auto":
        if reason := DIALECTS[dialect].refusal(export):
            raise ValueError(f"cannot write {dialect}: {reason}")
        other = None if DIALECTS[dialect].applies_input_rule else _other_rule(layers)
        return Choice(dialect, f"as asked; {other}" if other else "as asked")
    refusals: list[str] = []
    for candidate in AUTOMATIC:
        reason = candidate.refusal(export)
        if reason is None and not candidate.applies_input_rule:
            reason = _other_rule(layers)
        if reason is None:
            why = "; ".join(refusals) or _readers(layers, candidate.why_import(layers))
            return Choice(candidate.name, why)
        refusals.append(f"not {candidate.name}: {reason}")
    raise AssertionError(f"{AUTOMATIC[-1].name} refuses: {refusals[-1]}")


def _readers(layers: Mapping[str, LayerInfo], why_import: str | None) -> str:
    """Who reads compressed-tensors; "exactly" is what a test opened and compared bit by bit."""
    plain = all(info.rotation == 1 and not info.quantize_inputs for info in layers.values())
    if why_import is not None:
        return "vLLM reads it, and transformers after `import ptq.hf`"
    if plain and not any(map(is_expert, layers)):
        return "transformers computes it exactly, and vLLM reads it"
    return "transformers and vLLM read it"


def _other_rule(layers: Mapping[str, LayerInfo]) -> str | None:
    """What is to be said of engines that scale inputs by the format's own rule, if that is not the
    one that ``layers`` name."""
    for name, info in layers.items():
        own = default_rule(FORMATS[info.format])
        if info.quantize_inputs and info.input_rule not in ("default", own):
            return f"engines scale the inputs of {name} by {own}, not by {info.input_rule}"
    return None
