"""Which checkpoint tensors make up which parameter of the model.

transformers renames checkpoint keys on loading and merges some of them (``block_sparse_moe`` →
``mlp``, experts → one 3-D tensor). Its own tables say how; this is the only file that reads them
(``transformers.conversion_mapping`` and ``core_model_loading``, internal to transformers 5).
"""

import copy
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from ptq.model.expert_layouts import FUSED, ExpertNames, Layout, Part, unpack_mxfp4

PACKED = ("_blocks", "_scales")  # of a tensor in MXFP4, as gpt-oss stores it


@dataclass(frozen=True)
class Origin:
    """Where the values of a parameter come from.

    ``sources``: checkpoint names per pattern of the converter; without a converter, one name, or
    the two of a tensor that is packed as MXFP4. ``part`` is what the parameter is of that, if not
    all.
    """

    sources: tuple[tuple[str, tuple[str, ...]], ...]
    converter: WeightConverter | None = field(default=None, compare=False)
    target: str = ""  # name of the tensor that the converter makes
    part: Part | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for _, names in self.sources for name in names)

    @property
    def direct(self) -> str | None:
        """The checkpoint tensor that *is* this parameter, transposed or not, if there is one."""
        whole = self.part is None or (self.part.expert is None and self.part.rows is None)
        return self.names[0] if self.converter is None and whole and len(self.names) == 1 else None

    def whole(self) -> "Origin":
        """The same without the selection of rows; equal for all parts of one tensor."""
        return Origin(self.sources, self.converter, self.target)

    def load(self, read: Callable[[str], Tensor], names: "NameMap") -> dict[str, Tensor]:
        """The tensors made of the sources, by parameter name: several where one tensor is split."""
        if self.converter is None:
            if len(self.names) == 1:
                return {self.target: read(self.names[0])}
            blocks, scales = (read(name) for name in self.names)
            return {self.target: unpack_mxfp4(blocks, scales).mT}
        converter = copy.deepcopy(self.converter)
        for pattern, members in self.sources:
            for name in members:
                converter.add_tensor(self.target, name, pattern, lambda name=name: read(name))  # pyright: ignore[reportArgumentType]
        tensors = converter.convert(self.target, model=names, config=names.config)
        return {
            name: tensor[0] if isinstance(tensor, list) else tensor
            for name, tensor in tensors.items()
        }


class NameMap:
    """Names of the checkpoint ↔ names of the model, for one model class. Build it before the
    experts are unfused."""

    def __init__(self, model: PreTrainedModel):
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._by_pattern = {p: c for c in self._converters for p in c.source_patterns}
        self._prefix = model.base_model_prefix
        self.config = model.config
        self._stored: dict[str, str] = {}  # names in checkpoints, blocks and experts being number 0
        self._state = dict(model.state_dict())  # meta tensors: names and nothing else

    def get_parameter(self, name: str) -> Tensor:
        """A parameter of the fused model, for its shape; converters take this object for the
        model."""
        return self._state[name]

    def expert_names(self, path: str) -> ExpertNames:
        """What checkpoints of this model call the projections of the experts at ``path``."""
        gate_up, down = (self._merged(f"{path}.{name}") for name in FUSED)
        if gate_up is None or down is None:
            return ExpertNames()  # fused in the checkpoint as well: the names that most models have
        return ExpertNames(*gate_up, *down)

    def stacked(self, path: str) -> bool:
        """Whether checkpoints of this model have the experts at ``path`` in one tensor as well."""
        return self._merged(f"{path}.{FUSED[1]}") is None

    def _merged(self, parameter: str) -> list[str] | None:
        """Leaf names of the Linears that a plain fused parameter is merged from, or None."""
        for converter in self._converters:
            target = converter.target_patterns[0]
            if parameter.endswith(target) and _is_plain_merge(converter):
                leaves = [
                    re.search(r"\*\.(\w+)(?:\\?\.weight)$", p) for p in converter.source_patterns
                ]
                return [leaf[1] for leaf in leaves if leaf]
        return None

    def origins(self, names: Iterable[str]) -> dict[str, Origin]:
        """For each parameter of the (fused) model, which of the checkpoint's ``names`` make it
        up."""
        sources: dict[tuple[str, int | None], dict[str, list[str]]] = {}
        names = set(names)
        packed = {n.removesuffix(PACKED[0]) for n in names if n.endswith(PACKED[0])}
        packed = {stem for stem in packed if f"{stem}{PACKED[1]}" in names}
        for name in sorted(names, key=dot_natural_key):
            renamed, pattern = self._rename(name)
            if renamed in self._state:
                key = (renamed, id(self._by_pattern[pattern]) if pattern else None)
                sources.setdefault(key, {}).setdefault(pattern or name, []).append(name)
        origins: dict[str, Origin] = {}
        for (target, _), collected in sources.items():
            converter = self._by_pattern.get(next(iter(collected)))
            ordered = tuple(
                (p, tuple(collected[p]))
                for p in (converter.source_patterns if converter else collected)
                if p in collected
            )
            origin = Origin(ordered, converter, target)
            for produced in self._targets(target, converter):
                origins.setdefault(produced, origin)
        for stem in packed:
            target, _ = self._rename(stem)
            if target in self._state:
                origins.setdefault(
                    target, Origin((("", tuple(stem + leaf for leaf in PACKED)),), None, target)
                )
        return origins

    def _targets(self, target: str, converter: WeightConverter | None) -> Iterator[str]:
        yield target
        first, *others = converter.target_patterns if converter else ("",)
        for other in others:
            yield target.replace(first, other, 1)

    def _rename(self, name: str) -> tuple[str, str | None]:
        renamed, pattern = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._state
        )
        if renamed not in self._state and name in self._state:
            return rename_source_key(name, [], [], self._prefix, self._state)
        return renamed, pattern

    def stored_name(self, name: str) -> str:
        """What checkpoints of this model call a parameter of the model or of split experts, by
        renaming alone."""
        numbers = [part for part in name.split(".") if part.isdecimal()]
        pattern = ".".join("0" if part.isdecimal() else part for part in name.split("."))
        if pattern not in self._stored:  # the blocks and experts of a model are alike
            reverse = (renaming.reverse_transform() for renaming in self._renamings)
            renamings = [r for r in reverse if isinstance(r, WeightRenaming)]
            self._stored[pattern], _ = rename_source_key(pattern, renamings, [])
        parts, left = self._stored[pattern].split("."), iter(numbers)
        return ".".join(next(left) if part.isdecimal() else part for part in parts)

    def candidates(self, name: str) -> tuple[str, ...]:
        """What the model may call a tensor of a checkpoint, also one that only quantized layers
        have."""
        renamed, _ = rename_source_key(name, self._renamings, [])
        return renamed, f"{self._prefix}.{renamed}", renamed.removeprefix(f"{self._prefix}.")


def dtype_plan(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], torch.dtype | None]:
    """By parameter name, the type that transformers keeps it in when the rest is ``dtype``; None
    for ``dtype``."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return lambda _: None
    pattern, names, _ = build_glob_alternation(list(plan))

    def kept(name: str) -> torch.dtype | None:
        match = pattern.search(name)
        return plan[names[match.lastgroup]] if match and match.lastgroup else None

    return kept


def _is_plain_merge(converter: WeightConverter) -> bool:
    merge, *rest = converter.operations
    plain = isinstance(merge, MergeModulelist) and merge.dim == 0
    if len(converter.source_patterns) == 2:
        return plain and len(rest) == 1 and isinstance(rest[0], Concatenate) and rest[0].dim == 1
    return plain and len(converter.source_patterns) == 1 and not rest


def split_experts(origins: dict[str, Origin], experts: dict[str, Layout]) -> dict[str, Origin]:
    """Replace the origins of fused expert parameters, by path of the experts, by those of the
    unfused Linears."""
    result = dict(origins)
    for path, layout in experts.items():
        separate = {name: _by_expert(origins.get(f"{path}.{name}")) for name in FUSED}
        for name, fused, position, part in layout.parts():
            origin = origins.get(f"{path}.{fused}")
            assert part.expert is not None
            if origin is None:
                continue
            if found := separate.get(fused):
                if stored := found[position].get(part.expert):
                    result[f"{path}.{name}"] = Origin(((stored, (stored,)),), None, stored)
            else:
                result[f"{path}.{name}"] = Origin(
                    origin.sources, origin.converter, origin.target, part
                )
        for name in (*FUSED, *(f"{name}_bias" for name in FUSED)):
            result.pop(f"{path}.{name}", None)
    return result


def _by_expert(origin: Origin | None) -> list[dict[int, str]] | None:
    """Of experts that the checkpoint stores apart: per pattern of the merge, the name by expert;
    None for others."""
    if origin is None or origin.converter is None or not _is_plain_merge(origin.converter):
        return None
    by_pattern = dict(origin.sources)
    matches = (
        [(re.search(r"\.(\d+)\.\w+\.weight$", name), name) for name in by_pattern.get(pattern, ())]
        for pattern in origin.converter.source_patterns
    )
    return [{int(match[1]): name for match, name in pairs if match} for pairs in matches]


def apart(
    origins: dict[str, Origin], names: Iterable[str], parameters: Collection[str], names_of: NameMap
) -> None:
    """Add the origins of parameters that a checkpoint has under the model's own names although
    others have them fused: what :meth:`ptq.model.source.Source.kept` makes of partly
    quantized experts."""
    used = {name for origin in origins.values() for name in origin.names}
    for name in (n for n in names if n not in used):
        for candidate in names_of.candidates(name):
            if candidate in parameters and candidate not in origins:
                origins[candidate] = Origin(((name, (name,)),), None, candidate)
