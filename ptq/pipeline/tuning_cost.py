"""What tuning will need: memory and operations, from shapes alone.

  latents and moments, 8 bytes a code, or moments alone, 4 (on disk with ``--activations disk``)
+ these once more, in memory, while a state is saved
+ the packed model, twice: as it is, and the best so far; what is not quantized
+ the last hidden states of the original for all text (on disk likewise)
+ what every block reads in one step, and what one batch needs in a block that is differentiated
+ of the largest block the dequantized layer at work, all derivatives, and copies of what is updated
+ embedding and output layer, and the logits of one sequence
"""

from dataclasses import dataclass

import torch

from ptq.pipeline.plan import Plan
from ptq.pipeline.speed import product_seconds
from ptq.pipeline.tuning import interval
from ptq.pipeline.tuning_text import batches_a_step, held_windows

# Of a code, by how it is tuned: two moments in bfloat16, and a latent in float32.
CODE_BYTES = {"latents": 8, "pv": 4}
# float32 tensors of a layer while it is updated: derivative, latent, moments, steps, codes.
UPDATE_COPIES = 10
# of the logits of a sequence, float32: of both models, as they are and normalised, and derivatives
LOGIT_COPIES = 7
# Numbers of float32 that a token needs in a block, by its hidden size: what is kept to
# differentiate norms, attention, products and the gate, with inner layers of about 3 times that.
TOKEN_COPIES = 48
# Passes over the weights of a block for a token: of the original one, forward, and once more to
# differentiate, and two products on the way back.
PASSES = 5
# Times what products take: rounding of inputs, updates, attention. Measured on the bundled model.
OTHERS = 1.2


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Parameters of every block, of all that is outside of them, those that are tuned, the sizes of
    hidden states and vocabulary, bytes of a number in the dtype of the computation."""

    blocks: list[int]
    outside: int
    tuned: int
    hidden: int
    vocabulary: int
    itemsize: int


def _tokens(plan: Plan) -> tuple[int, int, int]:
    """Of a batch, of a step, and held out."""
    batch = plan.recipe.batch_size * plan.seq_len
    step = batch * batches_a_step(plan.recipe.batch_size, plan.seq_len)
    return batch, step, held_windows(plan.seq_len) * plan.seq_len


def tuning_bytes(plan: Plan, shapes: Shapes, activations: str) -> float:
    """Memory at the peak, without the program itself."""
    batch, step, held = _tokens(plan)
    state = shapes.hidden * shapes.itemsize
    waiting = (
        CODE_BYTES[plan.recipe.tune_codes] * shapes.tuned + (plan.recipe.tune * step + held) * state
    )
    waiting += (len(shapes.blocks) + 1) * step * state
    bits = plan.recipe.fmt.bits_per_weight
    largest = max(shapes.blocks)
    return (
        (0 if activations == "disk" else waiting)
        + CODE_BYTES[plan.recipe.tune_codes] * shapes.tuned
        + 2 * shapes.tuned * bits / 8
        + (sum(shapes.blocks) - shapes.tuned) * shapes.itemsize
        + batch * shapes.hidden * TOKEN_COPIES * 4
        + 4 * largest * (1 + UPDATE_COPIES / 3)
        + 2 * shapes.vocabulary * shapes.hidden * shapes.itemsize
        + LOGIT_COPIES * plan.seq_len * shapes.vocabulary * 4
    )


def tuning_flops(plan: Plan, shapes: Shapes) -> float:
    """Operations of all steps, and of all looks at held-out text."""
    if not plan.recipe.tune:
        return 0.0
    _, step, held = _tokens(plan)
    head, inside = shapes.vocabulary * shapes.hidden, sum(shapes.blocks)
    trained = 2 * plan.recipe.tune * step * (PASSES * inside + 3 * head)
    looks = 1 + plan.recipe.tune // interval(plan.recipe.tune)
    looked = 2 * held * ((looks + 1) * inside + 2 * looks * head)
    return float(trained + looked)


def tuning_seconds(plan: Plan, shapes: Shapes, device: torch.device) -> float:
    """What that takes on this machine; 0 for a device that is not here."""
    if not plan.recipe.tune or (device.type == "cuda" and not torch.cuda.is_available()):
        return 0.0
    return tuning_flops(plan, shapes) * product_seconds(device) * OTHERS
