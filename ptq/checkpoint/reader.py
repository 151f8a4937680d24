"""The reader of quantized checkpoints; the schema is the docstring of :mod:`ptq.checkpoint`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ptq.checkpoint.dialect import PACKED, Dialect
from ptq.checkpoint.dialects import DIALECTS, dialect_of, parse
from ptq.checkpoint.layer_checks import GLOBALS, check_layer, check_types
from ptq.checkpoint.layer_report import LayerReport
from ptq.checkpoint.quantization_config import JsonDict, LayerInfo, is_key_value_scale
from ptq.checkpoint.safetensors_files import read_tensor
from ptq.checkpoint.tuning_report import TuningReport
from ptq.numerics.formats import FORMATS
from ptq.reading.model_config import read_model_config
from ptq.reading.safetensors_layout import Entry, check_listed, read_header, read_index
from ptq.reading.schema import JsonObject, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
REPORT = "ptq_report.json"
PARTIAL = ".partial"


@dataclass(frozen=True)
class _Reports:
    layers: list[LayerReport]
    tuning: TuningReport | None = None


def to_disk(tensors: Mapping[str, Tensor], layers: Mapping[str, LayerInfo]) -> dict[str, Tensor]:
    """The tensors of a state dict in memory form as the ``ptq`` dialect stores them.

    Args:
        tensors: by full name; what does not belong to ``layers`` is passed on as it is.

    Law: ``from_disk(to_disk(tensors, layers), layers) == tensors``, bit by bit.
    """
    result = dict(tensors)
    for name, info in layers.items():
        fmt = FORMATS[info.format]
        if not fmt.powers_of_two:
            result[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"].view(fmt.scale_dtype)
        for key in (f"{name}.{leaf}" for leaf in GLOBALS):
            if key in tensors:
                t = tensors[key]
                assert t.dtype == torch.float32 and torch.equal(1 / (1 / t), t), (
                    f"{key} does not survive two reciprocals"
                )
                result[key] = (1 / t).reshape(1)
    return result


def from_disk(tensors: Mapping[str, Tensor], layers: Mapping[str, LayerInfo]) -> dict[str, Tensor]:
    """The inverse of :func:`to_disk`.

    Raises:
        ValueError: a tensor of a layer is missing, or what :func:`check_layer` refuses.
    """
    result = dict(tensors)
    for name, info in layers.items():
        stored = {
            key.removeprefix(f"{name}."): tensor
            for key, tensor in tensors.items()
            if key.rpartition(".")[0] == name
        }
        result |= {f"{name}.{leaf}": t for leaf, t in layer_from_disk(stored, info, name).items()}
    return result


def layer_from_disk(tensors: Mapping[str, Tensor], info: LayerInfo, name: str) -> dict[str, Tensor]:
    """:func:`from_disk` for the tensors of one layer, whose keys do not repeat its ``name``."""
    check_layer(tensors, info, name)
    bits = tensors["weight_scale"].view(FORMATS[info.format].bits_dtype)
    result = dict(tensors) | {"weight_scale": bits}
    for leaf in GLOBALS:
        if leaf in tensors:
            result[leaf] = (1 / tensors[leaf]).reshape(()).float()
    return result


def in_ptq_form(
    tensors: Mapping[str, Tensor], dialect: Dialect, info: LayerInfo, name: str
) -> dict[str, Tensor]:
    """The tensors of one layer as the ``ptq`` dialect stores them, from those of ``dialect``; not
    looked at further than a conversion has to.

    Args:
        tensors: as they lie on disk, by keys that do not repeat the ``name`` of the layer.

    Raises:
        ValueError: one is missing or of another type, or stands for what has no place in ``ptq``.
    """
    conversion = dialect.conversion(info)
    if conversion is None:
        return dict(tensors)
    check_types(conversion.types, tensors, name, f"{info.format} in {dialect.name}")
    try:
        return conversion.read(tensors)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


class Checkpoint:
    """A finished checkpoint directory, opened lazily.

    Attributes:
        path, config: the directory and its config.json.
        quantization: the ``quantization_config`` as written.
        parsed: what it says, the same for all dialects.
        entries: where every tensor lies.
    """

    def __init__(self, path: Path | str) -> None:
        """Read configuration and index, and the head of every file.

        Raises:
            FileNotFoundError: no such directory, an unfinished one, or a missing file.
            ValueError: not a quantized checkpoint, an unknown version, format or key, a truncated
                or damaged file.
        """
        self.path = Path(path)
        self.config = read_config(self.path)
        quantization = self.config.get("quantization_config")
        if not isinstance(quantization, dict):
            raise ValueError(
                f"{self.path} is not quantized: its config.json has no quantization_config"
            )
        self.quantization: JsonDict = quantization
        self._dialect = dialect_of(quantization, self.path)
        self.parsed = parse(quantization, self.path)
        name_of = self._dialect.key_value_name
        found = {name_of(name): entry for name, entry in _entries(self.path).items()}
        self.entries = self._dialect.arrange(found)

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self.entries)

    def tensor(self, name: str) -> Tensor:
        """One tensor as it lies on disk, scales of keys and values as the ``ptq`` dialect has them;
        raises ValueError if there is none of that name."""
        tensor = read_tensor(self._entry(name))
        one = is_key_value_scale(name) and tensor.numel() == 1 and tensor.is_floating_point()
        return tensor.float().reshape(1) if one else tensor

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise ValueError(
                f"{self.path} has no tensor {name}: the checkpoint is incomplete, copy or quantize "
                "it again"
            )
        return self.entries[name]

    def layer_names(self) -> list[str]:
        """The quantized layers, in the order of the files; also those of which a tensor is missing,
        unless what is left is an ordinary ``weight``."""
        return self._dialect.quantized(self.entries)

    @cached_property
    def layers(self) -> dict[str, LayerInfo]:
        """What is known of every quantized layer besides its tensors."""
        return {
            name: self.parsed.layer(name, bias=f"{name}.bias" in self.entries)
            for name in self.layer_names()
        }

    def shape(self, name: str) -> tuple[int, int]:
        """(outputs, inputs) of a quantized layer."""
        info = self.layers[name]
        conversion = self._dialect.conversion(info)
        codes = self._entry(f"{name}.{PACKED if conversion is None else conversion.packed}")
        per_byte = FORMATS[info.format].per_byte
        return codes.shape[0], codes.bytes * per_byte // codes.shape[0]

    def layer(self, name: str) -> dict[str, Tensor]:
        """The tensors of one quantized layer in memory form, keyed like the buffers of
        QuantLinear."""
        return layer_from_disk(self.stored_layer(name), self.layers[name], name)

    def stored_layer(self, name: str) -> dict[str, Tensor]:
        """The same as the ``ptq`` dialect stores them, whatever the dialect; not looked at further
        than a conversion has to."""
        info = self.layers[name]
        conversion = self._dialect.conversion(info)
        leaves = {"weight_packed", "weight_scale", *GLOBALS, "bias"}
        if conversion is not None:
            leaves |= {*conversion.types, *conversion.optional}
        tensors = {
            leaf: self.tensor(f"{name}.{leaf}")
            for leaf in sorted(leaves)
            if f"{name}.{leaf}" in self.entries
        }
        return in_ptq_form(tensors, self._dialect, info, name)

    def other_names(self) -> list[str]:
        """Tensors that belong to no quantized layer, sorted, without those that a dialect adds for
        other programs."""
        layers = set(self.layers)
        names = (name for name in self.names() if name.rpartition(".")[0] not in layers)
        return [name for name in names if not self._dialect.is_extra(name)]

    @property
    def dialect(self) -> str:
        """Its name, a key of :data:`ptq.checkpoint.dialects.READ`."""
        return self._dialect.name

    @property
    def recipe(self) -> JsonDict:
        """How it was made, as ``Recipe.to_dict`` gave it; empty if the checkpoint does not say."""
        return self.parsed.recipe

    @property
    def reports(self) -> list[LayerReport]:
        """The reports of all layers, in order; empty if the file is missing.

        Raises:
            ValueError: naming the file and what it lacks: it is damaged, or of another program.
        """
        return self._reports.layers

    @property
    def tuning(self) -> TuningReport | None:
        """How it was tuned; None if it was not, or the file of reports is missing.

        Raises:
            ValueError: as :attr:`reports`.
        """
        return self._reports.tuning

    @cached_property
    def _reports(self) -> _Reports:
        path = self.path / REPORT
        if not path.is_file():
            return _Reports([])
        return read_json(path, _Reports, "remove the file, nothing else needs it")

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of all tensors (``total``) and of quantized layers (``quantized``), and how many
        weights those have (``weights``)."""
        layers = set(self.layers)
        inside = [e for name, e in self.entries.items() if name.rpartition(".")[0] in layers]
        return {
            "total": sum(e.bytes for e in self.entries.values()),
            "quantized": sum(e.bytes for e in inside),
            "weights": sum(math.prod(self.shape(name)) for name in layers),
        }


def read_config(path: Path) -> JsonDict:
    """config.json of a model directory; raises FileNotFoundError and ValueError as
    :class:`Checkpoint` does."""
    file = path / "config.json"
    if not file.is_file():
        partial = path if path.name.endswith(PARTIAL) else path.with_name(path.name + PARTIAL)
        if partial.is_dir():
            raise FileNotFoundError(
                f"{partial} is unfinished: run the same `ptq quantize` again, it continues where "
                "it stopped"
            )
        raise FileNotFoundError(
            f"{path} has no config.json" if path.is_dir() else f"{path} does not exist"
        )
    config = read_model_config(path)
    if not config.get("quantization_config"):
        for dialect in DIALECTS.values():
            if dialect.config_file and (path / dialect.config_file).is_file():
                said = read_json(path / dialect.config_file, JsonObject, "copy it again")
                return config | {"quantization_config": {"quant_method": dialect.name, **said}}
    return config


def config_dtype(config: Mapping[str, object]) -> str | None:
    """The name of the dtype in a config.json, such as ``"bfloat16"``; None if it has none.

    Raises:
        ValueError: it is no floating dtype of torch.
    """
    text = config.get("text_config")
    for level in (config, text if isinstance(text, dict) else {}):
        value = level.get("dtype") or level.get("torch_dtype")
        if value:
            name = str(value).removeprefix("torch.")
            dtype = getattr(torch, name, None)
            if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                raise ValueError(
                    f"dtype in config.json is {value!r}: it should be bfloat16, float16 or float32"
                )
            return name
    return None


def _entries(path: Path) -> dict[str, Entry]:
    index = path / INDEX
    if index.is_file():
        weight_map = read_index(index)
    elif (path / SINGLE).is_file():
        return read_header(path / SINGLE)
    else:
        raise FileNotFoundError(
            f"{path} has neither {INDEX} nor {SINGLE}: the copy is incomplete, copy it again"
        )
    entries: dict[str, Entry] = {}
    for file in dict.fromkeys(weight_map.values()):
        if not (path / file).is_file():
            raise FileNotFoundError(
                f"{path / file} is missing: the copy is incomplete, copy it again"
            )
        entries |= read_header(path / file)
    check_listed(weight_map, entries, index)
    if not entries:
        raise ValueError(f"{index} lists no tensors: the file is damaged, copy it again")
    return entries
