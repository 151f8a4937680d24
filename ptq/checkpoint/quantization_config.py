"""What config.json says about quantized layers, whatever the dialect: facts of single layers, and
patterns that select them.

A pattern is an exact layer name, or ``re:`` and a regular expression that is matched from the start
of the name.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field

from ptq.numerics.formats import FORMATS
from ptq.reading.name_patterns import check_pattern, matches_name
from ptq.reading.schema import Count, JsonObject, check, plain

VERSION = 1  # of what ptq writes into a configuration, in any dialect
JsonDict = dict[str, Any]
KEY_VALUES = ("fp8",)  # how keys and values may be kept: E4M3 with a scale a tensor
KEY_VALUE_SCALES = ("k_scale", "v_scale")  # under an attention layer


def is_key_value_scale(name: str) -> bool:
    """Whether a tensor is one of the two scales of an attention layer."""
    return name.rpartition(".")[2] in KEY_VALUE_SCALES


def _known_format(name: str) -> str:
    if name not in FORMATS:
        raise ValueError(f"this ptq knows {', '.join(FORMATS)}")
    return name


def _power_of_two(size: int) -> int:
    if size & (size - 1):
        raise ValueError("it must be a power of two")
    return size


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """Everything that the reader of one packed layer has to know besides its tensors.

    Attributes:
        rotation: block size of the rotation of its inputs, 1 is none.
        static_inputs: whether the global scale of its inputs is stored; if not, it is one per
            token, or none.
        input_rule: scale rule of the inputs, ``"default"`` is the format's own.
        bias: whether it has one.
        nested: bits of the narrower format that its codes hold within them
            (:mod:`ptq.numerics.nested`); 0 for none.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    format: Annotated[str, AfterValidator(_known_format)]
    rotation: Annotated[Count, AfterValidator(_power_of_two)] = 1
    quantize_inputs: bool = False
    static_inputs: bool = False
    input_rule: str = "default"
    bias: bool = False
    nested: Annotated[int, Field(ge=0, le=16)] = 0

    def to_dict(self) -> JsonDict:
        """The JSON form."""
        return plain(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> "LayerInfo":
        """The inverse of :meth:`to_dict`; raises ValueError on a key or value that it does not
        know."""
        return check(data, cls, "a layer description")


# Engines merge these into one matmul.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


def fused_groups(names: Iterable[str]) -> list[list[str]]:
    """The layers that engines merge with one another, in groups of two or more."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        for family in FUSED:
            if leaf in family:
                groups.setdefault((parent, family), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


EXPERT = re.compile(r"(.*)\.experts\.\d+\.")


def is_expert(name: str) -> bool:
    """Whether ``name`` is a layer of one of several routed experts, by the hub's naming
    ``….experts.<number>.…``."""
    return EXPERT.match(name) is not None


def expert_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """The layers of all experts of a block, by what precedes ``.experts``: engines run them in one
    scheme."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if (found := EXPERT.match(name)) is not None:
            groups.setdefault(found.group(1), []).append(name)
    return groups


def decided_together(names: Iterable[str]) -> list[list[str]]:
    """The layers that engines want in one format, in groups of two or more; some are in two."""
    names = list(names)
    experts = [group for group in expert_groups(names).values() if len(group) > 1]
    return [*fused_groups(names), *experts]


def patterns(selected: Iterable[str], everything: Iterable[str]) -> list[str]:
    """A short list of patterns that select ``selected`` and nothing else of ``everything``.

    Layers that have the same name in every block become one ``re:.*\\.suffix$`` if all of them are
    selected, so that the list does not grow with depth, and survives engines that rename the front
    of a name.
    """
    wanted = set(selected)
    known = sorted(wanted | set(everything), key=natural)
    suffixes: dict[str, list[str]] = {}
    for name in known:
        suffixes.setdefault(_suffix(name), []).append(name)
    result = []
    for suffix, names in suffixes.items():
        inside = [name for name in names if name in wanted]
        if (
            len(inside) == len(names)
            and suffix != names[0]
            and {n for n in known if matches_name(suffix, n)} <= wanted
        ):
            result.append(suffix)
        else:
            result += inside
    return result


def _suffix(name: str) -> str:
    """``re:.*\\.what follows the number of the block$``, other numbers generalised; a name without
    number as it is."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if number is None or number == len(parts) - 1:
        return name
    tail = (r"\d+" if part.isdigit() else re.escape(part) for part in parts[number + 1 :])
    return r"re:.*\." + r"\.".join(tail) + "$"


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key that puts block 2 before block 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


# Fields of a configuration that may differ by layer, and what an absent one means.
PER_LAYER: dict[str, object] = {
    "format": None,
    "hadamard": 0,
    "quantize_activations": False,
    "static_activations": False,
    "input_rule": "default",
    "nested": 0,
}
# Those that a configuration leaves out where all layers have the value above: they came later.
LEFT_OUT = ("nested",)


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """A parsed ``quantization_config``, the same for all dialects.

    Attributes:
        values: of every key of ``PER_LAYER``, what holds for layers without an override.
        overrides: {key of ``PER_LAYER``: {pattern: value}}.
        ignore: patterns of linear layers that are not quantized.
        kv_cache: ``"fp8"`` if there are scales for keys and values in E4M3, or None.
        unread: what it says besides, which is not read and would be lost by writing it again.
        recipe, provenance: how the checkpoint was made, for information.
    """

    values: Mapping[str, object]
    overrides: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    ignore: tuple[str, ...] = ("lm_head",)
    kv_cache: str | None = None
    unread: str | None = None
    recipe: JsonDict = field(default_factory=dict)
    provenance: JsonDict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kv_cache not in (None, *KEY_VALUES):
            raise ValueError(
                f"unknown kv_cache {self.kv_cache!r} in quantization_config; this ptq knows "
                f"{', '.join(KEY_VALUES)}"
            )
        for key in PER_LAYER:
            for value in (self.values[key], *self.overrides.get(key, {}).values()):
                _check(key, value)
        for pattern in (*self.ignore, *(p for by in self.overrides.values() for p in by)):
            check_pattern(pattern)

    def layer(self, name: str, *, bias: bool) -> LayerInfo:
        """What this configuration says about the quantized layer ``name``."""
        facts = {}
        for key, value in self.values.items():
            overrides = self.overrides.get(key, {}).items()
            facts[key] = next((v for pattern, v in overrides if matches_name(pattern, name)), value)
        return LayerInfo(
            format=facts["format"],
            rotation=max(facts["hadamard"], 1),
            quantize_inputs=facts["quantize_activations"],
            static_inputs=facts["static_activations"],
            input_rule=facts["input_rule"],
            bias=bias,
            nested=facts["nested"],
        )

    def ignores(self, name: str) -> bool:
        """Whether the linear layer ``name`` is left as it was."""
        return any(matches_name(pattern, name) for pattern in self.ignore)


def _check(key: str, value: object) -> None:
    if key == "format":
        if not isinstance(value, str) or value not in FORMATS:
            raise ValueError(
                f"unknown format {value!r} in quantization_config; this ptq knows "
                f"{', '.join(FORMATS)}"
            )
    elif key == "hadamard":
        if (
            not isinstance(value, int)
            or isinstance(value, bool)
            or not 0 <= value < 2**31
            or value & (value - 1)
        ):
            raise ValueError(
                f"hadamard is {value!r} in quantization_config; it must be 0 or a power of two"
            )
    elif key == "nested":
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 16:
            raise ValueError(
                f"nested is {value!r} in quantization_config; it must be 0 or the bits of a format"
            )
    elif not isinstance(value, type(PER_LAYER[key])):
        raise ValueError(
            f"{key} is {value!r} in quantization_config; it must be a "
            f"{type(PER_LAYER[key]).__name__}"
        )


@dataclass(frozen=True)
class Section:
    """What ptq alone needs, as it stands under ``ptq`` in the configuration of another's dialect;
    empty in what others wrote.

    Attributes:
        formats: of groups that could be of several formats of ours, by name.
    """

    input_rule: str = "default"
    input_rule_overrides: dict[str, str] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)
    recipe: JsonObject = field(default_factory=dict)
    provenance: JsonObject = field(default_factory=dict)

    @staticmethod
    def of(quantization: Quantization) -> JsonDict:
        """The JSON that this reads."""
        said: JsonDict = {
            "version": VERSION,
            "input_rule": quantization.values["input_rule"],
            "recipe": quantization.recipe,
            "provenance": quantization.provenance,
        }
        if overrides := quantization.overrides.get("input_rule"):
            said["input_rule_overrides"] = dict(overrides)
        return said


def summarize(
    layers: Mapping[str, LayerInfo],
    others: Iterable[str],
    *,
    recipe: JsonDict,
    provenance: JsonDict,
    kv_cache: str | None = None,
) -> Quantization:
    """The configuration of a model whose quantized layers are ``layers`` and whose other linear
    layers are ``others``.

    Law: ``summarize(layers, …).layer(name, bias=…) == layers[name]`` for every layer.

    Raises:
        ValueError: no layers.
    """
    if not layers:
        raise ValueError("no layer was quantized: ignore fewer layers")
    others = list(others)
    everything, values, overrides = [*layers, *others], {}, {}
    for key in PER_LAYER:
        names: dict[object, list[str]] = {}
        for name, info in layers.items():
            names.setdefault(_value(info, key), []).append(name)
        order = sorted(names, key=lambda value: (-len(names[value]), str(value)))
        values[key] = order[0]
        if order[1:]:
            overrides[key] = {
                p: value for value in order[1:] for p in patterns(names[value], everything)
            }
    ignore = tuple(patterns(others, everything))
    return Quantization(
        values=values,
        overrides=overrides,
        ignore=ignore,
        kv_cache=kv_cache,
        recipe=recipe,
        provenance=provenance,
    )


def _value(info: LayerInfo, key: str) -> object:
    match key:
        case "hadamard":
            return info.rotation if info.rotation > 1 else 0
        case "quantize_activations":
            return info.quantize_inputs
        case "static_activations":
            return info.static_inputs
        case _:
            return getattr(info, key)
