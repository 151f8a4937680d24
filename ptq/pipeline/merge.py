"""Fine-tuned copies of one model, merged into one before it is quantized.

Tensor by tensor: memory holds one tensor of every model. The result is a model directory as any
other, which appears when it is complete (:mod:`ptq.checkpoint.work_folder`).
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ptq import __version__
from ptq.checkpoint.checksums import write_sums
from ptq.checkpoint.companions import companion_files
from ptq.checkpoint.destination import check_destination
from ptq.checkpoint.progress_file import ProgressFile
from ptq.checkpoint.quantization_config import natural
from ptq.checkpoint.safetensors_files import write_file, write_tensors
from ptq.checkpoint.shards import SHARD_BYTES, write_shards
from ptq.checkpoint.work_folder import WorkFolder
from ptq.model.checkpoint_source import CheckpointSource
from ptq.numerics.merging import arithmetic, outlier_weights, rank_shares, singular
from ptq.reading.safetensors_layout import Entry, read_header
from ptq.text.windows import load_tokenizer

Deltas = Sequence[Tensor]
LEAST = 4  # experts in one tensor, and rows and columns of each; smaller ones are convolutions


@dataclass(frozen=True)
class Method:
    """A way to merge the task vectors of one tensor.

    Attributes:
        about: for help and the result's README.
        matrices: merges those of a linear layer, float32 → float64.
        strength: what the merged change is multiplied with unless that is given, by the number of
            tasks.
    """

    about: str
    matrices: Callable[[Deltas], Tensor]
    strength: Callable[[int], float]


def _mean(deltas: Deltas) -> Tensor:
    return arithmetic(deltas) / len(deltas)


def _reweighted(deltas: Deltas) -> Tensor:
    return singular(deltas, shares=rank_shares(deltas), weights=outlier_weights(deltas))


METHODS = {
    "arithmetic": Method("the sum of the changes", arithmetic, lambda tasks: 1 / tasks),
    "tsvm": Method(
        "truncated singular vectors, made orthogonal (TSV-Merge)", singular, lambda tasks: 1.0
    ),
    "r-tsvm": Method(
        "the same, weighted by outliers and truncated by sparsity: R-TSVM's idea, not its formulas",
        _reweighted,
        lambda tasks: 1.0,
    ),
}


@dataclass(frozen=True)
class Merged:
    """What a merge did: tensors in all, how many of them by the method for matrices, and bytes."""

    tensors: int
    matrices: int
    bytes: int


@torch.no_grad()
def merge(
    base: Path,
    models: Sequence[Path],
    out: str | Path,
    *,
    method: str = "arithmetic",
    strength: float | None = None,
    device: torch.device | str = "cpu",
    shard_bytes: int = SHARD_BYTES,
    on_tensor: Callable[[int, int, str], object] = lambda done, total, name: None,
) -> Merged:
    """Write ``base + strength · merged changes`` to the directory ``out``, every tensor rounded
    once, to the dtype that it has in ``base``.

    Embeddings, the output head, norms and biases are merged as ``arithmetic`` does, in the other
    methods by their mean. Tokenizer and configuration are those of ``base``.

    Args:
        models: two or more fine-tuned copies of ``base``.
        method: a key of ``METHODS``; strength: None is that of the method.
        device: where to compute.
        on_tensor: told of every finished tensor: its number, how many there are, its name.

    Raises:
        ValueError: models that are quantized, or differ in architecture, tensors, shapes or
            vocabulary; a result that is not finite; an ``out`` that cannot be used.
        FileNotFoundError, FileExistsError: no model; something is at ``out``.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    if len(models) < 2:
        raise ValueError("give two or more fine-tuned models after the base")
    if strength is not None and not 0 < strength < float("inf"):
        raise ValueError(f"--strength must be a positive number, not {strength:g}")
    if Path(out).is_dir() and any(Path(out).iterdir()):
        raise FileExistsError(f"{out} exists and is not empty: choose another directory")
    place = check_destination(out, base, overwrite=False)
    for model in models:
        check_destination(out, model, overwrite=False)
    source, *others = [CheckpointSource(path) for path in (base, *models)]
    blocks = tuple(f"{name}." for name, _ in source.blocks())
    for other in others:
        _check_alike(source, other)
    factor = METHODS[method].strength(len(models)) if strength is None else strength
    combine = partial(_combined, source, others, method, factor, torch.device(device))
    work = WorkFolder(place, overwrite=False)
    said = {"method": method, "strength": factor, "models": [m.fingerprint for m in others]}
    identity = {"merge": said, "source": source.fingerprint, "ptq": __version__}
    progress = ProgressFile(work.path, identity)
    progress.read()  # the unfinished work of another run is not ours to remove
    work.open()
    matrices = 0

    def parts() -> Iterator[dict[str, Entry]]:
        nonlocal matrices
        names = sorted(source.names(), key=natural)
        for i, name in enumerate(names):
            inside = source.module_name(name).startswith(blocks)
            value, by_method = combine(name, inside)
            matrices += by_method
            file = work.path / f"rest-{i:05}.safetensors"
            write_tensors(file, {name: value})
            on_tensor(i + 1, len(names), name)
            yield read_header(file)

    try:
        work.clear()
        progress.write({})  # from now on the folder says whose it is
        work.begin()
        work.finished.mkdir()
        entries, sums = write_shards(work.finished, parts(), shard_bytes)
        size = sum(entry.bytes for entry in entries.values())
        _write_rest(work.finished, source, models, method, factor, sums)
        work.publish()
    finally:
        if work.held:
            work.remove()
            work.close()
    return Merged(len(entries), matrices, size)


def _check_alike(base: CheckpointSource, other: CheckpointSource) -> None:
    """Raise ValueError unless ``other`` may be a fine-tuned copy of ``base``."""
    other.blocks()  # refuses what is quantized
    kinds = [source.config.model_type for source in (base, other)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{other.path} is a {kinds[1]} and {base.path} a {kinds[0]}: only copies of one model "
            "can be merged"
        )
    names = [set(source.names()) for source in (base, other)]
    for have, lack, missing in (
        (base, other, names[0] - names[1]),
        (other, base, names[1] - names[0]),
    ):
        if missing:
            raise ValueError(
                f"{lack.path} has no tensor {min(missing)}, which {have.path} has: they are not "
                "copies of one model, or one was saved with tied matrices and the other without; "
                "save both with the same transformers"
            )
    for name in sorted(names[0]):
        shapes = [source.shape(name) for source in (base, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name} is {shapes[1]} in {other.path} and {shapes[0]} in {base.path}: only "
                "copies of one model can be merged"
            )
    vocabularies = [load_tokenizer(source.path).get_vocab() for source in (base, other)]
    if vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"{other.path} has another vocabulary than {base.path}: its tokens mean other things"
        )


def _combined(
    base: CheckpointSource,
    others: Sequence[CheckpointSource],
    method: str,
    strength: float,
    device: torch.device,
    name: str,
    inside: bool,
) -> tuple[Tensor, bool]:
    """The merged tensor in the dtype of the base, and whether its matrices were merged by the
    method's own rule."""
    start = base.tensor(name)
    tensors = [other.tensor(name) for other in others]
    if not start.dtype.is_floating_point:
        if any(not torch.equal(start, tensor) for tensor in tensors):
            raise ValueError(f"{name} holds integers and differs between the models")
        return start, False
    wide = start.to(device, torch.float32)
    deltas = [tensor.to(device, torch.float32) - wide for tensor in tensors]
    matrices = inside and (start.ndim == 2 or (start.ndim == 3 and min(start.shape) >= LEAST))
    if METHODS[method].matrices is arithmetic:
        change = arithmetic(deltas)
    elif not matrices:
        change = _mean(deltas)
    elif start.ndim == 3:  # experts, one after the other
        experts = zip(*deltas, strict=True)
        change = torch.stack([METHODS[method].matrices(expert) for expert in experts])
    else:
        change = METHODS[method].matrices(deltas)
    result = (wide.double() + strength * change).to("cpu", start.dtype)
    if not torch.isfinite(result).all():
        raise ValueError(
            f"{name} is not finite when merged: a model holds NaN or infinity, or --strength is "
            "too large"
        )
    return result, matrices


def _write_rest(
    folder: Path,
    source: CheckpointSource,
    models: Sequence[Path],
    method: str,
    strength: float,
    sums: dict[str, str],
) -> None:
    """Everything but the weights: what lies beside the base, and a README that says what was
    merged."""
    for file in companion_files(source.path):
        sums[file.name] = write_file(folder / file.name, [file.read_bytes()])
    names = ", ".join(f"`{path.name}`" for path in models)
    card = (
        f"# {source.path.name}, merged\n\n"
        f"`{source.path.name}` plus {strength:g} times {METHODS[method].about}, of {names} "
        f"(`ptq merge --method {method}`, ptq {__version__}).\n"
    )
    sums["README.md"] = write_file(folder / "README.md", [card.encode()])
    config = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)  # of FP8, which was dequantized
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    sums["config.json"] = write_file(folder / "config.json", [text.encode()])
    write_sums(folder, sums)
