"""The ``ptq`` dialect, which can say everything that ptq does, and which only ptq reads, and others
with its help: transformers after ``import ptq``, vLLM with its plugin.

Its ``quantization_config`` has exactly these keys; loaders refuse unknown keys and values:

    quant_method "ptq"      version 1
    format                  name of a format
    hadamard                block size of the rotation of a layer's inputs; 0 is no rotation
    quantize_activations    whether inputs are quantized too, to the same format (W4A4)
    static_activations      whether there is a calibrated ``input_global_scale``; without one it is
                            that of each token, or the format has none
    input_rule              scale rule of the inputs; "default" is the format's own
    nested                  bits of the narrower format that the codes hold within them; 0, or not
                            there, is none (:mod:`ptq.numerics.nested`)
    <one of these six>_overrides    {pattern: value} for layers that differ; the first that matches
    ignore                  patterns of linear layers that are not quantized
    kv_cache                "fp8" where attention layers have a k_scale and a v_scale (float32,
                            [1]): keys and values are read as s · E4M3(x / s)
    recipe, provenance      how the checkpoint was made; never needed to load it

Loaders that do not know the dialect would skip the packed tensors and leave the layers random. Two
empty tensors keep them from it (:func:`guard_tensors`): ``<a packed layer>.weight``, whose
shape no layer has, makes transformers stop, and the name of the other, in its report, says what to
do. Checkpoints without them are read too.

Only ``format`` and ``ignore`` must be there. Patterns: :mod:`ptq.checkpoint.quantization_config`;
tensors on disk: :mod:`ptq.checkpoint`.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ptq.checkpoint.dialect import Dialect, Export, Layers
from ptq.checkpoint.engines import (
    ENGINES,
    PLUGGED,
    TRANSFORMERS,
    VLLM,
    Kind,
    Opening,
    Verdict,
    opened_by,
)
from ptq.checkpoint.quantization_config import (
    LEFT_OUT,
    PER_LAYER,
    VERSION,
    JsonDict,
    Quantization,
    is_expert,
    natural,
)
from ptq.reading.schema import JsonObject, check

HERE = "in quantization_config"
DAMAGED = "the checkpoint is damaged, copy it again"
# Names, below that of a layer, of the tensors that stop other loaders.
DECOY = "weight"
NOTE = "install ptq-llm, and import ptq.hf before from_pretrained"


def ptq_config(
    quantization: Quantization, layers: Layers | None = None, others: Iterable[str] = ()
) -> JsonDict:
    """The ``quantization_config``; it says what ``quantization`` does and needs nothing else."""
    config: JsonDict = {"quant_method": PTQ.name, "version": VERSION}
    for key, value in quantization.values.items():
        if key in LEFT_OUT and value == PER_LAYER[key] and key not in quantization.overrides:
            continue
        config[key] = value
        if key in quantization.overrides:
            config[f"{key}_overrides"] = dict(quantization.overrides[key])
    config["ignore"] = list(quantization.ignore)
    if quantization.kv_cache is not None:
        config["kv_cache"] = quantization.kv_cache
    return config | {"recipe": quantization.recipe, "provenance": quantization.provenance}


def parse_ptq(config: Mapping[str, object]) -> Quantization:
    """The inverse of :func:`ptq_config`.

    Raises:
        ValueError: an unknown version, key or value, or a missing ``format`` or ``ignore``.
    """
    if config.get("version") != VERSION:
        raise ValueError(
            f"quantization_config has version {config.get('version')!r}, this ptq reads {VERSION}: "
            "update ptq"
        )
    overridden = {f"{key}_overrides": key for key in PER_LAYER}
    known = {"quant_method", "version", "ignore", "kv_cache", "recipe", "provenance"}
    known |= {*PER_LAYER, *overridden}
    if unknown := sorted(config.keys() - known):
        raise ValueError(
            f"quantization_config has keys that this ptq does not know: {', '.join(unknown)}; "
            "update ptq"
        )
    for key in ("format", "ignore"):
        if key not in config:
            raise ValueError(f"quantization_config has no {key!r}: the checkpoint is damaged")
    return Quantization(
        values={key: config.get(key, default) for key, default in PER_LAYER.items()},
        overrides={
            key: check(config[name], JsonObject, f"{name} {HERE}", DAMAGED)
            for name, key in overridden.items()
            if name in config
        },
        ignore=tuple(check(config["ignore"], list[str], f"ignore {HERE}", DAMAGED)),
        kv_cache=_kv_cache(config),
        recipe=check(config.get("recipe", {}), JsonObject, f"recipe {HERE}", DAMAGED),
        provenance=check(config.get("provenance", {}), JsonObject, f"provenance {HERE}", DAMAGED),
    )


def _kv_cache(config: Mapping[str, object]) -> str | None:
    value = config.get("kv_cache")
    return None if value is None else check(value, str, f"kv_cache {HERE}", DAMAGED)


def guard_tensors(layers: Iterable[str]) -> dict[str, Tensor]:
    """Two empty uint8 tensors that make a loader without this dialect stop, by full name.

    They lie under a layer that is no expert if there is one: loaders look for experts under other
    names.
    """
    name = min(layers, key=lambda layer: (is_expert(layer), natural(layer)))
    return {f"{name}.{leaf}": torch.empty(0, dtype=torch.uint8) for leaf in (DECOY, NOTE)}


def is_note(name: str) -> bool:
    """Whether a tensor is that of :func:`guard_tensors` which is no ``weight``."""
    return name.endswith(f".{NOTE}")


def _refusal(export: Export) -> str | None:
    """None: this dialect carries everything."""
    return None


def _opens(layers: Layers) -> dict[str, Opening]:
    found = {
        engine: Opening(
            Verdict.STOPS,
            f"{engine} does not know the ptq dialect; use --dialect compressed-tensors",
        )
        for engine in ENGINES
    }
    if opened_by(PLUGGED, Kind.of(PTQ.name, layers)) is not None:
        found[VLLM] = Opening(Verdict.INSTALL, "run there on a CPU, not yet on a GPU")
    return found | {TRANSFORMERS: Opening(Verdict.IMPORT)}


def _why_import(layers: Layers) -> str:
    return "an error without it"


PTQ = Dialect(
    name="ptq",
    config=ptq_config,
    parse=parse_ptq,
    refusal=_refusal,
    opens=_opens,
    why_import=_why_import,
    extra_tensors=guard_tensors,
    is_extra=is_note,
)
