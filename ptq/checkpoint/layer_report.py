"""What a run found out about a layer, as ``ptq_report.json`` keeps it."""

from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field

from ptq.reading.schema import Count, check, plain


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """How a layer was quantized, and what that cost.

    Errors are relative squared output errors, ``‖(W - Ŵ) X‖² / ‖W X‖²``: 0 is exact, 1 as bad as a
    layer of zeros. Where nothing was measured of the inputs, they are those of the weights,
    ``‖W - Ŵ‖² / ‖W‖²``.

    Attributes:
        name: of the layer; of the model's while a run goes on, of the checkpoint's on disk.
        rotation: inputs to a block of the rotation, 1 for none.
        algorithm: whose codes were kept, a key of :data:`ptq.numerics.algorithms.ALGORITHMS`, with
            ``+descent`` if coordinate descent refined them (GPTQ's are then still called ``gptq``).
        damping: share of the Hessian's mean diagonal that was added to it; 0 where it was not used.
        error, rtn_error: on the calibration tokens; of the result, and of round to nearest.
        held_out_error: on tokens kept aside; None if there were none.
        input_error: of quantizing the inputs alone; None if they stay in 16 bits, or were not
            measured.
        tokens: that reached the layer; 0 where no text was read.
        topped_up: whether its statistics have tokens of other experts as well.
        balance: strength of the balancing of its inputs, 0 where it does not fold.
        wide_error: of a layer with nested codes on the calibration tokens, at the width that is
            stored; all other errors are then at the narrow one. None for any other layer.
        of_outputs: whether errors are those of outputs; if not, those of the weights.
        seconds: of solving it, wall time.
    """

    # Python has no fields of these names.
    name: Annotated[str, Field(alias="layer")]
    out_features: Annotated[Count, Field(alias="out")]
    in_features: Annotated[Count, Field(alias="in")]
    format: str
    rotation: Count
    algorithm: str
    damping: float
    error: float
    held_out_error: float | None
    rtn_error: float
    input_error: float | None
    tokens: int
    topped_up: bool
    seconds: float
    balance: float = 0.0
    of_outputs: bool = True
    wide_error: float | None = None

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values, under the keys of ``ptq_report.json``; ``of_outputs`` only where it is
        false and ``wide_error`` where there is one, so that reports of the usual kind have the
        bytes that they always had."""
        data = plain(self)
        if self.of_outputs:
            del data["of_outputs"]
        if self.wide_error is None:
            del data["wide_error"]
        return data

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """The inverse of :meth:`to_dict`; keys that later versions added are left out.

        Raises:
            ValueError: a key is missing (except those that have a default), or its value is of
                another type; the message names the layer and the key.
        """
        name = data.get("layer", "a layer") if isinstance(data, dict) else "a layer"
        return check(data, cls, f"the report of {name}")
