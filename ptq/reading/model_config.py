"""config.json of a model: the keys that ptq itself reads, and sizes that may be believed.

A configuration is a program for loops and allocations: ``num_hidden_layers: 1000000000`` keeps
transformers busy for days. What makes those is compared with what the weight files hold, before a
library sees it.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ptq.reading.schema import JsonObject, check, read_json

CONFIG = "config.json"
OTHER = "it is of another model than the weights, or damaged: copy it again"
# Keys of numbers that modules are made in a loop over: of every layer and expert.
LAYERS = re.compile(r"(num|n)_(\w+_)?layers?|\w+coder_layers|depth|num_blocks")
EXPERTS = re.compile(r"(num|n)_(\w+_)?experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk")
LABELS = "num_labels"  # for each of which transformers makes a name
# Where no weights are there to compare with; the largest known are 126 layers and 512 experts.
MOST_LAYERS, MOST_EXPERTS, MOST_LABELS = 1000, 10_000, 100_000
LARGEST_NUMBER = 2**53  # Python's integers have no end, those of torch have


@dataclass(frozen=True)
class _Quantization:
    quant_method: str | None = None


@dataclass(frozen=True)
class _Config:
    architectures: list[str] | None = None
    model_type: str | None = None
    quantization_config: _Quantization | None = None
    text_config: JsonObject | None = None


@dataclass(frozen=True)
class Stored:
    """What weight files hold: how many tensors, the largest dimension of any, bytes of all."""

    tensors: int
    largest: int
    bytes: int


def read_model_config(directory: Path) -> JsonObject:
    """The configuration in a directory, all keys.

    Raises:
        ValueError: it is no JSON object, or a key that ptq reads has another type.
        OSError: it is missing, or no regular file.
    """
    file, remedy = (
        directory / CONFIG,
        "it cannot be used as the configuration of a model, copy it again",
    )
    config = read_json(file, JsonObject, remedy)
    check(config, _Config, str(file), remedy)
    return config


def check_sizes(config: Mapping[str, object], stored: Stored | None, where: Path) -> None:
    """Raise ValueError for a number of layers or experts that the weight files cannot have, and for
    one that no model has where there are none (``stored`` is None)."""
    experts = [n for key, n in _numbers(config) if EXPERTS.fullmatch(key.rpartition(".")[2])]
    for key, value in _numbers(config):
        leaf = key.rpartition(".")[2]
        if LAYERS.fullmatch(leaf):
            most = MOST_LAYERS if stored is None else stored.tensors
        elif EXPERTS.fullmatch(leaf):
            most = MOST_EXPERTS if stored is None else max(stored.tensors, stored.largest)
        elif leaf in CHOSEN and experts:
            most = max(experts)
        else:
            most = MOST_LABELS if leaf == LABELS else LARGEST_NUMBER
        if value > most:
            reason = f"more than the {most} that there can be"
            if stored is not None and most == stored.tensors:
                reason = f"and the weight files hold {most} tensors in all"
            raise ValueError(f"{where}: {key} is {value}, {reason}: {OTHER}")


def check_routing(config: Mapping[str, object], where: Path) -> None:
    """Raise ValueError for a number of experts for each token that there cannot be; ``config`` has
    what its class puts where the file says nothing."""
    experts = [n for key, n in _numbers(config) if EXPERTS.fullmatch(key.rpartition(".")[2])]
    for key, value in _numbers(config):
        known = key.rpartition(".")[2] in CHOSEN and max(experts, default=0) > 1
        if known and not 1 <= value <= max(experts):
            raise ValueError(
                f"{where}: {key} is {value} (its default, if the file does not say it), and the "
                f"model has {max(experts)} experts: {OTHER}"
            )


def _numbers(config: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            for i, inner in enumerate(value):
                yield from _numbers({f"{key}[{i}]": inner}, prefix)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield f"{prefix}{key}", value
