"""vLLM's entry point (group ``vllm.general_plugins``): after ``pip install ptq-llm`` vLLM opens
what ptq writes and vLLM alone does not.

vLLM calls :func:`register` in each of its processes. It enters one quantization method, ``ptq``,
which reads all dialects; what becomes of which checkpoint is :func:`takes_over`. Without vLLM
nothing of this is imported. ``VLLM_PLUGINS=`` leaves the plugin out.
"""

import logging
from collections.abc import Mapping

from ptq.checkpoint.compressed_tensors_formats import CT_FORMATS
from ptq.checkpoint.dialect_ptq import PTQ
from ptq.checkpoint.dialects import DIALECTS, parse
from ptq.numerics.formats import FORMATS

logger = logging.getLogger(__name__)

NAME = PTQ.name
OLDEST = "0.32"
INT4 = "pack-quantized"  # as compressed-tensors calls it


def register() -> None:
    """Enter ``ptq`` into vLLM's quantization methods; a second call changes nothing. It never
    raises for another version of vLLM, which would not start then."""
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    if NAME in QUANTIZATION_METHODS:
        return
    if not hasattr(QuantizationConfig, "get_checkpoint_weight_mapper"):
        logger.warning(
            "this vLLM is older than %s, the oldest that ptq's plugin knows: it is left out; "
            "update vLLM to open checkpoints of the ptq dialect",
            OLDEST,
        )
        return
    from ptq.runtime.vllm_config import PtqConfig

    register_quantization_config(NAME)(PtqConfig)


def takes_over(
    quantization: Mapping[str, object], *, asked: str | None, cpu: bool, blackwell: bool, moe: bool
) -> bool:
    """Whether a checkpoint of another dialect goes through the plugin.

    vLLM's own paths stay in use wherever they compute it right. On a CPU it has one for linear
    layers of integers alone; on Blackwell it was read to compute rotated weight-only NVFP4 wrongly.

    Args:
        quantization: the ``quantization_config``.
        asked: ``--quantization``, with which a user can ask for the plugin, or for another method.
        moe: whether the model has routed experts.
    """
    if quantization.get("quant_method") not in DIALECTS or asked not in (None, NAME):
        return False
    try:
        parsed = parse(quantization)
    except ValueError:
        return False  # a variant that ptq does not read, and vLLM may
    if asked == NAME:
        return True
    names = {parsed.values["format"], *parsed.overrides.get("format", {}).values()}
    formats = [FORMATS[str(name)] for name in names]
    stored = {CT_FORMATS[fmt.name].name for fmt in formats if fmt.name in CT_FORMATS}
    rotated = any((parsed.values["hadamard"], *parsed.overrides.get("hadamard", {}).values()))
    if cpu:
        return rotated or moe or stored != {INT4}
    nvfp4 = any(fmt.element.name == "e2m1" and fmt.has_global_scale for fmt in formats)
    return blackwell and rotated and nvfp4 and not parsed.values["quantize_activations"]
