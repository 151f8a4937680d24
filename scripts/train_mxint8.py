"""Train the bundled model for a few hundred steps with products of 8-bit blocks, forward and
backward, and draw the loss curves: does the spare code of INT8 harm?

    python scripts/train_mxint8.py        # one CPU core; writes docs/mxint8-training.json, .svg
    python scripts/train_mxint8.py --steps 20 --seeds 0 --out trial.json

"INT v.s. FP" (arXiv 2510.25602) trains with integers from -127 to 127 instead of -128 to 127, since
the spare code makes errors whose mean is not zero. What is trained: the model of
``train_demo_model.py``, its text, tokenizer, optimizers and schedule, on fewer and shorter windows.
Of every linear layer inside a block all three products (outputs, gradients of inputs and of
weights) are of operands rounded in blocks of 32 along the dimension that is summed over; as in that
paper the arithmetic of rounding is bfloat16, in which a number over its own scale may come to 128.

    bfloat16               nothing is rounded further
    mxfp8                  E4M3, power-of-two scales that clip nothing, exactly chosen
    mxint8 …               powers of two, by a logarithm in bfloat16
    int8, bf16 scales …    largest magnitude / 127 in bfloat16
    … symmetric            integers from -127 to 127
    … asymmetric           integers from -128 to 127

Runs of a seed start from the same weights and read the same windows, so that their differences are
less than those of seeds. A run that --out has already is not repeated.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import train_demo_model as demo
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM

from ptq.drawing.axes import Axis, frame, spanning
from ptq.drawing.style import MARKERS
from ptq.drawing.svg import Picture, legend, marker, side_by_side, text
from ptq.drawing.svg import path as path_of
from ptq.numerics.formats import MXFP8
from ptq.numerics.scales import Grid, round_to

ROOT = Path(__file__).resolve().parent.parent
GROUP = 32
KINDS = ("symmetric", "asymmetric")
FILES = 8  # every so many of the text is enough
HALF_LIFE = 15  # steps, of the smoothed curves


@dataclass(frozen=True)
class Blocks:
    """How blocks of numbers are rounded; ``scale`` None leaves bfloat16 alone.

    Attributes:
        scale: ``mxfp8``; or for integers ``e8m0`` or ``bfloat16``.
        lowest: the smallest integer.
    """

    scale: str | None = None
    lowest: int = -127

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` (rows, n) in bfloat16 → its rounded numbers in float32, blocks along n."""
        if self.scale is None:
            return x.float()
        if self.scale == "mxfp8":
            wide = x.float()
            return round_to(wide, Grid(MXFP8, torch.ones(()), "ceil").scales(wide)).dequantize()
        blocks = x.unflatten(-1, (-1, GROUP))
        scale = self.scales(blocks.abs().amax(-1, keepdim=True))
        integers = (blocks / scale).round_().clamp_(self.lowest, 127)
        return (integers.float() * scale.float()).flatten(-2)

    def scales(self, amax: Tensor) -> Tensor:
        """Of blocks with these largest magnitudes, all in bfloat16."""
        wanted = (amax / 127).clamp_(min=2.0**-100)  # a block of zeros
        return torch.exp2(wanted.log2().ceil_()) if self.scale == "e8m0" else wanted


RUNS = {
    "bfloat16": Blocks(),
    "mxfp8": Blocks("mxfp8"),
    "mxint8, symmetric": Blocks("e8m0"),
    "mxint8, asymmetric": Blocks("e8m0", -128),
    "int8, bf16 scales, symmetric": Blocks("bfloat16"),
    "int8, bf16 scales, asymmetric": Blocks("bfloat16", -128),
}


class Product(torch.autograd.Function):
    """``x Wᵀ``, all three products of rounded operands, sums in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rounded: Blocks) -> Tensor:
        rows, weight = x.flatten(0, -2).bfloat16(), weight.bfloat16()
        ctx.save_for_backward(rows, weight)
        ctx.rounded = rounded
        y = rounded(rows) @ rounded(weight).T
        return y.bfloat16().unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] - of torch
        (gradient,) = grad_outputs
        (rows, weight), rounded = ctx.saved_tensors, ctx.rounded
        flat = gradient.flatten(0, -2).bfloat16()
        to_input = rounded(flat) @ rounded(weight.T.contiguous()).T
        to_weight = rounded(flat.T.contiguous()) @ rounded(rows.T.contiguous()).T
        return to_input.bfloat16().unflatten(0, gradient.shape[:-1]), to_weight, None


class BlockLinear(nn.Module):
    """A linear layer without bias whose products are those of :class:`Product`."""

    def __init__(self, linear: nn.Linear, rounded: Blocks) -> None:
        super().__init__()
        self.weight, self.rounded = linear.weight, rounded

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.weight, self.rounded)


def with_blocks(model: LlamaForCausalLM, rounded: Blocks) -> LlamaForCausalLM:
    """``model`` with a BlockLinear for every linear layer inside a block."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            model.set_submodule(name, BlockLinear(module, rounded))
    return model


def batches(tokens: np.ndarray, seed: int, options: argparse.Namespace) -> Iterator[Tensor]:
    """Windows at random places, the same for all runs of a seed."""
    generator = np.random.default_rng(seed)
    while True:
        starts = generator.integers(len(tokens) - options.window, size=options.batch)
        windows = np.stack([tokens[s : s + options.window] for s in starts]).astype(np.int64)
        yield torch.from_numpy(windows)


def train(name: str, seed: int, data: dict[str, np.ndarray], options: argparse.Namespace) -> dict:
    """Train one model; its loss at every step, and on held-out text at the end."""
    torch.manual_seed(seed)
    model = with_blocks(demo.new_model(data["tokenizer"]), RUNS[name])  # pyright: ignore[reportArgumentType]
    optimizers = demo.new_optimizers(model)
    base = [o.param_groups[0]["lr"] for o in optimizers]
    losses, start = [], time.process_time()
    feed = batches(data["train"], seed, options)
    for step in range(options.steps):
        rate = min(1.0, (step + 1) / 50) * min(1.0, (1 - step / options.steps) / 0.4)
        for optimizer, lr in zip(optimizers, base, strict=True):
            optimizer.param_groups[0]["lr"] = lr * rate
        loss = demo.loss_of(model, next(feed))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(round(loss.item(), 5))
    return {
        "run": name,
        "seed": seed,
        "losses": losses,
        "held_out": held_out(model, data["held_out"], options),
        "cpu_seconds": round(time.process_time() - start, 1),
    }


@torch.no_grad()
def held_out(model: LlamaForCausalLM, tokens: np.ndarray, options: argparse.Namespace) -> float:
    """Nats per token of windows spread over the held-out text, rounded as in training."""
    size = options.window
    windows = torch.from_numpy(tokens[: len(tokens) // size * size].astype(np.int64)).view(-1, size)
    windows = windows[:: max(1, len(windows) // options.held_out)][: options.held_out]
    return round(float(np.mean([float(demo.loss_of(model, w)) for w in windows.split(8)])), 5)


def bias(rounded: Blocks, blocks: int = 1 << 16) -> float:
    """Mean error over root mean square of Gaussian blocks, in millionths."""
    x = torch.randn(blocks, GROUP, generator=torch.Generator().manual_seed(0)).bfloat16()
    # a block and its mirror image: only what treats signs unlike is left
    errors = [(rounded(y).double() - y.double()).mean() for y in (x, -x)]
    return round(1e6 * float(sum(errors) / 2 / x.double().square().mean().sqrt()), 2)


def smoothed(losses: list[float]) -> list[float]:
    """The exponential mean of what was seen so far."""
    keep, total, weight, means = 0.5 ** (1 / HALF_LIFE), 0.0, 0.0, []
    for loss in losses:
        total, weight = keep * total + (1 - keep) * loss, keep * weight + (1 - keep)
        means.append(total / weight)
    return means


def summary(runs: list[dict]) -> dict[str, dict[str, float]]:
    """By run: the mean held-out loss over the seeds, its difference to bfloat16, and the standard
    error of that difference (0 with one seed)."""
    base = {run["seed"]: run["held_out"] for run in runs if run["run"] == "bfloat16"}
    table = {}
    for name in RUNS:
        own = {r["seed"]: r["held_out"] for r in runs if r["run"] == name and r["seed"] in base}
        if not own:
            continue
        gaps = [loss - base[seed] for seed, loss in own.items()]
        spread = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
        table[name] = {
            "held_out": round(statistics.mean(own.values()), 5),
            "to_bfloat16": round(statistics.mean(gaps), 5),
            "standard_error": round(spread, 5),
            "bias_millionths": bias(RUNS[name]),
        }
    return table


def draw(runs: list[dict], path: Path) -> None:
    """Loss curves, and their distance to bfloat16 of the same seed: means of the seeds."""
    curves = {(r["run"], r["seed"]): np.array(smoothed(r["losses"])) for r in runs}
    losses, gaps = {}, {}
    for name in RUNS:
        own = [seed for run, seed in curves if run == name and ("bfloat16", seed) in curves]
        if own:
            losses[name] = np.mean([curves[name, seed] for seed in own], axis=0)
            gaps[name] = np.mean(
                [curves[name, seed] - curves["bfloat16", seed] for seed in own], axis=0
            )
    if not losses:
        return
    # the first steps fall by more than all others
    late = np.concatenate([loss[len(loss) // 5 :] for loss in losses.values()])
    seeds = len({r["seed"] for r in runs})
    whole = side_by_side(
        [
            panel(losses, "Training loss", "nats per token", float(late.max())),
            panel(gaps, "Distance to bfloat16 of the same seed", "nats per token", None),
        ],
        2,
        "Products of 8-bit blocks, forward and backward",
        f"{max(map(len, losses.values()))} steps, means of {seeds} seeds, smoothed",
    )
    path.write_text(whole.file(), encoding="utf-8")


def panel(found: dict[str, np.ndarray], title: str, y_name: str, highest: float | None) -> Picture:
    """A plot of one number a step for every run; asymmetric ones are dashed."""
    wide, top, tall = 430.0, 78.0, 200.0
    names = list(found)
    steps = max(map(len, found.values()))
    values = np.concatenate(list(found.values()))
    shown = values if highest is None else values[values <= highest]
    x = Axis(low=1, high=steps, start=44, end=wide - 8)
    y = spanning(shown.tolist(), top + tall, top)
    keys, _ = legend(names, wide - 44, x=44, lines=True)
    for key in keys:
        key.set("transform", "translate(0 20)")
    body = [text(0, 12, title, "bold"), *keys]
    body += frame(x, y, x_name="step", y_name=y_name).back
    for name, line in found.items():
        index = list(RUNS).index(name)
        points = [(x(i + 1), y(float(v))) for i, v in enumerate(line) if v <= y.high]
        dash = "7 3" if name.endswith("asymmetric") else "none"
        body.append(path_of(points, class_=f"curve l{index}", stroke_dasharray=dash))
        at, last = points[-1]
        said = f"{name}: {float(line[-1]):.4f} at step {len(line)}"
        body.append(marker(MARKERS[index], at, last, 2.8, class_=f"m f{index}", title=said))
    return Picture(
        width=wide,
        height=top + tall + 32,
        label=f"{title} by step, of {', '.join(names)}.",
        body=tuple(body),
    )


def read(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What is there of a run with these settings.

    Raises:
        ValueError: the file is of another experiment.
    """
    if not path.exists():
        return {"settings": settings, "runs": []}
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["settings"] != settings:
        raise ValueError(f"{path} has other settings: {found['settings']}; give another --out")
    return found


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--window", type=int, default=128, help="tokens")
    parser.add_argument("--held-out", type=int, default=64, help="windows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "mxint8-training.json")
    parser.add_argument("--draw", action="store_true", help="only the figure, of what is there")
    return parser.parse_args()


def experiment(options: argparse.Namespace) -> None:
    """All runs that are not there yet, and the figure.

    Raises:
        ValueError, OSError: --out is of another experiment, or cannot be written.
    """
    settings = {k: getattr(options, k) for k in ("steps", "batch", "window", "held_out")}
    record = read(options.out, settings)
    done = {(run["run"], run["seed"]) for run in record["runs"]}
    left = [(n, s) for s in options.seeds for n in options.runs if (n, s) not in done]
    if left and not options.draw:
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "ptq" / "demo", local_files_only=True)
        texts, others = demo.sources()
        data: dict[str, Any] = {
            "tokenizer": tokenizer,
            "train": demo.encode(tokenizer, texts[::FILES]),
            "held_out": demo.encode(tokenizer, others[::FILES]),
        }
        for name, seed in left:
            run = train(name, seed, data, options)
            record["runs"].append(run)
            seconds = f"{run['cpu_seconds']:.0f} s"
            print(f"seed {seed}, {name}: held out {run['held_out']:.4f}, {seconds}", flush=True)
            record["machine"] = {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "threads": torch.get_num_threads(),
                "date": datetime.now(UTC).date().isoformat(),
            }
            record["summary"] = summary(record["runs"])
            options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(record["runs"], options.out.with_suffix(".svg"))
    for name, row in summary(record["runs"]).items():
        print(f"{name:32s}", ", ".join(f"{key} {value}" for key, value in row.items()))


def main() -> int:
    """The exit code: 2, and one line, for what the user can put right."""
    try:
        experiment(parse())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
