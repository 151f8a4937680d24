"""Which dialect can carry a result exactly, and why another cannot (spec interop.md, sections 6 and
7).

An export that its reader would compute wrongly without an error is refused, with the reason and a
way out. All of this needs only descriptions of the layers: it is asked before quantization, and
again when the checkpoint is finished.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.checkpoint.compressed_tensors import FORMAT_NAMES
from ptq.checkpoint.quantization_config import LayerInfo, is_expert

DIALECTS = ("auto", "compressed-tensors", "ptq")
# Engines merge these into one matmul with one global scale and one rotation.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Choice:
    """A dialect, ``"compressed-tensors"`` or ``"ptq"``, and one line that says why."""

    dialect: str
    reason: str


def choose(
    layers: Mapping[str, LayerInfo],
    dialect: str = "auto",
    *,
    dtype: str | None,
    scales: Mapping[str, Tensor] | None = None,
    foreign: str | None = None,
) -> Choice:
    """The dialect in which to write ``layers``, or a refusal.

    Args:
        dialect: one of ``DIALECTS``. ``"auto"`` takes compressed-tensors when transformers and vLLM
            both compute it exactly, an explicit one is held to what vLLM does.
        dtype: of the rest of the model, as in config.json (``"bfloat16"``); None is unknown.
        scales: weight global scales (any convention) by layer, once they are known.
        foreign: why other programs do not look for these layers at all, if so: only ours reads them
            then.

    Raises:
        ValueError: an unknown dialect, or an explicit one that cannot express the layers.
    """
    if dialect not in DIALECTS:
        raise ValueError(f"unknown dialect {dialect!r}; choose one of {', '.join(DIALECTS)}")
    if dialect == "ptq":
        return Choice("ptq", "as asked")
    reason = f"{foreign}; use dialect ptq" if foreign else None
    reason = reason or ct_refusal(
        layers,
        targets=("vLLM", "transformers") if dialect == "auto" else ("vLLM",),
        dtype=dtype,
        scales=scales,
    )
    if dialect == "auto" and reason is None and dtype != "bfloat16":
        reason = f"the dtype of the model is {dtype}, and other engines compute FP4 checkpoints in bfloat16"
    if reason is None:
        why = "as asked" if dialect != "auto" else "transformers and vLLM compute it exactly"
        return Choice("compressed-tensors", why)
    if dialect == "auto":
        return Choice("ptq", f"not compressed-tensors: {reason}")
    raise ValueError(f"cannot write compressed-tensors: {reason}")


def ct_refusal(
    layers: Mapping[str, LayerInfo],
    *,
    targets: Iterable[str],
    dtype: str | None,
    scales: Mapping[str, Tensor] | None = None,
) -> str | None:
    """Why compressed-tensors is wrong for ``layers`` in one of ``targets``, and what to do; None if
    it is right."""
    targets = tuple(targets)
    formats = {info.format for info in layers.values()}
    if not formats <= set(FORMAT_NAMES):
        unknown = ", ".join(sorted(formats - set(FORMAT_NAMES)))
        return f"it has no format for {unknown}; use dialect ptq"
    if len(formats) > 1:
        return (
            f"one checkpoint would mix {', '.join(sorted(formats))}; use one format, or dialect ptq"
        )
    if len({(info.quantize_inputs, info.input_rule) for info in layers.values()}) > 1:
        return "layers quantize their inputs in different ways; use one scheme, or dialect ptq"
    for name, info in layers.items():
        reason = _layer_refusal(name, info, targets, dtype)
        if reason:
            return f"{name}: {reason}"
    return _fused_refusal(layers, scales or {})


def _layer_refusal(
    name: str, info: LayerInfo, targets: tuple[str, ...], dtype: str | None
) -> str | None:
    rotated, expert = info.rotation > 1, is_expert(name)
    if rotated and expert:
        return "no engine rotates the inputs of experts; leave the experts unrotated, or use dialect ptq"
    if rotated and info.rotation not in SIZES:
        return f"engines rotate in blocks of {SIZES}, not {info.rotation}; choose one of those, or use dialect ptq"
    if rotated and info.bias and "vLLM" in targets:
        return "vLLM asserts that a rotated linear layer has no bias; leave it unrotated, or use dialect ptq"
    if info.format == "nvfp4":
        if rotated and not info.quantize_inputs and "vLLM" in targets:
            return "vLLM computes rotated weight-only NVFP4 wrongly on Blackwell; use w4a4, no rotation, or dialect ptq"
        if expert and "transformers" in targets:
            return "transformers drops the global scale of NVFP4 experts (#48371); use mxfp4, or dialect ptq"
        if info.quantize_inputs and not info.static_inputs:
            return "NVFP4 inputs need a calibrated global scale; calibrate it, or use dialect ptq"
    if info.format == "nvint4":
        if info.quantize_inputs:
            return "int4 inputs have no place for E4M3 scales; quantize weights only, or use dialect ptq"
        if dtype != "bfloat16":
            return f"its scales are folded into bf16, the dtype of the model is {dtype}; use a bf16 model, or dialect ptq"
    return None


def fused_groups(names: Iterable[str]) -> list[list[str]]:
    """The layers that engines merge with one another, groups of two or more."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        for family in FUSED:
            if leaf in family:
                groups.setdefault((parent, family), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _fused_refusal(layers: Mapping[str, LayerInfo], scales: Mapping[str, Tensor]) -> str | None:
    for group in fused_groups(layers):
        first, *rest = group
        if any(layers[name].rotation != layers[first].rotation for name in rest):
            return f"{', '.join(group)} are one matmul in engines and have different rotations; use one, or dialect ptq"
        known = [scales[name] for name in group if name in scales]
        if layers[first].format == "nvfp4" and any(not torch.equal(known[0], t) for t in known[1:]):
            return f"{', '.join(group)} are one matmul in engines, with two global scales; requantize, or use dialect ptq"
    tensors = [
        name
        for name, info in layers.items()
        if info.format == "mxfp4" and name in scales and scales[name].item() != 1
    ]
    if tensors:
        return f"{tensors[0]} has a global scale besides its E8M0 scales; requantize, or use dialect ptq"
    return None
