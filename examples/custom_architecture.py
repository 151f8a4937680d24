"""A model of your own: no class of transformers, and nothing to tell `ptq` about it.

What is needed: decoder blocks in one ``nn.ModuleList``, whose layers are ``nn.Linear``; a class
that transformers' automatic ones know, so that the checkpoint can be loaded again.

The blocks here mix tokens by a causal mean with learned decay instead of attention.

python examples/custom_architecture.py [--out DIR]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

import ptq


class MeanConfig(PretrainedConfig):
    """Sizes of the model."""

    model_type = "causal_mean"

    def __init__(
        self,
        vocab_size: int = 4096,
        hidden_size: int = 64,
        intermediate_size: int = 128,
        num_hidden_layers: int = 2,
        **rest,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**rest)


class MeanBlock(nn.Module):
    """Every token reads a decaying mean of those before it, gated; then an MLP."""

    def __init__(self, config: MeanConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.first_norm, self.second_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.value_proj, self.gate_proj = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.out_proj = nn.Linear(hidden, hidden)
        self.up_proj, self.down_proj = nn.Linear(hidden, inner), nn.Linear(inner, hidden)
        self.decay = nn.Parameter(torch.zeros(hidden))

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, hidden)
        read = self.first_norm(x)
        distance = torch.arange(x.shape[1], device=x.device)
        distance = distance[:, None] - distance  # (tokens, tokens)
        weight = torch.sigmoid(self.decay) ** distance.clamp(min=0)[..., None]
        weight = weight * (distance >= 0)[..., None]
        mean = torch.einsum("tsh,bsh->bth", weight, self.value_proj(read))
        x = x + self.out_proj(mean * torch.sigmoid(self.gate_proj(read)))
        return x + self.down_proj(nn.functional.gelu(self.up_proj(self.second_norm(x))))


class MeanModel(PreTrainedModel):
    """Embedding, blocks, norm and output head."""

    config_class = MeanConfig
    base_model_prefix = "model"

    def __init__(self, config: MeanConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MeanBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, input_ids: Tensor, **_) -> CausalLMOutput:
        x = self.embed(input_ids)
        for block in self.layers:
            x = block(x)
        return CausalLMOutput(logits=self.lm_head(self.norm(x)))  # pyright: ignore[reportArgumentType]


def register() -> None:
    """Let transformers' automatic classes find the model by its ``model_type``."""
    AutoConfig.register("causal_mean", MeanConfig, exist_ok=True)
    AutoModelForCausalLM.register(MeanConfig, MeanModel, exist_ok=True)


def train(model: nn.Module, tokens: Tensor, steps: int) -> None:
    """A few steps on a text (tokens,): a model that nobody trained loses nothing by rounding."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(0, len(tokens) - 65, (8,), generator=generator)
        windows = torch.stack([tokens[int(s) : int(s) + 65] for s in starts])
        logits = model(windows[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(arguments: Sequence[str] | None = None) -> ptq.Evaluation:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("example-output"))
    parser.add_argument("--steps", type=int, default=100, help="of training before")
    options = parser.parse_args(arguments)
    register()

    # any tokenizer: here that of the bundled model
    from ptq.runtime.loaded_model import demo_path
    from ptq.text.windows import load_text

    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    torch.manual_seed(0)
    model = MeanModel(MeanConfig(vocab_size=len(tokenizer)))
    tokens = tokenizer(load_text("builtin"), verbose=False)["input_ids"]
    train(model, torch.tensor(tokens), options.steps)
    source = options.out / "custom"
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)

    # all that is said of the architecture is the directory
    choices = {"format": "nvfp4", "samples": 16, "seq_len": 256}
    written = ptq.quantize(source, options.out / "custom-nvfp4", **choices)
    print(written)
    found = ptq.evaluate(written.path, source, seq_len=128, max_tokens=4096)
    print(found)
    print(type(ptq.load(written.path).get_submodule("layers.0.out_proj")))
    return found


if __name__ == "__main__":
    main()
