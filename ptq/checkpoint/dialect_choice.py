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
from ptq.checkpoint.quantization_config import LayerInfo

CHOICES = ("auto", *DIALECTS)
# What "auto" takes: the first that both of these compute exactly; the last carries everything.
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
            both compute it exactly; an explicit one is held to what vLLM does.
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
        return Choice(dialect, "as asked")
    refusals: list[str] = []
    for candidate in AUTOMATIC:
        reason = candidate.refusal(export)
        if reason is None:
            why = "; ".join(refusals) or f"{' and '.join(ENGINES)} compute it exactly"
            return Choice(candidate.name, why)
        refusals.append(f"not {candidate.name}: {reason}")
    raise AssertionError(f"{AUTOMATIC[-1].name} refuses: {refusals[-1]}")
