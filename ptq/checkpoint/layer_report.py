"""What a run found out about a layer, as ``ptq_report.json`` keeps it."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Self, cast

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
        algorithm: whose codes were kept, a key of :data:`ptq.numerics.algorithms.ALGORITHMS`, with
            ``+descent`` if coordinate descent refined them (GPTQ's are then still called ``gptq``).
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
        """The inverse of :meth:`to_dict`; keys that later versions added are left out.

        Raises:
            ValueError: a key is missing (except those that have a default), or its value is of
                another type; the message names the layer and the key.
        """
        where = f"the report of {data.get('layer', 'a layer')}"
        values: dict[str, Any] = {}
        for field in fields(cls):
            key = _KEYS.get(field.name, field.name)
            if key not in data:
                if field.default is MISSING:
                    raise ValueError(f"{where} has no {key!r}")
                continue
            value, kind = data[key], cast("type", field.type)
            # JSON may write a whole float without its point
            whole = isinstance(value, int) and isinstance(0.0, kind)
            if not (whole or isinstance(value, kind)):
                raise ValueError(f"{where} has {value!r} as {key!r}")
            values[field.name] = value
        return cls(**values)
