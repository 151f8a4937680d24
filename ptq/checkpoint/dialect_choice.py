"""Which dialect can carry a result exactly, and why another cannot (C1).

An export that its reader would compute wrongly without an error is refused, with the reason and a
way out. All of this needs only descriptions of the layers: it is asked before quantization, and
again when the checkpoint is finished.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ptq.checkpoint.dialect import Dialect, Export
from ptq.checkpoint.dialect_compressed_tensors import COMPRESSED_TENSORS
from ptq.checkpoint.dialect_ptq import PTQ
from ptq.checkpoint.dialects import DIALECTS
from ptq.checkpoint.engines import (
    IMPORT,
    TARGETS,
    TRANSFORMERS,
    VLLM,
    Kind,
    Verdict,
    exact,
    refusals,
)
from ptq.checkpoint.quantization_config import LayerInfo
from ptq.numerics.activations import default_rule
from ptq.numerics.formats import FORMATS

CHOICES = ("auto", *DIALECTS)
# What "auto" takes without a target: the first that both of these read; the last carries
# everything.
AUTOMATIC = (COMPRESSED_TENSORS, PTQ)
READERS = (TRANSFORMERS, VLLM)


@dataclass(frozen=True)
class Choice:
    """The name of a dialect, and one line that says why it was taken."""

    dialect: str
    reason: str


@dataclass(frozen=True)
class Readers:
    """Who is to read a result: ``dialect`` and ``target`` as :func:`choose` takes them."""

    dialect: str = "auto"
    target: str | None = None

    @classmethod
    def of(cls, dialect: "str | Readers") -> "Readers":
        """Those of a dialect alone."""
        return dialect if isinstance(dialect, Readers) else cls(dialect)


def choose(
    layers: Mapping[str, LayerInfo],
    dialect: str = "auto",
    *,
    target: str | None = None,
    dtype: str | None,
    scales: Mapping[str, Tensor] | None = None,
    foreign: str | None = None,
    kv_cache: str | None = None,
) -> Choice:
    """The dialect in which to write ``layers``, or a refusal.

    Args:
        dialect: one of ``CHOICES``. Without a target ``"auto"`` takes compressed-tensors when
            transformers and vLLM both read it, and an explicit one is held to the engines that it
            names itself, but for the scale rule of inputs, which is then told in the reason.
        target: a key of :data:`ptq.checkpoint.engines.TARGETS`: whose engines must all compute the
            result right. ``"auto"`` then takes the first dialect with which they do.
        dtype, scales, foreign, kv_cache: see :class:`ptq.checkpoint.dialect.Export`.

    Raises:
        ValueError: an unknown dialect or target; one that cannot express the layers, or that does
            not read them right.
    """
    if dialect not in CHOICES:
        raise ValueError(f"unknown dialect {dialect!r}; choose one of {', '.join(CHOICES)}")
    if target is not None and target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; choose one of {', '.join(TARGETS)}")
    export = Export(
        layers=layers, dtype=dtype, scales=scales or {}, foreign=foreign, kv_cache=kv_cache
    )
    if target is not None:
        return _for_target(export, dialect, target)
    if dialect != "auto":
        if reason := refusal(DIALECTS[dialect], export, DIALECTS[dialect].held_to):
            raise ValueError(f"cannot write {dialect}: {reason}")
        other = None if DIALECTS[dialect].applies_input_rule else _other_rule(layers)
        return Choice(dialect, f"as asked; {other}" if other else "as asked")
    reasons: list[str] = []
    for candidate in AUTOMATIC:
        last = candidate is AUTOMATIC[-1]
        reason = refusal(candidate, export, () if last else READERS)
        if reason is None and not candidate.applies_input_rule:
            reason = _other_rule(layers)
        if reason is None:
            return Choice(candidate.name, "; ".join(reasons) or _readers(layers, candidate))
        reasons.append(f"not {candidate.name}: {reason}")
    raise AssertionError(f"{AUTOMATIC[-1].name} refuses: {reasons[-1]}")


def refusal(dialect: Dialect, export: Export, engines: tuple[str, ...]) -> str | None:
    """Why ``export`` must not be written in ``dialect`` if ``engines`` are to compute it, and what
    to do; None if it may be."""
    if reason := dialect.refusal(export):
        return reason
    return next(iter(refusals(dialect.opens(export.layers), engines).values()), None)


def _for_target(export: Export, dialect: str, target: str) -> Choice:
    """The first dialect that every engine of ``target`` computes right; ValueError if none is."""
    engines, reasons = TARGETS[target], list[str]()
    candidates = list(DIALECTS.values()) if dialect == "auto" else [DIALECTS[dialect]]
    for candidate in candidates:
        if reason := candidate.refusal(export):
            reasons.append(f"{candidate.name}: {reason}")
            continue
        openings = candidate.opens(export.layers)
        if found := refusals(openings, engines):
            reasons += [f"{candidate.name} in {who}: {why}" for who, why in found.items()][:1]
            continue
        said = [f"{who}: {openings[who]}" for who in engines]
        other = None if candidate.applies_input_rule else _other_rule(export.layers)
        return Choice(candidate.name, "; ".join([*said, other] if other else said))
    raise ValueError(f"nothing to write for --target {target}: {'; '.join(reasons)}")


def _readers(layers: Mapping[str, LayerInfo], dialect: Dialect) -> str:
    """Who reads it, of :data:`READERS`; "exactly" is what was opened and compared bit by bit."""
    opening = dialect.opens(layers)[TRANSFORMERS]
    if opening.verdict is Verdict.IMPORT:
        return f"vLLM reads it, and transformers after `{IMPORT}`"
    if exact(TRANSFORMERS, Kind.of(dialect.name, layers)):
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
