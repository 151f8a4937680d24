"""Ways to decode: static caches against growing ones, steps that are recorded, and the rules that
forbid it.

Without a GPU a recording is a trace of torch operators (``recorder``): like a CUDA graph it replays
the operators of one step on the same memory, and nothing of what Python did in between.
"""

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.cache_utils import StaticLayer

from ptq.checkpoint.quantization_config import LayerInfo
from ptq.model.checkpoint_source import CheckpointSource
from ptq.numerics.formats import FORMATS
from ptq.numerics.tensor import Scales
from ptq.runtime import decoding
from ptq.runtime.generate import generate
from ptq.runtime.quant_linear import QuantLinear

PROMPT = [10, 20, 30]
NEW = 12
# Sliding windows in Mistral; attention without sdpa in Gemma 2, whose windows are in every second
# layer.
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "mistral, wide window": ("llama", {"model_type": "mistral", "sliding_window": 32}),
    "gemma2, wide window": (
        "llama",
        {"model_type": "gemma2", "sliding_window": 32, "head_dim": 16},
    ),
}
EXPERTS = ("mixtral", "qwen3_moe")


@pytest.fixture
def family(make_tiny_model: Callable[..., Path]) -> Callable[[str], nn.Module]:
    """``family(name)``: the tiny model, with one Linear per expert, as checkpoints of ptq are
    loaded."""

    def load(name: str) -> nn.Module:
        kind, settings = FAMILIES[name]
        source = CheckpointSource(make_tiny_model(kind, **settings))
        model = source.skeleton()
        source.fill(model, "", "cpu")
        model.tie_weights()  # pyright: ignore[reportCallIssue]
        return model

    return load


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The CPU records too, by tracing; the list counts replays."""
    replays: list[int] = []
    caches: list[decoding.StaticCache] = []
    usual = decoding.static_cache

    def static_cache(model: nn.Module, length: int) -> decoding.StaticCache:
        caches.append(usual(model, length))
        return caches[-1]

    def record(step: decoding.Step, ids: Tensor) -> Callable[[], Tensor]:
        graph = make_fx(step)(ids)
        rewind(caches[-1])  # tracing runs the step, recording a CUDA graph does not

        def replay() -> Tensor:
            replays.append(1)
            return graph(ids)

        return replay

    monkeypatch.setattr(decoding, "static_cache", static_cache)
    monkeypatch.setattr(decoding, "can_record", lambda device: True)
    monkeypatch.setattr(decoding, "run_aside", lambda step, ids: step(ids))
    monkeypatch.setattr(decoding, "record", record)
    return replays


def rewind(cache: decoding.StaticCache) -> None:
    """Forget the last token."""
    for layer in cache.layers:
        assert isinstance(layer, StaticLayer)
        layer.cumulative_length.sub_(1)


def tokens(model: nn.Module, decode: decoding.Decode, new: int = NEW) -> list[int]:
    return list(generate(model, PROMPT, max_new_tokens=new, decode=decode))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_static_cache_gives_the_tokens_of_a_growing_one(
    family: Callable[[str], nn.Module], name: str
) -> None:
    model = family(name)
    expected = tokens(model, "dynamic")
    assert len(set(expected)) > 2, "a model that repeats itself would hide mistakes"
    assert tokens(model, "static") == expected == tokens(model, "auto")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in EXPERTS])
def test_a_recorded_step_gives_the_tokens_of_plain_ones(
    family, recorder: list[int], name: str
) -> None:
    model = family(name)
    assert tokens(model, "auto") == tokens(model, "dynamic")
    assert len(recorder) == NEW - 2  # the prompt and the first token run plainly


@pytest.mark.parametrize("new", [1, 2, 3])
def test_short_texts_end_before_anything_is_recorded(family, recorder: list[int], new: int) -> None:
    model = family("llama")
    assert tokens(model, "captured", new) == tokens(model, "dynamic", new)
    assert len(recorder) == max(0, new - 2)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_that_run_for_their_tokens_are_not_recorded(family, recorder, name, caplog) -> None:
    model = family(name)
    with caplog.at_level(logging.INFO, "ptq.runtime.decoding"):
        assert tokens(model, "auto") == tokens(model, "dynamic")
    assert not recorder
    (message,) = (r.getMessage() for r in caplog.records if r.name == "ptq.runtime.decoding")
    assert "without a CUDA graph" in message and "unique" in message
    with pytest.raises(ValueError, match=r"'captured' is not possible.*unique.*'static'"):
        tokens(model, "captured")


def test_a_window_that_fills_decodes_with_a_dynamic_cache(
    family, recorder, caplog, monkeypatch
) -> None:
    monkeypatch.setitem(
        FAMILIES, "narrow", ("llama", {"model_type": "mistral", "sliding_window": 8})
    )
    model = family("narrow")
    with caplog.at_level(logging.INFO, "ptq.runtime.decoding"):
        assert tokens(model, "auto") == tokens(model, "dynamic")
    assert not recorder
    (message,) = (r.getMessage() for r in caplog.records if r.name == "ptq.runtime.decoding")
    assert "dynamic cache: layer 0 has a window of 8 tokens, and there may be 15" in message
    with pytest.raises(ValueError, match=r"'static' is not possible: layer 0 has a window"):
        tokens(model, "static")
    assert tokens(model, "auto", 5) and len(recorder) == 3  # 8 tokens in all fit


def test_what_has_no_static_cache(
    family: Callable[[str], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="does not promise fixed shapes for Linear"):
        decoding.static_cache(nn.Linear(2, 2), 8)
    model = family("llama")
    model.register_buffer("elsewhere", torch.empty(1, device="meta"))
    with pytest.raises(ValueError, match="cpu and meta"):
        decoding.static_cache(model, 8)
    del model.elsewhere
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match="flash_attention_2"):
        decoding.static_cache(model, 8)
    monkeypatch.setattr(model, "_can_compile_fullgraph", False)
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        decoding.static_cache(model, 8)


def test_layers_with_another_state_have_no_static_cache(family: Callable[[str], nn.Module]) -> None:
    model = family("llama")
    for kind, message in (
        ("linear_attention", "LinearAttentionLayer"),
        ("heavily_compressed_attention", "heavily"),
    ):
        setattr(model.config, "layer_types", ["full_attention", kind])  # noqa: B010
        with pytest.raises(ValueError, match=message):
            decoding.static_cache(model, 8)


@pytest.mark.parametrize("decode", ["captured", "compiled"])
def test_graphs_need_a_gpu(family: Callable[[str], nn.Module], decode: decoding.Decode) -> None:
    with pytest.raises(
        ValueError, match=f"decode='{decode}' needs a CUDA device, and the model is on cpu"
    ):
        tokens(family("llama"), decode)
    with pytest.raises(
        ValueError, match="unknown way to decode 'fast'; choose one of auto, dynamic, static"
    ):
        tokens(family("llama"), "fast")  # pyright: ignore[reportArgumentType]


def test_every_way_feeds_one_token_at_a_time(family: Callable[[str], nn.Module]) -> None:
    model, lengths = family("llama"), []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    tokens(model, "static", 4)
    handle.remove()
    assert lengths == [3, 1, 1, 1]


# ---------------------------------------------------------------- the rule for operators


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: int(x.argmax()), "_local_scalar_dense"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x.index_put_((x > 0,), torch.zeros(2)), "index_put_"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: torch.where(x > 0), "nonzero"),
        (lambda x: x.unique(), "unique"),
        (lambda x: bool((x > 0).any()), "_local_scalar_dense"),
        (lambda x: x.to("meta"), "_to_copy"),
        (lambda x: torch.empty(4, device="meta").copy_(x), "copy_"),
    ],
)
def test_the_watch_sees_what_the_host_waits_for(
    call: Callable[[Tensor], object], name: str
) -> None:
    with decoding.Watch() as watch:
        call(torch.tensor([1.0, -1.0, 2.0, -2.0]))
    assert any(name in operator for operator in watch.waiting)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x[torch.tensor([0, 2])],
        lambda x: x.index_copy_(0, torch.tensor([1]), torch.zeros(1)),
        lambda x: x.index_put_((torch.tensor([1]),), torch.zeros(1)),
        lambda x: torch.where(x > 0, x, 0.0).to(torch.bfloat16).softmax(-1),
        lambda x: torch.full((1, 1), 3).fill_(5) + torch.arange(4),
    ],
)
def test_the_watch_lets_pass_what_a_device_does_alone(call: Callable[[Tensor], object]) -> None:
    with decoding.Watch() as watch:
        call(torch.tensor([1.0, -1.0, 2.0, -2.0]))
    assert not watch.waiting


# ---------------------------------------------------------------- quantized layers


def llama(path: Path, device: str) -> nn.Module:
    """In bfloat16."""
    from transformers import LlamaForCausalLM

    return nn.Module.to(LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval(), device)


def quantized_llama(path: Path, format: str, device: str) -> nn.Module:
    """A bfloat16 Llama whose layers have random codes and scales, ready for kernels."""
    model, fmt = llama(path, device), FORMATS[format]
    for name, old in [
        (n, m) for n, m in model.named_modules() if ".layers." in n and isinstance(m, nn.Linear)
    ]:
        info = LayerInfo(format=format, rotation=fmt.group_size)
        layer = QuantLinear(old.in_features, old.out_features, info, device=device)
        layer.weight_packed.random_(0, 256)
        layer.weight_scale.random_(*((0x30, 0x40) if fmt.has_global_scale else (120, 123)))
        if layer.weight_global_scale is not None:
            layer.weight_global_scale.fill_(2.0**-6)
        model.set_submodule(name, layer)
    return model


def quantized_layers(model: nn.Module) -> list[QuantLinear]:
    return [m for m in model.modules() if isinstance(m, QuantLinear)]


@pytest.fixture
def traceable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scales without the checks of shapes that only tests have: torch.compile cannot trace
    those."""
    monkeypatch.setattr(Scales, "__init__", inspect.unwrap(Scales.__init__))
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@torch.no_grad()
def test_a_step_of_quantized_layers_traces_into_one_graph(
    format: str, make_tiny_model, traceable: None
) -> None:
    """What decode="compiled" hands to inductor: no graph break in any of our operators, and the
    same bits."""
    operator = pytest.importorskip("ptq.kernels.operator")
    if not operator.INTERPRETED:
        pytest.skip("kernels are compiled for a device here, where the tests marked gpu run them")
    model = quantized_llama(make_tiny_model("llama", num_hidden_layers=1), format, "cpu")
    for layer in quantized_layers(model):
        layer.kernel_dtype = torch.bfloat16
    cache, ids = decoding.static_cache(model, 8), torch.tensor([[7]])
    name = decoding.cache_argument(model)
    step = decoding._fixed(model, name, cache)
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    step(torch.tensor([PROMPT]))
    found = [decoding._fixed(compiled, name, cache)(ids)]
    rewind(cache)
    with decoding.Watch() as watch:
        expected = step(ids)
    assert torch.equal(found[0], expected) and bool(expected.isfinite().all())
    assert not watch.waiting, "the step cannot be captured"


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "nvint4"])
@pytest.mark.gpu
def test_a_captured_step_gives_the_bits_of_plain_ones_on_a_device(
    format: str, make_tiny_model, traceable
) -> None:
    path = make_tiny_model("llama", hidden_size=256, intermediate_size=512, dtype=torch.bfloat16)
    model = quantized_llama(path, format, "cuda")
    assert not [
        reason for layer in quantized_layers(model) if (reason := layer.prepare(torch.bfloat16))
    ]
    made = tokens(model, "static", 40)
    assert tokens(model, "captured", 40) == tokens(model, "auto", 40) == made

    @torch.no_grad()
    def logits(how: decoding.Decode) -> Tensor:
        """(steps, vocab), after the same tokens for every ``how``."""
        steps = decoding.decode(model, PROMPT, len(PROMPT) + len(made), how)
        return torch.stack(
            [next(steps).clone(), *(steps.send(token).clone() for token in made[:-1])]
        )

    expected = logits("static")
    assert torch.equal(logits("captured"), expected)
    assert (logits("compiled") - expected).norm() < 0.03 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_waits_for_the_device_once(make_tiny_model, temperature: float) -> None:
    model = llama(make_tiny_model("llama"), "cuda")
    made = generate(model, PROMPT, max_new_tokens=30, temperature=temperature, decode="captured")
    for _ in range(4):  # the prompt, the first token, the recording
        next(made)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(20):
                next(made)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in told if "synchronizing" in str(w.message)]) == 20
