"""Which layers the kernels cover: formats, sizes of rotations, dtypes of inputs.

Pure Python: importing this needs neither Triton nor a device.
"""

import torch
from torch import Tensor

ROTATIONS = (1, 16, 32, 64, 128)
# Element and scale type → the format's name in tables; all of them pack two codes into a byte.
FORMATS = {
    ("e2m1", "e8m0"): "mxfp4",
    ("e2m1", "e4m3"): "nvfp4",
    ("int4", "e4m3"): "nvint4",
    ("int4", "e8m0"): "mxint4",
}
# Scale type → how many columns share a scale.
GROUP_SIZE = {"e8m0": 32, "e4m3": 16}
# Largest E8M0 byte that the bf16 decoding of the matmul kernels covers: a scale of 2^9, far above
# any weight's.
LARGEST_E8M0_BYTE = 136


def obstacle(
    element: str,
    scale: str,
    group_size: int,
    in_features: int,
    *,
    rotation: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    scale_bits: Tensor | None = None,
) -> str | None:
    """Why no kernel serves such a layer (its reference path does), or None.

    Args:
        scale_bits: the weight's scale bytes (uint8); looked at once, when a layer is loaded: it
            reads the device.
    """
    if (element, scale) not in FORMATS or GROUP_SIZE[scale] != group_size:
        return f"there is no kernel for {element} elements with {scale} scales over {group_size}"
    if in_features % group_size or in_features % 2:
        return f"{in_features} input features are not groups of {group_size}"
    if rotation not in ROTATIONS or in_features % rotation:
        return (
            f"a rotation of {rotation} is not one of {ROTATIONS} that divides {in_features} "
            "input features"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        return f"kernels take bfloat16 or float16 inputs, not {str(dtype).removeprefix('torch.')}"
    if dtype == torch.float16 and scale == "e8m0":
        return "float16 cannot hold E8M0 scales; load the model in bfloat16"
    if scale == "e8m0" and scale_bits is not None and int(scale_bits.max()) > LARGEST_E8M0_BYTE:
        return f"scale bytes above {LARGEST_E8M0_BYTE} (2^9) leave the range of the bf16 decoding"
    return None


def require(
    operator: str,
    element: str,
    scale: str,
    in_features: int,
    *,
    rotation: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Raise ValueError, with the name of the operator and the reason, where no kernel serves such a
    layer."""
    group_size = GROUP_SIZE.get(scale, 0)
    reason = obstacle(element, scale, group_size, in_features, rotation=rotation, dtype=dtype)
    if reason is not None:
        raise ValueError(f"{operator}: {reason}")
