"""What all tests share: the environment, run-time shape checks, markers, tiny models.

With ``--import-mode=importlib`` tests cannot import each other; what two of them need is a fixture
here.
"""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # before anything imports Triton: its kernels then run on the CPU
    )
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Shapes in annotations are checked while testing. Not over ptq.kernels: the hook breaks Triton's
# interpreter.
CHECKED = ["numerics", "calib", "model", "pipeline.solve", "runtime.evaluate"]
install_import_hook([f"ptq.{name}" for name in CHECKED], "beartype.beartype")

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
pytest_plugins = [  # tests/fixtures
    "tiny_families",
    "tiny_checkpoints",
    "command_line",
    "browser",
    "stand_in_vllm",
]
ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device; none is visible")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same numbers in every order of tests; library code itself never uses the global
    generators."""
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real models and texts that developers may have beside the checkout."""
    path = Path(os.environ.get("PTQ_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (path / "models").is_dir():
        pytest.skip(f"no shared test data at {path} (set PTQ_TEST_DATA)")
    return path


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The bundled model."""
    path = ROOT / "ptq" / "demo"
    if not (path / "config.json").is_file() or not (path / "model.safetensors").is_file():
        pytest.skip("the bundled model is not in ptq/demo (scripts/train_demo_model.py makes it)")
    return path


# ---------------------------------------------------------------- tiny models

SMALL: dict[str, object] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
}
KINDS: dict[str, dict[str, object]] = {
    "llama": {"tie_word_embeddings": False},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": True},  # bias on q, k, v
    "qwen3": {"head_dim": 16, "tie_word_embeddings": False},
    "qwen3_moe": {"head_dim": 16, "tie_word_embeddings": False, **EXPERTS},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
}


def save_tiny_tokenizer(path: Path) -> None:
    """One token per byte, 256 in all. Byte level, because families with a tokenizer of their own
    assume it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False
    ).save_pretrained(path)


@pytest.fixture(scope="session")
def make_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make(kind, **config) -> Path``: a directory with a random two-layer model of ``KINDS`` and
    a tokenizer.

    The same arguments give the same directory: treat it as read-only, or copy it.
    """
    made: dict[str, Path] = {}

    def make(
        kind: str = "llama", *, dtype: torch.dtype = torch.float32, shard: str = "1GB", **overrides
    ) -> Path:
        key = json.dumps([kind, str(dtype), shard, overrides], sort_keys=True)
        if key not in made:
            from transformers import AutoConfig, AutoModelForCausalLM

            settings = {**SMALL, **KINDS[kind], **overrides}
            config = AutoConfig.for_model(settings.pop("model_type", kind), **settings)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
                for name, parameter in model.named_parameters():
                    if name.endswith(
                        "bias"
                    ):  # initialised to zero, which would hide a forgotten bias
                        torch.nn.init.normal_(parameter, std=0.1)
            path = tmp_path_factory.mktemp(kind)
            model.eval().save_pretrained(path, max_shard_size=shard)
            save_tiny_tokenizer(path)
            made[key] = path
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_tiny_model: Callable[..., Path]) -> Path:
    return make_tiny_model("llama")


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few thousand characters with some structure, in a handful of words."""
    generator = random.Random(0)
    words = [
        "the",
        "walk",
        "of",
        "a",
        "block",
        "gives",
        "its",
        "input",
        "to",
        "next",
        "one",
        "and",
        "scale",
        "code",
    ]
    lines = [" ".join(generator.choices(words, k=12)) + "." for _ in range(120)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
