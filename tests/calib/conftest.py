"""Tiny random models of many families, in memory and as checkpoints."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

BASE = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": None,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "head_dim": 8,
}  # fmt: skip
WINDOWED = {
    "head_dim": 16, "sliding_window": 8, "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "phi3": ("Phi3", {}),
    "gemma2": ("Gemma2", WINDOWED),
    "gemma3": ("Gemma3", WINDOWED),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 32}),
    "deepseek_v2": ("DeepseekV2", {**LATENT, "topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3", LATENT),
}  # fmt: skip
CONFIG = {"gemma3": "Gemma3TextConfig"}

Build = Callable[..., PreTrainedModel]


@pytest.fixture(scope="session")
def tiny_model() -> Build:
    """``tiny_model(family, **overrides)``: a random float32 model, different at every call only by its arguments."""

    def build(family: str, **overrides: object) -> PreTrainedModel:
        name, settings = FAMILIES[family]
        config = getattr(transformers, CONFIG.get(family, f"{name}Config"))(**{**BASE, **settings, **overrides})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, experts_implementation="eager")
            for parameter in model.parameters():  # also what is initialised as zeros or ones
                parameter.data += 0.02 * torch.randn_like(parameter)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model: Build, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_checkpoint(family)``: the directory that ``save_pretrained`` makes of the tiny model."""
    made: dict[str, Path] = {}

    def save(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny_model(family).save_pretrained(made[family])
        return made[family]

    return save


@pytest.fixture
def batches() -> list[torch.Tensor]:
    """Ten sequences of 24 tokens in batches of 4, 4 and 2."""
    return list(torch.randint(3, 100, (10, 24), generator=torch.Generator().manual_seed(1)).split(4))
