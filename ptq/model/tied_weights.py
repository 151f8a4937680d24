"""Matrices that a model shares between modules, most often the embedding and the output head, and
what weight files make of that.

A configuration says that they are shared (``tie_word_embeddings``, for many models by default); the
files decide. transformers loads whichever member of a group is stored, and keeps two that differ
apart; so does ptq.
"""

import logging
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

KEY = "tie_word_embeddings"


def settle(
    model: PreTrainedModel,
    stored: Collection[str],
    equal: Callable[[str, str], bool],
    where: Path,
) -> dict[str, str]:
    """Keep apart, in ``model``, what its configuration ties and the weight files hold twice with
    different values; a warning says so.

    Args:
        stored: parameters of the model that there are tensors for.
        equal: whether the tensors of two such parameters have the same values.
        where: the directory, for messages.

    Returns:
        For every tied parameter without a tensor, a stored one that it shares its values with.

    Raises:
        ValueError: some are to be kept apart, and one that would be tied in the same way is not
            stored: no configuration can say that.
    """
    groups: dict[str, list[str]] = {}
    for target, shared in model.all_tied_weights_keys.items():
        groups.setdefault(shared, []).append(target)
    found: dict[str, str] = {}
    different = {}
    for shared, targets in groups.items():
        present = [name for name in (shared, *targets) if name in stored]
        for name in (shared, *targets):
            if present and name not in stored:
                found[name] = present[0]
        for name in present[1:]:
            if not equal(present[0], name):
                different[name] = present[0]
    if not different:
        return found
    name, other = next(iter(different.items()))
    if found:
        raise ValueError(
            f"{where}: {name} and {other} are tied by config.json and differ, and "
            f"{next(iter(found))} is missing: copy the weights again"
        )
    logger.warning(
        "%s: config.json ties %s to %s and the weight files hold two different matrices: both are "
        "kept, as transformers does; the result says %s: false",
        where,
        name,
        other,
        KEY,
    )
    for target in list(model.all_tied_weights_keys):
        model.all_tied_weights_keys.pop(target)
        _separate(model, target)
    for config in (model.config, model.config.get_text_config()):
        setattr(config, KEY, False)
    return {}


def _separate(model: nn.Module, name: str) -> None:
    """A parameter of its own, on the meta device, where two modules have the same one."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    current = owner._parameters[leaf]
    assert current is not None  # it is tied
    owner._parameters[leaf] = nn.Parameter(torch.empty_like(current), requires_grad=False)


def says_untied(
    written: dict[str, object], config: PretrainedConfig, model: nn.Module
) -> dict[str, object]:
    """``written``, a config.json, which says so where ``model`` has apart what ``config`` ties."""
    ties = any(getattr(c, KEY, False) for c in (config, config.get_text_config()))
    apart = ties and getattr(model, "_tied_weights_keys", None)
    if not apart or getattr(model, "all_tied_weights_keys", {}):
        return written
    text = written.get("text_config")
    inner = {"text_config": {**text, KEY: False}} if isinstance(text, dict) else {}
    return {**written, **inner, KEY: False}
