"""Checkpoints in blocks of FP8 (DeepSeek-V3, the FP8 files of Qwen3), as sources in 16 bits.

A weight ``X`` of E4M3 numbers has beside it ``X_scale_inv``: what the numbers of a block of it are
*multiplied* with, the name notwithstanding. Blocks at the edges may be cut. Values come out as
those that trained with the model convert them: the product in float32, rounded to the type of the
other weights.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from transformers import PretrainedConfig

from ptq.model.weight_files import Shards
from ptq.reading.safetensors_layout import DTYPES
from ptq.reading.schema import check

METHOD = "fp8"  # quant_method in config.json
SCALES = "_scale_inv"
NARROW = (torch.float8_e4m3fn, torch.float8_e5m2)
Side = Annotated[int, Field(ge=1, le=2**20)]


@dataclass(frozen=True)
class _Method:
    weight_block_size: tuple[Side, Side] | None = None


class Fp8Shards(Shards):
    """The same tensors as in the files, weights multiplied with their scales; those have no names
    here."""

    def __init__(self, path: Path, block: tuple[int, int] | None):
        """Read the headers.

        Args:
            block: rows and columns that share a scale; None for one scale a tensor.

        Raises:
            ValueError: an FP8 weight without scales, or with another number of them than of blocks;
                or as :class:`Shards`.
        """
        super().__init__(path)
        self._block = block
        narrow = [n for n, e in self._entries.items() if DTYPES.get(e.dtype) in NARROW]
        self._scales = {}
        for name in narrow:
            scales = self._entries.pop(f"{name}{SCALES}", None)
            if scales is None:
                raise ValueError(
                    f"{path}: {name} is in FP8 and has no {name}{SCALES}: start from the original "
                    "model, or copy this one again"
                )
            self._scales[name] = scales
            wanted = self._grid(self._entries[name].shape)
            if wanted != scales.shape and not (block is None and scales.shape in ((), (1,))):
                raise ValueError(
                    f"{path}: {name}{SCALES} has shape {scales.shape}, and {name} of shape "
                    f"{self._entries[name].shape} has {wanted} blocks of "
                    f"{'all of it' if block is None else f'{block[0]} x {block[1]}'}: copy the "
                    "model again"
                )

    def _grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self._block is None:
            return ()
        *outer, rows, columns = shape if len(shape) > 1 else (1, *shape)
        return (*outer, -(-rows // self._block[0]), -(-columns // self._block[1]))

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU, dequantized if it is in FP8.

        Raises:
            ValueError: there is none of that name, or a scale that is no positive finite number.
        """
        value = super().tensor(name)
        if name not in self._scales:
            return value
        self._entries[f"{name}{SCALES}"] = self._scales[name]
        try:
            scales = super().tensor(f"{name}{SCALES}").float()
        finally:
            del self._entries[f"{name}{SCALES}"]
        if not bool(((scales > 0) & scales.isfinite()).all()):
            raise ValueError(
                f"{self.path}: {name}{SCALES} holds what is no scale, it should be positive and "
                "finite: copy the model again"
            )
        return dequantize(value, scales, self._block, self.common_dtype())

    def dtype(self, name: str) -> torch.dtype | None:
        """The type of what :meth:`tensor` gives."""
        return self.common_dtype() if name in self._scales else super().dtype(name)


def dequantize(
    value: Float[Tensor, "*outer out in"],
    scales: Float[Tensor, "..."],
    block: tuple[int, int] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "*outer out in"]:
    """``value`` times the scale of its block, the product in float32, in ``dtype``.

    Args:
        scales: float32, one for each block of ``block`` rows and columns, cut at the edges; None
            for one of all.
    """
    if block is None:
        return (value.float() * scales.reshape(())).to(dtype)
    rows, columns = value.shape[-2:]
    wide = scales.repeat_interleave(block[1], dim=-1)[..., :columns]
    result = torch.empty(value.shape, dtype=dtype)
    for row in range(scales.shape[-2]):  # of a weight of 10⁹ numbers no copy in float32
        part = slice(row * block[0], min((row + 1) * block[0], rows))
        result[..., part, :] = (value[..., part, :].float() * wide[..., row : row + 1, :]).to(dtype)
    return result


def open_shards(path: Path, config: PretrainedConfig) -> Shards:
    """The tensors of a directory, those in FP8 dequantized if the configuration says what they are.

    Raises:
        ValueError: ``weight_block_size`` is not what it should be; or as :class:`Fp8Shards`.
    """
    method = getattr(config, "quantization_config", None)
    if not isinstance(method, dict) or method.get("quant_method") != METHOD:
        return Shards(path)
    where = f"{path / 'config.json'}: quantization_config"
    return Fp8Shards(path, check(method, _Method, where, "copy it again").weight_block_size)
