"""Who opens a checkpoint, and what comes out of it: the words in which every answer is given.

A dialect says it of its own files (:attr:`ptq.checkpoint.dialect.Dialect.opens`); the choice of a
dialect, ``ptq formats``, the model card, ``--dry-run`` and errors read it there. Most of it was
read in the source of the engines; what was run is in ``engine_results.json``, which
``scripts/test_engines`` writes, and nothing is called tested or exact that is not there.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from functools import cache
from pathlib import Path

from ptq.checkpoint.quantization_config import LayerInfo, is_expert

TRANSFORMERS, VLLM, SGLANG, TENSORRT = "transformers", "vLLM", "SGLang", "TensorRT-LLM"
ENGINES: tuple[str, ...] = (TRANSFORMERS, VLLM, SGLANG, TENSORRT)
# ``--target`` → the engines that must compute the result right.
TARGETS: dict[str, tuple[str, ...]] = {
    "transformers": (TRANSFORMERS,),
    "vllm": (VLLM,),
    "sglang": (SGLANG,),
    "trtllm": (TENSORRT,),
    "any": ENGINES,
}
IMPORT = "import ptq"  # what teaches transformers our dialects
IMPORTED = f"transformers after {IMPORT}"  # how it is named where it was opened so
INSTALL = "pip install ptq-llm"  # what teaches vLLM our dialects, beside it
PLUGGED = f"vLLM after {INSTALL}"
RESULTS = Path(__file__).with_name("engine_results.json")


class Verdict(Enum):
    """What an engine makes of a checkpoint."""

    RIGHT = "right"
    NARROW = "right, but inputs stay in 16 bits"
    IMPORT = f"right after `{IMPORT}`, an error without it"
    INSTALL = f"right after `{INSTALL}` beside it, an error without it"
    STOPS = "stops with an error"
    WRONG = "computes it wrongly without an error"
    UNKNOWN = "not known"

    @property
    def serves(self) -> bool:
        """Whether a checkpoint may be written for an engine of which this is said."""
        return self in (Verdict.RIGHT, Verdict.NARROW, Verdict.IMPORT, Verdict.INSTALL)


@dataclass(frozen=True)
class Opening:
    """A verdict, and a sentence without a full stop: a caveat of what serves; else why it does not,
    and what to do."""

    verdict: Verdict
    note: str = ""

    @property
    def refusal(self) -> str | None:
        """Why nothing should be written for this engine, or None."""
        if self.verdict.serves:
            return None
        return self.note or self.verdict.value

    def __str__(self) -> str:
        return f"{self.verdict.value}: {self.note}" if self.note else self.verdict.value


Openings = Mapping[str, Opening]  # by engine


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What engines tell checkpoints apart by.

    Attributes:
        dialect: its name.
        formats: of the layers, sorted and joined by ``+``.
        experts: whether some of them are routed experts.
    """

    dialect: str
    formats: str
    experts: bool
    rotated: bool
    quantize_inputs: bool

    @classmethod
    def of(cls, dialect: str, layers: Mapping[str, LayerInfo]) -> "Kind":
        """The kind of a checkpoint of quantized ``layers``."""
        infos = layers.values()
        return cls(
            dialect=dialect,
            formats="+".join(sorted({info.format for info in infos})),
            experts=any(map(is_expert, layers)),
            rotated=any(info.rotation > 1 for info in infos),
            quantize_inputs=any(info.quantize_inputs for info in infos),
        )


WORKS, NARROW, WRONG = "works", "works, inputs in 16 bits", "wrong"
UNCLEAR, REFUSED, ABSENT = "too noisy to tell", "refused", "not installed"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out when an engine opened a checkpoint.

    Attributes:
        engine: the way it was opened, such as ``"transformers"``.
        outcome: one of the words above.
        version: of its packages; empty if it is not installed.
        kl: KL(ptq.load in float32 ‖ engine), nats per token; against ``ptq.load`` with inputs in
            16 bits where that is what it computes. None if there is nothing to compare.
        yardstick: the same of ``ptq.load`` in bfloat16.
        same_bits: whether its logits are those of ``ptq.load`` in bfloat16, bit by bit.
        reason: of a refusal, in the engine's words.
        seconds: that it took.
    """

    engine: str
    outcome: str
    version: str = ""
    kl: float | None = None
    yardstick: float | None = None
    same_bits: bool = False
    reason: str | None = None
    seconds: float = 0.0

    @property
    def works(self) -> bool:
        """Whether it computes what the checkpoint says, or that with inputs in 16 bits."""
        return self.outcome in (WORKS, NARROW)

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


@cache
def results() -> tuple[tuple[Kind, Result], ...]:
    """What was run, of this version of ptq; the file is written by ``scripts/test_engines``."""
    if not RESULTS.is_file():
        return ()
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    return tuple((Kind(**row["kind"]), Result(**row["result"])) for row in rows)


def _of(engine: str, kind: Kind) -> list[Result]:
    return [r for k, r in results() if k == kind and r.engine == engine and r.outcome != ABSENT]


def opened_by(engine: str, kind: Kind) -> str | None:
    """The versions of ``engine`` in which a checkpoint of this kind was opened and was right, for
    people; None if there are none."""
    versions = [result.version for result in _of(engine, kind) if result.works]
    return "; ".join(dict.fromkeys(versions)) or None


def exact(engine: str, kind: Kind) -> bool:
    """Whether such a checkpoint was opened, and every logit was that of ``ptq.load``, bit by
    bit, in all versions that were tried."""
    found = _of(engine, kind)
    return bool(found) and all(result.same_bits for result in found)


def refusals(openings: Openings, engines: Iterable[str]) -> dict[str, str]:
    """Why some of ``engines`` must not get such a checkpoint, by engine."""
    found = {engine: openings[engine].refusal for engine in engines}
    return {engine: reason for engine, reason in found.items() if reason is not None}
