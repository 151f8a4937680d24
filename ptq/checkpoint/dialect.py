"""What a dialect is: how config.json says what is quantized, how tensors lie on disk, and who reads
them.

Everything that differs between dialects is in one :class:`Dialect`, in a file of its own; the table
of them is :mod:`ptq.checkpoint.dialects`. Reader, writer and model card ask the record, so that a
new dialect is a file and a row.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.checkpoint.engines import Openings
from ptq.checkpoint.quantization_config import JsonDict, LayerInfo, Quantization, is_key_value_scale
from ptq.reading.safetensors_layout import Entry

Layers = Mapping[str, LayerInfo]
Tensors = Mapping[str, Tensor]
# Why a quantized head is written in no dialect of engines.
HEAD_NOT_FOUND = "engines do not look for a quantized output head"
PACKED = "weight_packed"  # the tensor with the codes, if a conversion does not name another


@dataclass(frozen=True, kw_only=True)
class Export:
    """What is to be written: the question to a dialect.

    Attributes:
        layers: descriptions by name.
        dtype: of the rest of the model, as in config.json (``"bfloat16"``); None is unknown.
        scales: global scales of weights (any convention) by layer, as far as they are known.
        foreign: why other programs do not look for these layers at all, or None.
        kv_cache: how keys and values are kept, if there are scales for them.
    """

    layers: Layers
    dtype: str | None
    scales: Tensors
    foreign: str | None = None
    kv_cache: str | None = None


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How a dialect stores the tensors of a layer, if not as the ``ptq`` dialect does.

    Law: ``read(write(tensors))`` stands for the same numbers. Keys of both are names without that
    of the layer, such as ``weight_scale``; a bias is passed on.

    Attributes:
        types: what must be on disk for ``read``, with the types that it may have.
        optional: what may be there besides.
        packed: name of the tensor with the codes; its rows are the outputs.
        write, read: raise ValueError where they would have to round, ``read`` also for shapes that
            do not belong together. ``read`` may give global scales as float64 divisors, where no
            float32 divisor stands for the stored factor.
    """

    types: Mapping[str, tuple[torch.dtype, ...]]
    optional: tuple[str, ...] = ()
    packed: str = PACKED
    write: Callable[[Tensors], dict[str, Tensor]]
    read: Callable[[Tensors], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """A way to store quantized layers that other programs know, or only ours.

    Attributes:
        name: ``quant_method`` in config.json.
        config: the ``quantization_config`` of a model, from its summary, its quantized layers and
            the names of its other linear layers.
        parse: the inverse of ``config``; raises ValueError for what it does not know, and therefore
            might read wrongly.
        refusal: why it has no place for an export, whoever reads it, and what to do; None if it
            has.
        opens: what each of :data:`ptq.checkpoint.engines.ENGINES` makes of layers that are not
            refused.
        caveats: Markdown for the model card, sentences about all engines.
        held_to: engines that must compute right what is written in this dialect without a target.
        why_import: what goes wrong with such layers in transformers without ``import ptq.hf``, for
            the model card; None if nothing does.
        conversion: of layers like this one; None if they lie on disk as in ``ptq``.
        arrange: where the tensors of layers lie, by the names that a reader looks for, from where
            all tensors of the files do.
        mark: name of the tensor that shows that a layer is quantized, beside ``weight_packed``.
        extra_tensors: what is stored besides the tensors of the model, by full name.
        is_extra: whether a tensor of that name is one of those: the reader leaves them out.
        needs: packages that transformers needs to open it.
        extra_files: JSON files besides config.json, by name, from the ``quantization_config``.
        store_key_value: name and tensor of a scale of keys or values in it, from those of the
            ``ptq`` dialect: ``….self_attn.k_scale`` float32 [1]; None if they are the same.
        key_value_name: the inverse for names; all others are as they are.
        config_file: a file beside the weights that may say alone what config.json should.
        applies_input_rule: whether all who read it scale inputs by the rule that it names; if not,
            they may take the format's own
            (:func:`ptq.numerics.activations.default_rule`).
    """

    name: str
    config: Callable[[Quantization, Layers, Iterable[str]], JsonDict]
    parse: Callable[[Mapping[str, object]], Quantization]
    refusal: Callable[[Export], str | None]
    opens: Callable[[Layers], Openings]
    caveats: Callable[[Layers], list[str]] = lambda layers: []
    held_to: tuple[str, ...] = ()
    why_import: Callable[[Layers], str | None] = lambda layers: None
    conversion: Callable[[LayerInfo], Conversion | None] = lambda info: None
    arrange: Callable[[Mapping[str, Entry]], dict[str, Entry]] = dict
    mark: str = "weight_scale"
    extra_tensors: Callable[[Layers], dict[str, Tensor]] = lambda layers: {}
    is_extra: Callable[[str], bool] = lambda name: False
    extra_files: Callable[[JsonDict], dict[str, JsonDict]] = lambda config: {}
    store_key_value: Callable[[str, Tensor], tuple[str, Tensor]] | None = None
    key_value_name: Callable[[str], str] = lambda name: name
    config_file: str | None = None
    applies_input_rule: bool = True
    needs: tuple[str, ...] = ()

    def quantized(self, names: Iterable[str]) -> list[str]:
        """The quantized layers among tensors of these full names, in their order; also those of
        which a tensor is missing, unless what is left is an ordinary ``weight``."""
        split = (name.rpartition(".") for name in names)
        return list(dict.fromkeys(owner for owner, _, leaf in split if leaf in (self.mark, PACKED)))

    def stored(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        """Name and tensor as it lies on disk, of one that belongs to no quantized layer."""
        if self.store_key_value is None or not is_key_value_scale(name):
            return name, tensor
        return self.store_key_value(name, tensor)
