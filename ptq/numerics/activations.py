"""What happens to an activation on its way into a quantized layer: the oracle of the
``rotate_quantize`` kernel.

In float32, one correctly rounded division per group and one product per element (K1):

    y = (x · H) · size^-½
    E4M3:  s = e4m3(clamp(amax · c, 2^-9, 448)),  c = (1/t) · (1/Q);   z = y · ((1/t) / s)
    bf16:  the same with t = 1 and bfloat16 for e4m3
    E8M0:  byte from the exponent and mantissa of amax;                z = y · 2^(127 - byte)
    code = nearest to z, ties to the even code, saturating

The rule ``four_six`` (arXiv 2512.02010) puts the largest magnitude on 6 or on 4, whichever costs
the group less: of s and of e4m3 of 1.5 times as much the one with the smaller

    s² · Σ d²,   d = min(|z - value of its code|, 2), rounded to a multiple of 2^-9

and s itself on ties. Rounded so, the squares are whole multiples of 2^-18 and their sum is at most
2^24 of them: it is exact in float32 whatever the order, on any machine (K1).
"""

from functools import lru_cache

import torch
from jaxtyping import Float, Float32, Integer
from torch import Tensor
from torch.nn.functional import max_pool1d

from ptq.numerics.formats import E4M3_LARGEST, Format
from ptq.numerics.rotation import Rotation
from ptq.numerics.scales import scale_bytes
from ptq.numerics.tensor import QuantizedTensor, Scales, group

# Element → the scale rules of inputs with E4M3 scales: only E2M1 has a wide step at its top.
E4M3_RULES = {"e2m1": ("absmax", "four_six")}
E8M0_RULES = ("theta", "absmax", "ceil", "ocp", "round")
# The scale of a token's largest group: 1.5 times that is a number of E4M3 too.
ROOM_FOR_FOUR = 256.0
# Up to so many, calls take more time than numbers.
FEW_NUMBERS = 1 << 14
# 1.5 · 2^14: what is added to it and taken off again is rounded to a multiple of 2^-9.
TO_512THS = 24576.0


def input_rules(fmt: Format) -> tuple[str, ...]:
    """The scale rules that activations of a format can have, its own first."""
    if fmt.powers_of_two:
        return E8M0_RULES
    return E4M3_RULES.get(fmt.element.name, ("absmax",)) if fmt.has_global_scale else ("absmax",)


def default_rule(fmt: Format) -> str:
    """A format's own scale rule of dynamic activations (F6), which engines compute too: ``absmax``
    for E4M3 and bfloat16 scales, ``theta`` for E8M0."""
    return input_rules(fmt)[0]


def best_rule(fmt: Format, rotation: int) -> str:
    """The scale rule that measured best for activations in rotation blocks of so many (A2)."""
    return "four_six" if rotation == 1 and "four_six" in input_rules(fmt) else default_rule(fmt)


def row_scale(
    y: Float32[Tensor, "tokens in"], fmt: Format, rule: str = "absmax"
) -> Float32[Tensor, "tokens 1"]:
    """A global scale for every token: its largest magnitude at the top of the range; 1 for a token
    of zeros (F14). ``four_six`` needs room above that for the larger of its two scales."""
    amax = y.abs().amax(-1, keepdim=True)
    top = ROOM_FOR_FOUR if rule == "four_six" else E4M3_LARGEST
    return torch.where(
        amax > 0,
        (amax / (top * fmt.element.max)).clamp(min=2.0**-126),
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
            token. Ignored by formats of other scales, which have none.
        rule: one of :func:`input_rules`; None is :func:`default_rule`.

    Raises:
        ValueError: features that do not form groups or rotation blocks, or a rule that the format
            does not have.
    """
    z, t, scale, bits = _scaled(x, fmt, rotation, global_scale, rule)
    if bits is None:
        bits = fmt.encode_scale(scale)  # exact: it is one that can be stored
    return QuantizedTensor(fmt.element.encode(z.flatten(1)), Scales(bits.squeeze(-1), t, fmt))


def round_inputs(
    x: Float[Tensor, "tokens in"],
    fmt: Format,
    rotation: Rotation,
    global_scale: Float32[Tensor, ""] | None = None,
    rule: str | None = None,
) -> Float32[Tensor, "tokens in"]:
    """``quantize_inputs(…).dequantize()``, the same bits without codes in between: for few tokens
    on a CPU in a third of the time."""
    z, t, scale, _ = _scaled(x, fmt, rotation, global_scale, rule)
    if t.ndim:
        t = t.unsqueeze(-1)
    return fmt.element.round_(z).mul_(scale * t).view(x.shape)


def _scaled(
    x: Float[Tensor, "tokens in"],
    fmt: Format,
    rotation: Rotation,
    global_scale: Float32[Tensor, ""] | None,
    rule: str | None,
) -> tuple[
    Float32[Tensor, "tokens groups size"],
    Float32[Tensor, "*t"],
    Float32[Tensor, "tokens groups 1"],
    Integer[Tensor, "tokens groups 1"] | None,
]:
    """The rotated activations in units of their groups' scales, not rounded yet and in memory of
    their own; the global scale; what the scale bytes stand for; and those, if they were needed."""
    rule = rule or default_rule(fmt)
    if rule not in input_rules(fmt):
        raise ValueError(
            f"activations of {fmt.name} have no scale rule {rule!r}; choose from "
            f"{', '.join(input_rules(fmt))}"
        )
    y = rotation.exact(x).float()
    groups = group(y, fmt)
    amax = group_maxima(groups)
    one = torch.ones((), dtype=torch.float32, device=x.device)
    if fmt.powers_of_two:
        t = one
        bits = scale_bytes(amax, fmt, t, rule)
        factor = fmt.decode_scale(254 - bits)  # 2^(127 - byte), for bytes 1 … 254
        return groups * factor, t, fmt.decode_scale(bits), bits
    if not fmt.has_global_scale:
        t = one
    else:
        t = row_scale(y, fmt, rule) if global_scale is None else global_scale.float()
    inverse = t.reciprocal()
    if t.ndim:  # one per token
        inverse = inverse.unsqueeze(-1)
    wanted = amax.mul_(inverse * _reciprocal(fmt.element.max))
    scale = fmt.nearest_scale(wanted)
    z = groups * (inverse / scale)
    if rule == "four_six":
        wider = fmt.nearest_scale(wanted.mul_(1.5))
        wider_z = groups * (inverse / wider)
        better = _cost(wider_z, fmt, wider) < _cost(z, fmt, scale)
        z, scale = torch.where(better, wider_z, z), torch.where(better, wider, scale)
    return z, t, scale, None


def group_maxima(
    groups: Float32[Tensor, "tokens groups size"],
) -> Float32[Tensor, "tokens groups 1"]:
    """The largest magnitude of every group."""
    if groups.numel() <= FEW_NUMBERS:
        return groups.abs().amax(-1, keepdim=True)
    # over so few numbers a CPU takes three times as long to reduce a dimension
    tokens, count, size = groups.shape
    return max_pool1d(groups.abs().view(tokens, 1, -1), size).view(tokens, count, 1)


@lru_cache(maxsize=16)
def _reciprocal(largest: float) -> float:
    """Of the largest magnitude of an element, rounded to float32."""
    return float(1 / torch.tensor(largest, dtype=torch.float32))


def _cost(
    z: Float32[Tensor, "tokens groups size"],
    fmt: Format,
    scale: Float32[Tensor, "tokens groups 1"],
) -> Float32[Tensor, "tokens groups 1"]:
    """``s² · Σ d²`` of every group with these scales."""
    distance = fmt.element.round(z).sub_(z).abs_().clamp_(max=2.0)
    distance = distance.add_(TO_512THS).sub_(TO_512THS)
    return scale.square().mul_(distance.square_().sum(-1, keepdim=True))
