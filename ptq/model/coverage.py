"""Whether a model and the weight files beside its configuration are of each other, by names and
shapes alone: before a weight is read."""

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def check_layers(
    model: PreTrainedModel,
    blocks: Sequence[str],
    filled: Collection[str],
    unread: Mapping[str, Collection[str]],
    where: Path,
) -> None:
    """Compare the layers of a model with those of the weight files, and tell which tensors nobody
    reads.

    Args:
        blocks: names of the decoder's blocks.
        filled: names of parameters that there are tensors for.
        unread: names of tensors that make up no parameter, with what the model may call each.

    Raises:
        ValueError: the files hold fewer or more layers than the configuration says.
    """
    home = blocks[0].removesuffix("0")
    described, stored = len(blocks), _numbers(filled, home)
    ignored = list(model._keys_to_ignore_on_load_unexpected or ())
    extra = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None)
    more = {}  # layers beyond those of the model and those that predict further tokens
    for name, candidates in unread.items():
        if not any(re.search(pattern, c) for pattern in ignored for c in (name, *candidates)):
            more |= dict.fromkeys(_numbers(candidates, home), name)
    beyond = {n: name for n, name in more.items() if n >= described + (extra or 0)}
    if beyond or len(stored) < described:
        count = max(stored | beyond.keys(), default=-1) + 1
        raise ValueError(
            f"{where}: config.json says {described} layers and the weight files hold {count}"
            f"{f' ({beyond[max(beyond)]})' if beyond else ''}"
            + (wrapped(unread) or ": one of them is of another model, copy both again")
        )
    told = [n for n in unread if not any(re.search(p, n) for p in ignored)]
    if told:
        logger.warning(
            "%s: %d tensors of the weight files are not used by %s, the first is %s",
            where,
            len(told),
            type(model).__name__,
            told[0],
        )


# What libraries put before or into names, and how a model is saved without.
WRAPPERS = {
    "_orig_mod.": "torch.compile; save the model that was compiled, model._orig_mod",
    "base_model.model.": "peft; save model.merge_and_unload()",
    "module.": "data parallel training; save model.module",
    "_fsdp_wrapped_module.": "FSDP; save a full state dict",
    "_checkpoint_wrapped_module.": "activation checkpointing; save the model inside",
}


def wrapped(names: Collection[str]) -> str:
    """What a message says of the library that ``names`` were saved through; nothing if there is
    none that is known."""
    for prefix, cause in WRAPPERS.items():
        if found := next((n for n in names if n.startswith(prefix) or f".{prefix}" in n), None):
            return f"; it was saved through {cause} (there is {found})"
    return ""


def _numbers(names: Iterable[str], home: str) -> set[int]:
    """The numbers that follow ``home`` in names."""
    parts = (name[len(home) :].split(".")[0] for name in names if name.startswith(home))
    return {int(part) for part in parts if part.isdecimal()}


@dataclass(frozen=True)
class Header:
    """Shape and dtype of a stored tensor; the dtype is None where torch has none of that name."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


def check_tensor(header: Header, current: torch.Tensor, name: str, where: Path) -> None:
    """Raise ValueError unless a stored tensor may become the parameter or buffer ``current`` of a
    model, which calls it ``name``."""
    if header.shape != tuple(current.shape):
        raise ValueError(
            f"{where}: {name} has shape {header.shape}, its model wants {tuple(current.shape)}"
        )
    dtype = header.dtype
    wide = dtype is not None and dtype.is_floating_point and dtype.itemsize > 1
    narrow = dtype is None or dtype.is_floating_point or current.dtype.is_floating_point
    if not wide and narrow:
        kind = "a type that torch does not have" if dtype is None else dtype
        raise ValueError(
            f"{where}: {name} is stored as {kind}: already quantized; start from the original model"
        )
