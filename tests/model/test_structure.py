"""From a path to an empty model, and what it is made of: blocks, routers, the output head."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from ptq.model.checkpoint_source import CheckpointSource
from ptq.model.memory_source import MemorySource
from ptq.model.structure import (
    build_model,
    find_blocks,
    find_head,
    is_router,
    linearize,
    load_config,
    positions,
    resolve,
)

Build = Callable[..., transformers.PreTrainedModel]
Save = Callable[[str], Path]


def test_a_linearized_model_computes_the_same():
    model = nn.Sequential(Conv1D(6, 4), nn.Sequential(Conv1D(3, 6))).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, 4)
    with torch.no_grad():
        expected = model(x)
        weight = model.get_parameter("0.weight").data_ptr()
        assert linearize(model) == {"0.weight", "1.0.weight"}
        torch.testing.assert_close(model(x), expected)
    assert isinstance(model[0], nn.Linear) and not model[0].training
    assert model.get_parameter("0.weight").data_ptr() == weight  # a view
    assert linearize(model) == set()


def test_only_the_named_modules_are_linearized():
    model = nn.ModuleDict({"a": Conv1D(6, 4), "b": Conv1D(3, 6)})
    assert linearize(model, {"b"}) == {"b.weight"}
    assert isinstance(model["a"], Conv1D) and isinstance(model["b"], nn.Linear)


@pytest.mark.parametrize(
    "family, routers",
    [
        ("llama", set()),
        ("mixtral", {"mlp.gate"}),
        ("qwen2_moe", {"mlp.gate", "mlp.shared_expert_gate"}),
        ("deepseek_v3", {"mlp.gate"}),
    ],
)
def test_routers_and_gates_of_shared_experts_are_told_from_projections(
    family: str, routers: set[str], tiny_model: Build
):
    _, block = MemorySource(tiny_model(family)).blocks()[1]
    assert {n for n, _ in block.named_modules() if is_router(block, n)} == routers


def test_routers_by_name():
    block = nn.ModuleDict(
        {
            "moe": nn.ModuleDict(
                {"router": nn.ModuleDict({"layer": nn.Linear(4, 4)}), "experts": nn.Identity()}
            ),
            "gated": nn.ModuleDict(
                {"gate": nn.ModuleDict({"wg": nn.Linear(4, 4)}), "experts": nn.Identity()}
            ),
            "mlp": nn.ModuleDict({"gate": nn.Linear(4, 4), "up": nn.Linear(4, 4)}),
        }
    )
    routers = {
        n for n, m in block.named_modules() if isinstance(m, nn.Linear) and is_router(block, n)
    }
    assert routers == {"moe.router.layer", "gated.gate.wg"}


def test_the_head_is_found_and_a_tied_one_refused(tiny_model: Build):
    assert find_head(tiny_model("llama")) == "lm_head"
    with pytest.raises(ValueError, match="lm_head of LlamaForCausalLM is tied to the embedding"):
        find_head(tiny_model("llama", tie_word_embeddings=True))
    with pytest.raises(ValueError, match="Linear has no linear output head"):
        find_head(nn.Linear(2, 2))


def test_blocks_are_the_decoder_of_a_vision_language_model():
    class Tower(nn.Module):
        def __init__(self, count: int, size: int):
            super().__init__()
            self.layers = nn.ModuleList(
                nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(size, size) for _ in range(3))})
                for _ in range(count)
            )

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision, self.language = Tower(9, 32), Tower(2, 8)
            self.language.embed = nn.Embedding(5, 8)

        def get_input_embeddings(self) -> nn.Module:
            return self.language.get_submodule("embed")

    assert find_blocks(Both()) == ["language.layers.0", "language.layers.1"]


def test_models_without_blocks_of_linear_layers_are_refused():
    with pytest.raises(ValueError, match="Linear has no list of decoder blocks"):
        find_blocks(nn.Linear(2, 2))
    convolutions = nn.Sequential(nn.ModuleList([nn.Conv1d(2, 2, 1)]))
    with pytest.raises(ValueError, match=r"contain no Linear layers \(but Conv1d\)"):
        find_blocks(convolutions)


def test_the_longest_sequence_is_read_off_the_configuration():
    assert positions(transformers.LlamaConfig(max_position_embeddings=77)) == 77
    assert positions(transformers.GPT2Config(n_positions=55)) == 55
    assert positions(transformers.PretrainedConfig()) is None


def test_a_name_that_is_neither_directory_nor_hub_model(monkeypatch: pytest.MonkeyPatch):
    def unreachable(*_: object, **__: object) -> str:
        raise ConnectionError("no route to the hub\nsecond line")

    monkeypatch.setattr("ptq.model.structure.snapshot_download", unreachable)
    with pytest.raises(
        FileNotFoundError,
        match=r"no directory nobody/nothing.*Hugging Face hub \(no route to the hub\)$",
    ):
        resolve("nobody/nothing")


def test_a_hub_name_is_looked_up_in_the_cache_first(
    tiny_checkpoint: Save, monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def snapshot(
        name: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool
    ) -> str:
        asked.append((name, revision, local_files_only))
        return str(tiny_checkpoint("llama"))

    monkeypatch.setattr("ptq.model.structure.snapshot_download", snapshot)
    assert resolve("owner/model") == tiny_checkpoint("llama")
    assert resolve("owner/model", "v2") == tiny_checkpoint("llama")
    assert asked == [("owner/model", None, True), ("owner/model", "v2", True)]
    with pytest.raises(ValueError, match="is a directory, and a revision"):
        resolve(tiny_checkpoint("llama"), "v2")


def built(path: Path) -> object:
    directory = resolve(path)
    return build_model(load_config(directory), directory, torch.float32)


DAMAGES = {
    "missing": (FileNotFoundError, "does not exist"),
    "file": (FileNotFoundError, "is a file; give the directory"),
    "no config": (FileNotFoundError, "has no config.json"),
    "broken config": (ValueError, "config.json .*cannot be used"),
    "unknown model": (ValueError, "config.json .*cannot be used.*nonesuch"),
    "encoder": (ValueError, "not a causal language model.*BertForMaskedLM"),
    "translation": (ValueError, "not a causal language model.*T5ForConditionalGeneration"),
    "contradiction": (ValueError, "config.json .*cannot be used: .*hidden size"),
}


def damaged(kind: str, path: Path) -> Path:
    """The directory ``path`` with another configuration, or another path."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    match kind:
        case "missing":
            return path / "nowhere"
        case "file":
            return path / "model.safetensors"
        case "no config":
            file.unlink()
        case "broken config":
            file.write_text("{")
        case "unknown model":
            file.write_text(json.dumps(config | {"model_type": "nonesuch"}))
        case "encoder":
            transformers.BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(path)
        case "translation":
            names = ["T5ForConditionalGeneration"]
            transformers.T5Config(architectures=names).save_pretrained(path)
        case "contradiction":
            heads = {"num_attention_heads": 5, "num_key_value_heads": 3, "head_dim": None}
            file.write_text(json.dumps(config | heads))
        case _:
            raise AssertionError(kind)
    return path


@pytest.mark.parametrize("read", [built, CheckpointSource])
@pytest.mark.parametrize("kind", DAMAGES)
def test_unusable_directories_are_named_in_one_line(
    kind: str, read: Callable[[Path], object], tiny_checkpoint: Save, tmp_path: Path
):
    shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")
    error, message = DAMAGES[kind]
    with pytest.raises(error, match=message) as caught:
        read(damaged(kind, tmp_path / "model"))
    assert "\n" not in str(caught.value)


def test_a_lora_adapter_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="is a LoRA adapter, not a model: merge it"):
        CheckpointSource(tmp_path)


def test_a_gguf_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileNotFoundError, match=r"is quantized already, as GGUF files are: start"):
        resolve(tmp_path / "x.gguf")
