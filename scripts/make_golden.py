"""Write tests/golden/elements.json: numbers and the codes that ml_dtypes, an independent
implementation, gives them.

Every representable value, every midpoint between neighbours (a tie) and the float32 numbers next to
the midpoint. Integers have no cast with ties in ml_dtypes; their codes are Python's own
round-half-to-even. Run once; the file is checked in and never made by the code under test.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

FLOATS = {
    "e2m1": (ml_dtypes.float4_e2m1fn, 4),
    "e2m3": (ml_dtypes.float6_e2m3fn, 6),
    "e4m3": (ml_dtypes.float8_e4m3fn, 8),
}
INTEGERS = {"int4": 7, "int6": 31, "int8": 127}


def probes(values: np.ndarray) -> np.ndarray:
    """Values, midpoints, the float32 neighbours of the midpoints, and numbers beyond the range."""
    values = np.unique(values.astype(np.float32))
    middle = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    beyond = np.array([values[-1] * 1.01, values[0] * 1.01], dtype=np.float32)
    return np.concatenate(
        [
            values,
            middle,
            np.nextafter(middle, np.float32(np.inf)),
            np.nextafter(middle, np.float32(-np.inf)),
            beyond,
        ]
    )


def main() -> None:
    golden = {}
    for name, (dtype, bits) in FLOATS.items():
        codes = np.arange(1 << bits, dtype=np.uint8)
        decoded = (
            codes.view(dtype).astype(np.float32)
            if bits == 8
            else codes.astype(np.uint8).view(dtype).astype(np.float32)
        )
        finite = decoded[np.isfinite(decoded)]
        x = probes(finite)
        rounded = np.clip(x, finite.min(), finite.max()).astype(dtype)
        encoded = rounded.view(np.uint8) & ((1 << bits) - 1)
        encoded[rounded.astype(np.float32) == 0] = 0  # writers emit +0 for every zero (F4)
        golden[name] = {
            "x": x.tolist(),
            "code": encoded.tolist(),
            "values": [float(v) if np.isfinite(v) else None for v in decoded],
        }
    for name, largest in INTEGERS.items():
        bits = (2 * largest + 1).bit_length()
        x = probes(np.arange(-largest, largest + 1))
        encoded = [max(-largest, min(largest, round(float(v)))) % (1 << bits) for v in x]
        decoded = [float(c if c < 1 << (bits - 1) else c - (1 << bits)) for c in range(1 << bits)]
        golden[name] = {"x": x.tolist(), "code": encoded, "values": decoded}
    path = Path(__file__).parents[1] / "tests" / "golden" / "elements.json"
    path.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
