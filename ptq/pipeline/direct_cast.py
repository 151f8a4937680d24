"""A whole model rounded to nearest in every format, with and without rotation, against the
original: what "INT v.s. FP" calls direct cast.

    y = Q(x R) Q(W R)ᵀ + b      of every linear layer in a block, R the identity or Hadamard blocks

with scales that never clip (``ceil`` for E8M0, nearest for E4M3), of inputs by token and group; the
factor of formats with E4M3 scales belongs to a weight, and to a window of inputs. Nothing is
calibrated. The output head, embeddings and attention stay as they are.

All variants go through a block together, so that weights are read once; memory holds one block. The
hidden states of finished blocks are kept, and the same command goes on after the last one.
"""

import hashlib
import json
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ptq import __version__
from ptq.calib.calibrated_block import CalibratedBlock
from ptq.calib.fold import remember
from ptq.calib.side_by_side import SideBySide, linear_layers
from ptq.checkpoint.safetensors_files import read_tensor, write_file, write_tensors
from ptq.model.checkpoint_source import CheckpointSource
from ptq.model.structure import positions
from ptq.numerics.formats import FORMATS, MICROSCALED, Format
from ptq.numerics.rotation import Rotation
from ptq.pipeline.analysis import rounded
from ptq.pipeline.cast_results import Cast, DirectCast
from ptq.pipeline.plan import Plan
from ptq.pipeline.recipe import Recipe
from ptq.reading.safetensors_layout import read_header
from ptq.reading.schema import as_json, check_fields
from ptq.runtime.evaluate import check_logits, comparison, total_nll, windows
from ptq.text.windows import load_text, load_tokenizer

ORIGINAL = "original"
RULE = "absmax"
IDENTITY = "run.json"
Told = Callable[[int, int, str], object]


@dataclass(frozen=True, kw_only=True)
class CastOptions:
    """What decides the numbers of a direct cast.

    Attributes:
        text, field: as ``ptq eval`` takes them; windows do not overlap and have no start token.
        seq_len: tokens in a window, no more than the model's positions.
        max_tokens: of the text; None is all of it.
        formats: to cast in.
        ignore: layers that stay as they are.
    """

    text: str = "builtin"
    field: str | None = None
    seq_len: int = 512
    max_tokens: int | None = 8192
    formats: tuple[str, ...] = tuple(MICROSCALED)
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, "the direct cast")
        for name in ("seq_len", "max_tokens"):
            if (value := getattr(self, name)) is not None and value < 2:
                raise ValueError(f"{name} of a direct cast must be at least 2, not {value}")
        if unknown := sorted(set(self.formats) - MICROSCALED.keys()):
            raise ValueError(f"unknown format {unknown[0]!r}; choose from {', '.join(MICROSCALED)}")


@dataclass(frozen=True)
class Variant:
    """A format and a form."""

    fmt: Format
    rotated: bool

    @property
    def name(self) -> str:
        return f"{self.fmt.name}{' rotated' if self.rotated else ''}"

    @property
    def rotation(self) -> Rotation:
        return Rotation(self.fmt.group_size if self.rotated else 1)

    def round(self, x: Tensor) -> Tensor:
        """``x`` (rows, in) rotated and rounded, in its dtype; no rows stay none."""
        if not len(x):
            return x
        return rounded(self.rotation.exact(x).float(), self.fmt, RULE).to(x.dtype)


@torch.no_grad()
def direct_cast(
    model: str | Path,
    options: CastOptions,
    *,
    folder: Path | None = None,
    overwrite: bool = False,
    known: DirectCast | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    activations: str = "ram",
    on_step: Told = lambda done, total, text: None,
) -> DirectCast:
    """Cast the model of a directory.

    Args:
        folder: where unfinished results are kept, and where a later call with the same arguments
            goes on; it is removed at the end. None keeps nothing.
        overwrite: begin again where another run has left something.
        known: returned as it is if it is what would be made.
        activations: where hidden states of all variants live.
        on_step: told how many steps (blocks, then windows) are done, of how many, and which.

    Raises:
        ValueError, OSError: with one line that says what, where, and what to do.
    """
    began = time.monotonic()
    device = torch.device(device)
    source = CheckpointSource.on(model, device, dtype)
    variants = [Variant(FORMATS[name], rot) for rot in (False, True) for name in options.formats]
    layers = _layers(source, options, device.type)
    rows, seq_len = _windows(source, options)
    identity: dict[str, object] = {
        **asdict(options),
        "formats": list(options.formats),
        "ignore": list(options.ignore),
        "seq_len": seq_len,
        "windows": len(rows),
        "sha256": hashlib.sha256(rows.numpy().astype("<i8").tobytes()).hexdigest(),
        "fingerprint": source.fingerprint,
        "dtype": str(source.compute_dtype).removeprefix("torch."),
        "ptq": __version__,
    }
    if known is not None and known.identity == as_json(identity):
        return known
    names = (ORIGINAL, *(variant.name for variant in variants))
    kept = _Kept(folder, identity, names, len(rows), overwrite=overwrite)
    alter = _Alter({variant.name: variant for variant in variants}, layers)
    batches = list(rows.split(1))
    steps = len(source.blocks()) + len(rows)
    with SideBySide(source, batches, names, device=device, activations=activations) as walk:
        for block in walk.run(alter, begin=kept.blocks, states=kept.states):
            kept.add(block.index + 1, walk)
            on_step(block.index + 1, steps, block.name)
        found = _Sums(names)
        for index, logits in walk.logits():
            found.add(rows[index], logits, f"window {index + 1} of {len(rows)}")
            on_step(len(source.blocks()) + index + 1, steps, "logits")
    kept.remove()
    tokens = len(rows) * (seq_len - 1)
    return DirectCast(
        identity=as_json(identity),
        tokens=tokens,
        seq_len=seq_len,
        reference_nll=found.nll[ORIGINAL] / tokens,
        seconds=time.monotonic() - began,
        casts=tuple(found.cast(variant, tokens, seq_len - 1) for variant in variants),
    )


def _layers(source: CheckpointSource, options: CastOptions, device: str) -> set[str]:
    """The layers to cast: those that a run quantizes; refused where a format does not fit them."""
    found: set[str] = set()
    for name in options.formats:
        size = FORMATS[name].group_size
        recipe = Recipe.default(name, algorithm="rtn", rotation=size, ignore=options.ignore or None)
        found |= Plan.of(source, recipe, device).layers.keys()
    return found


def _windows(source: CheckpointSource, options: CastOptions) -> tuple[Tensor, int]:
    """The text as token ids (windows, length), and the length."""
    limit = positions(source.config)
    seq_len = min(options.seq_len, limit or options.seq_len)
    tokenizer = load_tokenizer(source.path)
    text = load_text(options.text, field=options.field)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return windows(torch.tensor(ids, dtype=torch.int64), seq_len, options.max_tokens), seq_len


class _Alter:
    """Rounds the layers of a block, and what they read."""

    def __init__(self, variants: Mapping[str, Variant], layers: set[str]) -> None:
        self._variants, self._layers = variants, layers

    @contextmanager
    def __call__(self, block: CalibratedBlock, variant: str) -> Iterator[None]:
        if variant == ORIGINAL:
            yield
            return
        cast, restore = self._variants[variant], remember(block.module)
        inputs = _Inputs(cast)
        linears = [x for name, x in linear_layers(block).items() if name in self._layers]
        hooks = [layer.register_forward_pre_hook(inputs) for layer in linears]
        try:
            for layer in linears:
                weight = cast.round(layer.weight.detach())
                layer.weight = nn.Parameter(weight, requires_grad=False)
            yield
        finally:
            for hook in hooks:
                hook.remove()
            restore()


class _Inputs:
    """Rounds what layers read; layers that read the same one after the other share the result."""

    def __init__(self, cast: Variant) -> None:
        self._cast = cast
        self._seen: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        if self._seen is not None:
            before, version, result = self._seen
            if before() is x and version == x._version:
                return (result, *args[1:])
        result = self._cast.round(x.reshape(-1, x.shape[-1])).view(x.shape)
        self._seen = (weakref.ref(x), x._version, result)
        return (result, *args[1:])


class _Sums:
    """Figures of all variants, summed over tokens."""

    def __init__(self, names: Sequence[str]) -> None:
        self.nll = dict.fromkeys(names, 0.0)
        self._compared: dict[str, list[dict[str, float]]] = {name: [] for name in names}

    def add(self, row: Tensor, logits: Iterator[tuple[str, Tensor]], where: str) -> None:
        """A window: the original comes first."""
        original: Tensor | None = None
        for name, all_of_them in logits:
            check_logits(all_of_them, f"{name}, {where}")
            seen = all_of_them[0, :-1]
            self.nll[name] += total_nll(seen, row[1:].to(seen.device))
            if original is None:
                original = seen
            else:
                self._compared[name].append(comparison(original, seen))

    def cast(self, variant: Variant, tokens: int, window: int) -> Cast:
        """The means over ``tokens`` predictions, so many of them in a ``window``."""
        sums = self._compared[variant.name]
        mean = {key: sum(one[key] for one in sums) / tokens for key in sums[0]}
        return Cast(
            format=variant.fmt.name,
            rotated=variant.rotated,
            nll=self.nll[variant.name] / tokens,
            kl=mean["kl"],
            kl_top25=mean["kl_top25"],
            top1_agreement=mean["top1_agreement"],
            windows=tuple(one["kl_top25"] / window for one in sums),
        )


class _Kept:
    """The hidden states behind the last finished block, in a folder; without one nothing is kept.

    Attributes:
        blocks: that are finished.

    Raises:
        FileExistsError: the folder has those of another run.
    """

    def __init__(
        self,
        folder: Path | None,
        identity: Mapping[str, object],
        variants: Sequence[str],
        count: int,
        *,
        overwrite: bool,
    ) -> None:
        self.blocks = 0
        self.states: Callable[[str, int], Tensor] | None = None
        self._folder, self._variants, self._count = folder, variants, count
        if folder is None:
            return
        head = (json.dumps(identity, sort_keys=True) + "\n").encode()
        written = folder / IDENTITY
        if written.exists() and written.read_bytes() != head:
            if not overwrite:
                raise FileExistsError(
                    f"{folder} is an unfinished direct cast of another model, text or version, or "
                    "with other options: choose another --out, or --overwrite"
                )
            self.remove()
        if not written.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_file(written, [head])
        done = sorted(int(file.stem) for file in self._parts())
        if done:
            self.blocks = done[-1]
            entries = read_header(self._file(done[-1]))
            self.states = lambda variant, window: read_tensor(entries[f"{variant}/{window}"])

    def _parts(self) -> list[Path]:
        assert self._folder is not None
        return sorted(self._folder.glob(f"{'[0-9]' * 6}.safetensors"))

    def _file(self, blocks: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{blocks:06d}.safetensors"

    def add(self, blocks: int, walk: SideBySide) -> None:
        """Keep what so many blocks made, instead of what was kept before."""
        if self._folder is None:
            return
        tensors = {
            f"{variant}/{i}": walk.hidden(variant, i)
            for variant in self._variants
            for i in range(self._count)
        }
        write_tensors(self._file(blocks), tensors)
        for file in self._parts():
            if file != self._file(blocks):
                file.unlink()

    def remove(self) -> None:
        """Drop the files, and the folder if nothing else is in it."""
        if self._folder is None:
            return
        for file in (*self._parts(), self._folder / IDENTITY):
            file.unlink(missing_ok=True)
        if not any(self._folder.iterdir()):
            self._folder.rmdir()
