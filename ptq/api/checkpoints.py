"""Calls that take a checkpoint: load, evaluate, inspect, verify, convert."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack, cast, overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptq.api.arguments import LoadOptions, Name, shown, to_device, to_dtype
from ptq.checkpoint.convert import convert as convert_checkpoint
from ptq.checkpoint.dialect_choice import Choice
from ptq.cli import progress as bars
from ptq.runtime.compare import compare
from ptq.runtime.evaluate import Evaluation
from ptq.runtime.inspect import Report
from ptq.runtime.inspect import inspect as inspect_checkpoint
from ptq.runtime.load import load as load_checkpoint
from ptq.runtime.loaded_model import resolve_model
from ptq.runtime.tables import Table, Tabular
from ptq.runtime.verify import Verdict
from ptq.runtime.verify import verify as verify_checkpoint
from ptq.text.windows import load_tokenizer

if TYPE_CHECKING:

    class CausalLM(PreTrainedModel):
        """What ``from_pretrained`` gives, with the method that transformers adds by a mixin."""

        def generate(self, inputs: Tensor | None = None, **options: object) -> Tensor: ...

else:
    CausalLM = PreTrainedModel


@dataclass(frozen=True, kw_only=True, repr=False)
class Written(Tabular):
    """A checkpoint that was written.

    Attributes:
        path: its directory.
        dialect: how it lies on disk, and so who opens it; ``reason``: why this one.
        report: sizes, and the error of every layer.
    """

    path: Path
    dialect: str
    reason: str
    report: Report

    def tables(self) -> tuple[Table, ...]:
        """Where and how it was written, then its report."""
        heading = f"{self.path} written as {self.dialect}: {self.reason}"
        return (Table(title=heading, columns=(), rows=()), *self.report.tables())


def written(out: Path, choice: Choice) -> Written:
    """What :func:`inspect` says of a checkpoint that was just written, and why so."""
    report = inspect_checkpoint(out)
    return Written(path=out, dialect=choice.dialect, reason=choice.reason, report=report)


@overload
def load(
    model: Name,
    device: torch.device | str | None = None,
    *,
    tokenizer: Literal[False] = False,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    **options: Unpack[LoadOptions],
) -> CausalLM: ...
@overload
def load(
    model: Name,
    device: torch.device | str | None = None,
    *,
    tokenizer: Literal[True],
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    **options: Unpack[LoadOptions],
) -> tuple[CausalLM, PreTrainedTokenizerBase]: ...
def load(
    model: Name,
    device: torch.device | str | None = None,
    *,
    tokenizer: bool = False,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    **options: Unpack[LoadOptions],
) -> CausalLM | tuple[CausalLM, PreTrainedTokenizerBase]:
    """The transformers model of a quantized checkpoint, as ``from_pretrained`` gives it, with
    layers that compute with packed weights.

        model, tokenizer = ptq.load("out", tokenizer=True)
        ids = tokenizer("The walk of a block", return_tensors="pt").to(model.device)
        print(tokenizer.decode(model.generate(**ids)[0]))

    Args:
        model: directory of a checkpoint, or the id of one on the hub.
        device: where it goes; the first GPU if there is one.
        tokenizer: return (model, tokenizer).
        revision: branch, tag or commit of a checkpoint on the hub.
        dtype: of what is not quantized, and of what layers return; the checkpoint's.
        inputs: of layers that were made for quantized ones (W4A4): ``"quantized"`` rounds them,
            ``"full"`` keeps them, ``"auto"`` rounds them where the GPU multiplies FP4.
        cache: keep dequantized weights where no kernel runs, 4 bytes each; for small checkpoints
            unless said.
        bits: of the weights, of a checkpoint that was made with ``nested``; as stored.
        prefill: ``"fp8"`` multiplies 65 tokens and more in FP8 on a GPU that can (Hopper), with a
            copy of the weights in memory, a byte each; an approximation.
        device_map: of accelerate, as ``"auto"``, instead of ``device``.
        max_memory: bytes by device, for ``device_map="auto"``.
        offload_folder: where layers on ``"disk"`` go.

    Raises:
        FileNotFoundError: no such directory or model of the hub, or an unfinished checkpoint.
        ValueError: not a checkpoint that ptq reads, or a damaged one.
    """
    path = resolve_model(model, revision)
    kind = to_dtype(dtype)
    place = "cpu" if options.get("device_map") else to_device(device)
    loaded = cast(CausalLM, load_checkpoint(path, place, dtype=kind, **options))
    return (loaded, load_tokenizer(path)) if tokenizer else loaded


def evaluate(
    model: Name | nn.Module,
    reference: Name | nn.Module | None = None,
    *,
    text: str = "builtin",
    field: str | None = None,
    seq_len: int | None = None,
    max_tokens: int | None = None,
    bits: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    progress: bool | Callable[[int, int], None] = True,
) -> Evaluation:
    """Perplexity of a model, and its KL divergence from the original; ``ptq eval`` in Python.

        print(ptq.evaluate("out", "path/to/model", text="wikitext.txt"))

    The text is cut into windows that do not overlap and are fed without a start token. Quantized
    inputs are emulated exactly, whatever the machine.

    Args:
        model: a directory, hub id or ``"demo"``; or a model in memory, which is used as it is.
        reference: the original, likewise; None measures perplexity alone.
        text: a .txt, .jsonl or .parquet file; ``"builtin"`` is held-out Python source.
        field: column of a .jsonl or .parquet text.
        seq_len: tokens in a window; 2048, or the model's positions.
        max_tokens: use at most so many tokens of the text.
        bits: of the weights, of a checkpoint that was made with ``nested``; as stored.
        tokenizer: of models in memory.
        device: of what is loaded; the first GPU if there is one.
        dtype: of what is loaded; float32 on a CPU, else the model's own.
        progress: a bar on stderr, or nothing; or what to call with (windows done, windows in all).

    Returns:
        Means over all predictions; nats per token.

    Raises:
        ValueError, FileNotFoundError: in one line: what, where, what to do.
    """
    place, kind = to_device(device), to_dtype(dtype)
    with shown(progress, partial(bars.evaluating, quiet=not progress)) as on_window:
        return compare(
            model,
            reference,
            text=text,
            field=field,
            seq_len=seq_len,
            max_tokens=max_tokens,
            bits=bits,
            tokenizer=tokenizer,
            device=place,
            dtype=kind,
            on_window=on_window,
        )


def inspect(model: Name, *, revision: str | None = None) -> Report:
    """What a checkpoint holds: format, recipe, sizes, the error of every layer. Loads no weight.

    Args:
        model: directory of a checkpoint, or the id of one on the hub.
        revision: branch, tag or commit of a checkpoint on the hub.

    Raises:
        ValueError, FileNotFoundError: not a quantized checkpoint, a damaged or unfinished one.
    """
    return inspect_checkpoint(resolve_model(model, revision))


def verify(model: Name, *, engines: bool = False) -> Verdict:
    """Whether a checkpoint is what was written: its files against SHA256SUMS, and every tensor.

    Args:
        model: directory of a checkpoint.
        engines: open it in transformers, lm-eval and vLLM too, as far as they are installed, and
            compare probabilities; each in a process of its own.

    Returns:
        ``ok``, or a line for each problem.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    return verify_checkpoint(model, engines=engines)


def convert(
    model: Name,
    out: Name,
    to: str = "auto",
    *,
    target: str | None = None,
    overwrite: bool = False,
) -> Written:
    """Write a checkpoint in another dialect: no number changes, or it is refused.

    Args:
        model: directory of a checkpoint.
        out: directory of the result, new or empty.
        to: auto, compressed-tensors, modelopt or ptq.
        target: transformers, vllm, sglang, trtllm or any: who must compute the result right.
        overwrite: replace a checkpoint of ours in ``out``.

    Raises:
        ValueError: the dialect cannot express the checkpoint; or it is damaged, or none.
        FileNotFoundError, FileExistsError: of ``model`` or ``out``.
    """
    return written(
        Path(out), convert_checkpoint(model, out, to, target=target, overwrite=overwrite)
    )
