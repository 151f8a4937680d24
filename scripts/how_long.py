"""Compare what is foretold of a run with what it takes: time and memory.

    OMP_NUM_THREADS=1 python scripts/how_long.py MODEL [format=mxfp4] [scheme=w4a4] [samples=64] …

Both are CPU seconds of one thread, so that other programs on the machine do not count. One line of
JSON; docs/how-long.md has the results.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

from ptq.pipeline import speed
from ptq.pipeline.forecast import forecast
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.run import quantize_model
from ptq.runtime.loaded_model import resolve_model


def option(text: str) -> tuple[str, object]:
    """``name=value``, the value as JSON where it is some."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def main() -> None:
    model, *words = sys.argv[1:]
    torch.set_num_threads(1)
    speed.clock = time.process_time
    choices = dict(map(option, words))
    recipe = Recipe.default(str(choices.pop("format", "nvfp4")), **choices)
    source = resolve_model(model)
    expected = forecast(source, recipe, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        quantize_model(source, Path(folder) / "q", recipe=recipe, device="cpu")
        seconds = time.process_time() - start
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert expected.seconds is not None
    print(
        json.dumps(
            {
                "model": Path(source).name,
                "recipe": words,
                "tokens": expected.samples * expected.seq_len,
                "seconds foretold": round(expected.seconds, 1),
                "seconds": round(seconds, 1),
                "GB foretold": round(expected.peak_bytes / 1e9, 2),
                "GB": round(peak / 1e9, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
