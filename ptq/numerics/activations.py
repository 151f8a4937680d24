"""What happens to an activation on its way into a quantized layer: the oracle of the
``rotate_quantize`` kernel.

In float32, one correctly rounded division per group and one product per element (K1):

    y = (x · H) · size^-½
    E4M3:  s = e4m3(clamp(amax · c, 2^-9, 448)),  c = (1/t) · (1/Q);   z = y · ((1/t) / s)
    E8M0:  byte from the exponent and mantissa of amax;                z = y · 2^(127 - byte)
    code = nearest to z, ties to the even code, saturating
"""

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from ptq.numerics.formats import E4M3_LARGEST, Format
from ptq.numerics.rotation import Rotation
from ptq.numerics.scales import scale_bytes
from ptq.numerics.tensor import QuantizedTensor, Scales, group


def default_rule(fmt: Format) -> str:
    """The scale rule of dynamic activations (F6): ``absmax`` for E4M3 scales, ``theta`` for
    E8M0."""
    return "absmax" if fmt.has_global_scale else "theta"


def row_scale(y: Float32[Tensor, "tokens in"], fmt: Format) -> Float32[Tensor, "tokens 1"]:
    """A global scale for every token: its largest magnitude at the top of the range; 1 for a token
    of zeros (F14)."""
    amax = y.abs().amax(-1, keepdim=True)
    return torch.where(
        amax > 0,
        (amax / (E4M3_LARGEST * fmt.element.max)).clamp(min=2.0**-126),
        torch.ones_like(amax),
    )


def quantize_inputs(
    x: Float[Tensor, "tokens in"],
    fmt: Format,
    rotation: Rotation,
    global_scale: Float32[Tensor, ""] | None = None,
    rule: str | None = None,
) -> QuantizedTensor:
    """Rotate activations and round them to ``fmt``, a scale per token and group.

    Args:
        global_scale: the calibrated float32 factor of formats with E4M3 scales; None takes one per
            token. Ignored by formats with E8M0 scales, which have none.
        rule: a rule of :func:`ptq.numerics.scales.scale_bytes`; None is :func:`default_rule`.

    Raises:
        ValueError: features that do not form groups or rotation blocks, or a rule that the format
            does not have.
    """
    y = rotation.exact(x).float()
    groups = group(y, fmt)
    amax = groups.abs().amax(-1)
    rule = rule or default_rule(fmt)
    if fmt.has_global_scale:
        if rule != "absmax":
            raise ValueError(f"activations of {fmt.name} have the scale rule absmax, not {rule!r}")
        t = row_scale(y, fmt) if global_scale is None else global_scale.float()
        inverse = 1 / t
        constant = inverse * (1 / torch.tensor(fmt.element.max))
        bits = fmt.encode_scale(amax * constant)
        factor = inverse / fmt.decode_scale(bits)
    else:
        t = torch.ones((), device=x.device)
        bits = scale_bytes(amax, fmt, t, rule)
        factor = fmt.decode_scale(254 - bits)  # 2^(127 - byte), for bytes 1 … 254
    return QuantizedTensor(
        fmt.element.encode((groups * factor.unsqueeze(-1)).flatten(1)), Scales(bits, t, fmt)
    )
