"""Logits token by token, from a cache that grows or from one of fixed size whose step a CUDA graph
replays.

    dynamic     transformers' DynamicCache: every model and device; Python launches each kernel
    static      transformers' StaticCache: keys and values stay in place, shapes are the same
    captured    a static step that is recorded as a CUDA graph: one launch a token, the same kernels
    compiled    captured, of the step as torch.compile makes it: fused between the matmuls

``auto`` is captured on a CUDA device and dynamic elsewhere. Two rules say where it cannot be
captured, and both are logged: a model that :func:`static_cache` refuses decodes with a dynamic
cache; a step in which :class:`Watch` sees an operator that the host has to wait for is run and not
recorded.

Why ``auto`` captures by itself and leaves torch.compile(mode="reduce-overhead") alone: a graph
replays the kernels that a plain step launches, so its tokens are those of the static step, with any
operator and on either path of QuantLinear. torch.compile would have to trace both (it cannot trace
the reference path, which sets a flag of a backend), compiles anew for every length of the cache,
changes the last bits, and may skip graphs without an error.
"""

import inspect
import logging
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

logger = logging.getLogger(__name__)

Decode = Literal["auto", "dynamic", "static", "captured", "compiled"]
Step = Callable[[Tensor], Tensor]  # token ids (1, tokens) → logits (vocab,) after the last of them
Logits = Generator[Tensor, int, None]


def decode(model: nn.Module, prompt: Sequence[int], length: int, how: Decode = "auto") -> Logits:
    """Yield the logits (vocab,) after ``prompt``, then those after each token that is sent, on the
    device of the model.

    A tensor is valid until the next token is sent. Run it without gradients.

    Args:
        length: the most tokens that there will be, the prompt's included. A static cache takes
            memory for all at once.
        how: see the top of this file; anything but ``auto`` is taken at its word.

    Raises:
        ValueError: another ``how``, or one that this model or device cannot do.
    """
    if how not in get_args(Decode):
        raise ValueError(
            f"unknown way to decode {how!r}; choose one of {', '.join(get_args(Decode))}"
        )
    device = model.get_input_embeddings().weight.device  # pyright: ignore[reportCallIssue] - a model of transformers
    if how in ("captured", "compiled") and not can_record(device):
        raise ValueError(
            f"decode={how!r} needs a CUDA device, and the model is on {device}; use 'static'"
        )
    ids = torch.tensor([list(prompt)], device=device)
    if how == "dynamic" or (how == "auto" and not can_record(device)):
        return _plain(_growing(model), ids)
    try:
        cache = static_cache(model, length)
    except ValueError as reason:
        if how != "auto":
            raise ValueError(
                f"decode={how!r} is not possible: {reason}; use 'auto' or 'dynamic'"
            ) from reason
        logger.info("decoding with a dynamic cache: %s", reason)
        return _plain(_growing(model), ids)
    if how == "static":
        return _plain(_fixed(model, cache_argument(model), cache), ids)
    return _captured(model, cache, ids, how)


def static_cache(model: nn.Module, length: int) -> StaticCache:
    """A cache of ``length`` tokens whose layers hold nothing in Python that changes from step to
    step.

    Raises:
        ValueError: why the model cannot have one: its class does not promise fixed shapes
            (``_can_compile_fullgraph``), its attention is neither sdpa nor eager, its weights lie
            on several devices, or a layer keeps more than keys and values of all tokens, such as a
            sliding window that ``length`` fills.
    """
    if not (isinstance(model, PreTrainedModel) and model._can_compile_fullgraph):
        raise ValueError(f"transformers does not promise fixed shapes for {type(model).__name__}")
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    if attention not in (
        "sdpa",
        "eager",
    ):  # others do not read the mask that hides the empty rest of the cache
        raise ValueError(f"attention {attention!r} does not mask a static cache")
    if len(places := {t.device for t in (*model.parameters(), *model.buffers())}) > 1:
        raise ValueError(f"the weights lie on {' and '.join(sorted(map(str, places)))}")
    try:
        cache = StaticCache(config=model.config, max_cache_len=length)
    except KeyError as kind:
        raise ValueError(
            f"transformers has no static cache for layers of the type {kind}"
        ) from kind
    for i, layer in enumerate(cache.layers):
        if type(layer) is StaticSlidingWindowLayer:
            if layer.max_cache_len < length:
                raise ValueError(
                    f"layer {i} has a window of {layer.max_cache_len} tokens, and there may be "
                    f"{length}"
                )
            cache.layers[i] = StaticLayer(
                length
            )  # a window that never fills, without its count in Python
        elif type(layer) is not StaticLayer:
            raise ValueError(f"layer {i} keeps its state in a {type(layer).__name__}")
    return cache


def cache_argument(model: nn.Module) -> str:
    """What transformers calls the cache in forward and result: ``cache`` from 5.24 on, before that
    ``past_key_values``."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


# ---------------------------------------------------------------- steps that Python runs


def _growing(model: nn.Module) -> Step:
    cache, name = None, cache_argument(model)

    def step(ids: Tensor) -> Tensor:
        nonlocal cache
        output = model(input_ids=ids, use_cache=True, **{name: cache})
        cache = getattr(output, name)
        return output.logits[0, -1]

    return step


def _fixed(forward: Callable, name: str, cache: StaticCache) -> Step:
    arguments = {name: cache, "use_cache": True}
    return lambda ids: forward(input_ids=ids, **arguments).logits[0, -1]


def _plain(step: Step, ids: Tensor) -> Logits:
    """Feed the prompt ``ids`` (1, tokens), then token by token."""
    token = yield step(ids)
    ids = ids[:, :1].clone()
    while True:  # fill_ is a kernel: a copy from the host would wait
        token = yield step(ids.fill_(token))


# ---------------------------------------------------------------- steps that a graph replays


class Watch(TorchDispatchMode):
    """While it is entered, notes the operators that no graph can replay, as the host takes part in
    them.

    Those are the ones that torch tags with a result whose shape or value depends on data, indexing
    by a mask, and copies between devices. It sees what runs, on any device, whatever the family of
    the model.
    """

    TAGS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
    # The tag of indexing stands for masks alone; writing by a mask has none.
    INDEXING = frozenset(
        {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}
    )
    COPIES = frozenset({torch.ops.aten._to_copy, torch.ops.aten.copy_})

    def __init__(self) -> None:
        super().__init__()
        self.waiting: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in self.INDEXING:
            waits = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        elif func.overloadpacket in self.COPIES:
            waits = len({t.device for t in (*args, result) if isinstance(t, Tensor)}) > 1
        else:
            waits = not self.TAGS.isdisjoint(func.tags)
        if waits:
            self.waiting.add(str(func))
        return result


def _captured(model: nn.Module, cache: StaticCache, ids: Tensor, how: Decode) -> Logits:
    """The prompt as it comes; the first token watched; from the second on, a graph."""
    step = _fixed(model, cache_argument(model), cache)
    token = yield step(ids)
    ids = torch.full_like(ids[:, :1], token)  # the graph reads its token here
    with Watch() as watch:
        logits = run_aside(step, ids)
    token = yield logits
    if watch.waiting:
        reason = f"a step runs {', '.join(sorted(watch.waiting))}, for which the host has to wait"
        if how != "auto":
            raise ValueError(f"decode={how!r} is not possible: {reason}; use 'auto' or 'static'")
        logger.info("decoding without a CUDA graph: %s", reason)
        while True:
            token = yield step(ids.fill_(token))
    if how == "compiled":
        compiled = torch.compile(model.forward, fullgraph=True, dynamic=False)
        step = _fixed(compiled, cache_argument(model), cache)
        token = yield run_aside(
            step, ids.fill_(token)
        )  # compiles, which cannot happen while recording
    replay = record(step, ids)
    while True:
        ids.fill_(token)
        token = yield replay()


def can_record(device: torch.device) -> bool:
    """Whether the device has graphs."""
    return device.type == "cuda"


@lru_cache(maxsize=16)
def _side(device: torch.device) -> torch.cuda.Stream:
    """The stream that steps are recorded on; one for good, as every stream has a split-K workspace
    of its own."""
    return torch.cuda.Stream(device)


def run_aside(step: Step, ids: Tensor) -> Tensor:
    """``step(ids)`` on the stream of recordings, so that what is allocated once for a stream is
    there."""
    side, current = _side(ids.device), torch.cuda.current_stream(ids.device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        logits = step(ids)
    current.wait_stream(side)
    return logits


def record(step: Step, ids: Tensor) -> Callable[[], Tensor]:
    """Record ``step(ids)`` without running it; what is returned runs it on what ``ids`` then holds.

    The logits lie at the same place each time.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_side(ids.device)):
        logits = step(ids)

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay
