"""A model from its configuration alone: every module on the meta device, no weights needed."""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ptq.model.checkpoint_source import CONV1D, STACKED
from ptq.model.experts import Experts, unfuse
from ptq.model.fp8_weights import open_shards
from ptq.model.parameter_names import NameMap
from ptq.model.structure import (
    build_model,
    find_blocks,
    find_head,
    linearize,
    load_config,
    refuse_quantized,
    resolve,
)
from ptq.model.tied_weights import settle
from ptq.model.weight_files import Shards, has_weights

TOKENS = 8  # of the sequence that a model without weights is run on


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """A model whose directory needs no more than a config.json.

    Attributes:
        path: the directory.
        model: experts split into Linears, Conv1D made linear, all on the meta device.
    """

    path: Path
    config: PretrainedConfig
    model: PreTrainedModel
    block_names: tuple[str, ...]
    names: NameMap
    foreign_reason: str | None

    @classmethod
    def of(cls, path: str | Path) -> "Blueprint":
        """The blueprint of a directory or of a model of the hub.

        Raises:
            FileNotFoundError, ValueError: as for reading the model itself.
        """
        directory = resolve(path)
        shards = Shards(directory) if has_weights(directory) else None
        stored = None if shards is None else shards.stored
        config = load_config(directory, stored)
        dtype = getattr(config, "dtype", None)
        known = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
        model = build_model(config, directory, known, stored)
        names = NameMap(model)
        if shards is not None and model.all_tied_weights_keys:
            _settle_ties(model, names, open_shards(directory, config))
        transposed = linearize(model)
        stacked = [path for path in unfuse(model, names.expert_names) if names.stacked(path)]
        return cls(
            path=directory,
            config=config,
            model=model.eval(),
            block_names=tuple(find_blocks(model)),
            names=names,
            foreign_reason=CONV1D if transposed else STACKED if stacked else None,
        )

    def skeleton(self) -> PreTrainedModel:
        """The model."""
        return self.model

    def checkpoint_name(self, name: str) -> str:
        """What checkpoints of this model call one of its tensors."""
        return self.names.stored_name(name)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """The decoder's blocks in order, with their full names; ValueError when the checkpoint is
        quantized already."""
        refuse_quantized(self.config, self.path)
        return [(name, self.model.get_submodule(name)) for name in self.block_names]

    def head(self) -> tuple[str, nn.Module]:
        """The output head and its full name; ValueError when it is tied or no linear layer."""
        name = find_head(self.model)
        return name, self.model.get_submodule(name)

    def foreign(self) -> str | None:
        """Why other programs would not find the layers of this model in a checkpoint, or None."""
        return self.foreign_reason

    @cached_property
    def input_groups(self) -> list[tuple[str, ...]]:
        """The Linears that read the same activation, by full name, in the order in which they run.

        Found by running the model on the meta device, where nothing is computed. Where that is not
        possible (control flow that depends on values), every Linear counts as a group of its own.
        """
        linears = [name for name, m in self.model.named_modules() if isinstance(m, nn.Linear)]
        mask = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool, device="meta")
        nn.Module.to(self.model, "meta")  # buffers too
        for arguments in ({"attention_mask": mask}, {}):  # most models look at values without one
            groups = _groups(self.model, arguments)
            if groups:
                grouped = {name for group in groups for name in group}
                return [*groups, *((name,) for name in linears if name not in grouped)]
        return [(name,) for name in linears]


def _settle_ties(model: PreTrainedModel, names: NameMap, shards: Shards) -> None:
    """Keep apart what the weight files do; of ties alone, data is looked at."""
    origins = names.origins(shards.names())

    def equal(a: str, b: str) -> bool:
        (x,), (y,) = (origins[n].load(shards.tensor, names).values() for n in (a, b))
        return torch.equal(x, y)

    settle(model, origins, equal, shards.path)


def _groups(model: nn.Module, arguments: dict[str, Tensor]) -> list[tuple[str, ...]]:
    """The Linears of ``model`` by what they read; none if it cannot run on the meta device."""
    readings = _Readings()
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(partial(readings.note, name)))
        elif isinstance(module, Experts):
            module.__dict__["forward"] = partial(_every_expert, module)
    tokens = torch.zeros(1, TOKENS, dtype=torch.int64, device="meta")
    try:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False, **arguments)
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return []  # values are asked for, or another form of mask is wanted
    finally:
        for hook in hooks:
            hook.remove()
        for module in model.modules():
            if isinstance(module, Experts):
                del module.__dict__["forward"]
    return [tuple(names) for names in readings.readers.values()]


class _Readings:
    """Which Linears read which tensor. Tensors are kept, so that an id stays that of one."""

    def __init__(self) -> None:
        self.readers: dict[int, list[str]] = {}
        self._inputs: list[Tensor] = []

    def note(self, name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._inputs.append(args[0])
        self.readers.setdefault(id(args[0]), []).append(name)


def _every_expert(
    experts: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """A forward in which each expert reads tokens of its own, as routing would have it."""
    for index in range(experts.num_experts):
        experts.get_submodule(str(index))(hidden_states.clone(), experts.gating)
    return torch.empty_like(hidden_states)
