"""The matrix products of a decoder block: sizes of its linear layers, from a model's name or its
config.json."""

from collections.abc import Mapping
from pathlib import Path

from ptq.checkpoint.reader import read_config

Layer = tuple[str, int, int]  # name, out, in

# hidden size, features of queries, of keys and values together, of the MLP
MODELS = {
    "llama-3.1-8b": (4096, 4096, 2048, 14336),
    "llama-3.1-70b": (8192, 8192, 2048, 28672),
    "qwen3-8b": (4096, 4096, 2048, 12288),
    "qwen3-32b": (5120, 8192, 2048, 25600),
}
EXPERT = "expert "  # layers of which a block has one for every expert: the sizes of one


def block_layers(model: str) -> tuple[Layer, ...]:
    """The linear layers of one decoder block, projections that read the same input merged; of
    experts, one.

    Args:
        model: a name of ``MODELS``, or a directory with a config.json, quantized or not.

    Raises:
        ValueError: neither, or a config without the sizes of such a block.
        FileNotFoundError: a directory without a config.json.
    """
    if model in MODELS:
        return _merged(*MODELS[model], "")
    if not Path(model).is_dir():
        raise ValueError(
            f"no model {model!r}: give {', '.join(MODELS)}, or a directory with a config.json"
        )
    return _from_config(read_config(Path(model)), Path(model) / "config.json")


def _from_config(config: Mapping[str, object], where: Path) -> tuple[Layer, ...]:
    for part in (
        "thinker_config",
        "text_config",
    ):  # models that also see or hear keep the decoder's sizes there
        inner = config.get(part)
        config = inner if isinstance(inner, dict) else config
    if config.get("kv_lora_rank"):
        raise ValueError(
            f"{where}: its attention compresses keys and values; shapes of such blocks are not "
            "known here"
        )

    def size(*names: str) -> int:
        """The first of these that the config has."""
        value = next((config[name] for name in names if config.get(name)), None)
        if type(value) is not int or value < 1:
            raise ValueError(
                f"{where}: {names[-1]} is {value!r}, so its layers' shapes are unknown"
            )
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    head = size("head_dim") if config.get("head_dim") else hidden // heads
    keys = size("num_key_value_heads") if config.get("num_key_value_heads") else heads
    experts = any(
        config.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts")
    )
    intermediate = (
        size("moe_intermediate_size", "intermediate_size") if experts else size("intermediate_size")
    )
    return _merged(hidden, heads * head, 2 * keys * head, intermediate, EXPERT if experts else "")


def _merged(
    hidden: int, query: int, key_value: int, intermediate: int, prefix: str
) -> tuple[Layer, ...]:
    return (
        ("qkv", query + key_value, hidden),
        ("o", hidden, query),
        (f"{prefix}gate_up", 2 * intermediate, hidden),
        (f"{prefix}down", hidden, intermediate),
    )
