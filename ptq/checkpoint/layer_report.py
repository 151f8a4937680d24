"""What a run found out about a layer, as ``ptq_report.json`` keeps it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

# Python has no fields of these names.
_KEYS = {"name": "layer", "out_features": "out", "in_features": "in"}


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """How a layer was quantized, and what that cost.

    Errors are relative squared output errors, ``‖(W - Ŵ) X‖² / ‖W X‖²``: 0 is exact, 1 as bad as a
    layer of zeros.

    Attributes:
        name: of the layer; of the model's while a run goes on, of the checkpoint's on disk.
        rotation: inputs to a block of the rotation, 1 for none.
        algorithm: whose codes were kept, a key of :data:`ptq.numerics.algorithms.ALGORITHMS`.
        damping: share of the Hessian's mean diagonal that was added to it; 0 where it was not used.
        error, rtn_error: on the calibration tokens; of the result, and of round to nearest.
        held_out_error: on tokens kept aside; None if there were none.
        input_error: of quantizing the inputs alone; None if they stay in 16 bits.
        tokens: that reached the layer.
        topped_up: whether its statistics have tokens of other experts as well.
        balance: strength of the balancing of its inputs, 0 where it does not fold.
        seconds: of solving it, wall time.
    """

    name: str
    out_features: int
    in_features: int
    format: str
    rotation: int
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

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values, under the keys of ``ptq_report.json``."""
        return {_KEYS.get(key, key): value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`; what later versions added is left out.

        Raises:
            ValueError: a field without a default is missing.
        """
        known = {f.name: _KEYS.get(f.name, f.name) for f in fields(cls)}
        try:
            given = {name: data[key] for name, key in known.items() if name != "balance"}
        except KeyError as error:
            raise ValueError(f"the report of a layer has no {error.args[0]!r}") from error
        return cls(**given, balance=data.get("balance", 0.0))
