"""A model in, figures of every linear layer out: the walk of a run in which nothing is quantized.

Memory is that of one block. Blocks are kept as they are finished, and the same command goes on
after the last one.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ptq import __version__
from ptq.calib.fold import remember
from ptq.calib.walk import CalibratedBlock, walk
from ptq.model.checkpoint_source import CheckpointSource
from ptq.model.source import Source
from ptq.model.structure import positions
from ptq.pipeline.analysis import (
    BlockAnalysis,
    Form,
    LayerAnalysis,
    TensorAnalysis,
    first_tokens,
    forms,
    output_errors,
    spread_rows,
    tensor_analysis,
)
from ptq.pipeline.analysis_files import VERSION, Analysis, Partial, finished
from ptq.pipeline.balancing import Balancing
from ptq.pipeline.plan import Plan
from ptq.pipeline.recipe import Recipe
from ptq.reading.schema import check_fields
from ptq.text.windows import load_calibration, load_tokenizer

RULES = ("absmax", "mse")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What decides the numbers of an analysis.

    Attributes:
        calibration, field, samples, seq_len, seed: the text, as in a recipe.
        tokens: of every input that are looked at, spread over the text.
        values: numbers of a weight that are looked at, in evenly spaced rows.
        scales: ``absmax``, the rule of the study, which never clips; ``mse`` searches, and no law
            predicts it.
        balance: strength of the balanced forms; 0 leaves them out.
        ignore: layers to leave out.
    """

    calibration: str = "builtin"
    field: str | None = None
    samples: int = 8
    seq_len: int = 256
    seed: int = 0
    tokens: int = 512
    values: int = 1 << 20
    scales: str = "absmax"
    balance: float = 0.5
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, "the analysis")
        if self.scales not in RULES:
            raise ValueError(f"unknown scales {self.scales!r}; choose from {', '.join(RULES)}")
        for name in ("samples", "seq_len", "tokens", "values"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.balance <= 1:
            raise ValueError(f"balance must be from 0 to 1, not {self.balance:g}")


class Samples:
    """What layers of a block read: some tokens of each, the first position apart."""

    def __init__(self, tokens: int, batches: int) -> None:
        self._quota = math.ceil(tokens / batches)
        self._others: dict[str, list[Tensor]] = {}
        self._first: dict[str, list[Tensor]] = {}

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Take some of ``x`` (*s, in), and give it back."""
        rows = x.detach()
        if rows.ndim == 3 and rows.shape[1] > 1:
            self._first.setdefault(name, []).append(rows[:, 0].float())
            rows = rows[:, 1:]
        rows = rows.reshape(-1, rows.shape[-1])
        if len(rows):
            some = spread_rows(rows, self._quota * rows.shape[1])
            self._others.setdefault(name, []).append(some.float())
        return x

    def take(self, name: str) -> tuple[Tensor, Tensor] | None:
        """(tokens, in) float32 of other positions and of the first; None where none came by."""
        if name not in self._others:
            return None
        others = torch.cat(self._others[name])
        first = self._first.get(name)
        return others, others[:0] if first is None else torch.cat(first)

    def clear(self) -> None:
        self._others.clear()
        self._first.clear()


class _Both:
    """Balances a block before it is observed, and remembers what it was."""

    def __init__(self, plan: Plan) -> None:
        self._balancing = Balancing(plan)
        self.weights: dict[str, Tensor] = {}  # before, by full name of the layer
        self.restore: Callable[[], None] = lambda: None

    def __call__(self, block: CalibratedBlock, run: Callable[[], Tensor] | None) -> None:
        self.weights = {
            f"{block.prefix}{name}": _weight(block, f"{block.prefix}{name}")
            for group in block.groups
            for name in group.layers
        }
        self.restore = remember(block.module)
        self._balancing(block, run)


def _weight(block: CalibratedBlock, layer: str) -> Tensor:
    return block.module.get_parameter(f"{layer.removeprefix(block.prefix)}.weight").detach()


def column_factor(before: Tensor, after: Tensor) -> Tensor | None:
    """The a of ``after = before / a`` by columns, float32 (in); None where no factors of columns
    do that: rows were scaled too, because the layer's own output was balanced."""
    row = after.abs().argmax(0, keepdim=True)
    below = after.gather(0, row)[0].double()
    factor = torch.where(below != 0, before.gather(0, row)[0].double() / below, 1.0)
    error = (before.double() - after.double() * factor).abs().amax()
    return factor.float() if error <= 1e-3 * before.abs().amax() else None


@torch.no_grad()
def analyze(
    model: str | Path,
    options: Options,
    *,
    folder: Path | None = None,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    on_block: Callable[[BlockAnalysis, int, bool], None] | None = None,
) -> Analysis:
    """Measure every linear layer of a model's blocks; nothing of the model is changed.

    Args:
        folder: where finished blocks are kept, and where a later call with the same arguments goes
            on; a finished analysis there is returned as it is. None keeps nothing.
        overwrite: begin again where a run has left finished blocks, or its results.
        dtype: of the computation; None is float32 on a CPU, else the model's own.
        on_block: told a block, how many there are, and whether an earlier run measured it.

    Raises:
        ValueError, OSError: with one line that says what, where, and what to do.
    """
    began = time.monotonic()
    device = torch.device(device)
    source = CheckpointSource.on(model, device, dtype)
    recipe = Recipe.default(
        "nvfp4", scheme="w4a4", balance=options.balance, ignore=options.ignore or None
    )
    plan = Plan.of(source, recipe, device.type)
    limit = positions(source.config)
    options = replace(options, seq_len=min(options.seq_len, limit or options.seq_len))
    data = load_calibration(
        load_tokenizer(source.path),
        options.calibration,
        samples=options.samples,
        seq_len=options.seq_len,
        batch_size=4,
        seed=options.seed,
        field=options.field,
    )
    identity = {
        **asdict(options),
        "ignore": list(options.ignore),
        "fingerprint": source.fingerprint,
        "dtype": str(source.compute_dtype).removeprefix("torch."),
        "ptq": __version__,
        "text": data.description,
    }
    if folder is not None and not overwrite and (known := finished(folder, identity)) is not None:
        return known
    partial = Partial(folder, identity, overwrite=overwrite)
    for block, count, resumed in _blocks(source, data.batches, plan, options, partial, device):
        if on_block is not None:
            on_block(block, count, resumed)
    found = sorted(partial.blocks.values(), key=lambda block: block.index)
    return Analysis(
        version=VERSION,
        model=str(model),
        identity=identity,
        seconds=time.monotonic() - began,
        blocks=tuple(found),
    )


def _blocks(
    source: Source,
    batches: Sequence[Tensor],
    plan: Plan,
    options: Options,
    partial: Partial,
    device: torch.device,
):
    """(block, count, resumed), each kept before it is told."""
    samples = Samples(options.tokens, len(batches))
    both = _Both(plan)
    watch = replace(plan.watch(), probes={}, feed=samples, moments=True, squares=True)
    for block in walk(
        source,
        batches,
        watch,
        device=device,
        skip=partial.blocks.__contains__,
        prepare=both if options.balance else None,
    ):
        resumed = block.name in partial.blocks
        if not resumed:
            partial.add(_measured(block, samples, both.weights, options))
            both.restore()  # the next block then reads the same bits in a run that goes on here
        samples.clear()
        block.forget()
        yield partial.blocks[block.name], block.count, resumed


def _measured(
    block: CalibratedBlock, samples: Samples, before: dict[str, Tensor], options: Options
) -> BlockAnalysis:
    tensors: list[TensorAnalysis] = []
    layers: list[LayerAnalysis] = []
    for group in block.groups:
        names = [f"{block.prefix}{name}" for name in group.layers]
        factor = _input_factor(block, names, before)
        taken = samples.take(names[0])
        inputs: list[Form] = []
        if taken is not None and taken[0].abs().amax() > 0:
            others, first = (x if factor is None else x / factor for x in taken)
            inputs = forms(others, None if factor is None else taken[0], options.scales)
            found = tensor_analysis("input", names, inputs, others)
            tensors.append(replace(found, first_tokens=first_tokens(first, others)))
        for name in names:
            after = _weight(block, name)
            whole = before.get(name, after)
            weight = spread_rows(whole, options.values).float()
            changed = None if factor is None else spread_rows(after, options.values).float()
            made: list[Form] = []
            if weight.abs().amax() > 0:
                made = forms(weight, changed, options.scales)
                tensors.append(tensor_analysis("weight", [name], made, weight, rows=len(whole)))
            layers.append(
                LayerAnalysis(
                    name=name,
                    out_features=whole.shape[0],
                    in_features=whole.shape[1],
                    errors=output_errors(made, inputs) if made and inputs else (),
                )
            )
    return BlockAnalysis(
        name=block.name, index=block.index, tensors=tuple(tensors), layers=tuple(layers)
    )


def _input_factor(
    block: CalibratedBlock, names: Sequence[str], before: dict[str, Tensor]
) -> Tensor | None:
    """What balancing multiplied the inputs of some layers by; None where it did nothing."""
    for name in names:
        old, new = before.get(name), _weight(block, name)
        if old is None or old is new or torch.equal(old, new):
            continue
        factor = column_factor(old.float(), new.float())
        if factor is not None and not torch.equal(factor, torch.ones_like(factor)):
            return factor
    return None
