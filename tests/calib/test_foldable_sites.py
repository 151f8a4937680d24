"""Factors that move between layers: found by trial in every family, and the model stays the same
function."""

import re
from collections.abc import Callable

import pytest
import torch
import transformers
from gated_block import GROUPS, Block
from torch import Tensor, nn

from ptq.calib.fold import Site, fold
from ptq.calib.foldable_sites import find_sites
from ptq.calib.walk import CalibratedBlock, Watch, walk
from ptq.model.memory_source import MemorySource

Build = Callable[..., transformers.PreTrainedModel]
Batches = list[Tensor]
Found = list[tuple[str, tuple[str, ...]]]

LLAMA: Found = [
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
]
EXPECTED: dict[str, Found] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "phi3": [
        ("input_layernorm", ("self_attn.qkv_proj",)),
        ("self_attn.qkv_proj", ("self_attn.o_proj",)),
        ("post_attention_layernorm", ("mlp.gate_up_proj",)),
        ("mlp.gate_up_proj", ("mlp.down_proj",)),
    ],
    "gemma2": [
        (n.replace("post_attention", "pre_feedforward"), readers) for n, readers in LLAMA
    ],  # gains are 1 + weight
}


def prepared(
    source: MemorySource,
    batches: Batches,
    prepare: Callable[[CalibratedBlock, Callable[[], Tensor]], None] | None,
    ignore: Callable[[str], bool] = lambda _: False,
) -> Tensor:
    """The last hidden states of a walk whose blocks are prepared, with layers that ``ignore`` is
    true of not watched."""
    last: list[Tensor] = []
    linears = [n for n, m in source.skeleton().named_modules() if isinstance(m, nn.Linear)]
    blocks = walk(
        source,
        batches,
        Watch(layers=[name for name in linears if not ignore(name)]),
        device="cpu",
        prepare=prepare,
        finished=lambda _, states: last.append(states),
    )
    for _ in blocks:
        pass
    return torch.cat(last)


def groups(block: CalibratedBlock) -> list[list[str]]:
    return [list(group.layers) for group in block.groups]


def is_router(name: str) -> bool:
    return name.endswith((".gate", "shared_expert_gate"))


@pytest.mark.parametrize("family", [*EXPECTED, "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"])
def test_a_folded_model_is_the_same_function(family: str, tiny_model: Build, batches: Batches):
    found: list[list[Site]] = []
    generator = torch.Generator().manual_seed(0)

    def prepare(block: CalibratedBlock, run: Callable[[], Tensor]) -> None:
        found.append(find_sites(block.module, groups(block), run))
        before = run()
        for site in found[-1]:
            factor = torch.exp(torch.randn(site.rows, generator=generator))
            fold(block.module, site, factor, [name for group in groups(block) for name in group])
        torch.testing.assert_close(run(), before, rtol=1e-4, atol=1e-5)

    ignore = is_router if family not in EXPECTED else (lambda _: False)
    expected = prepared(MemorySource(tiny_model(family)), batches, None, ignore)
    folded = prepared(MemorySource(tiny_model(family)), batches, prepare, ignore)
    torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-4)
    if family in EXPECTED:
        names = [
            [(s.producer, tuple(n.removesuffix(".weight") for n in s.readers)) for s in sites]
            for sites in found
        ]
        assert all(sorted(sites) == sorted(EXPECTED[family]) for sites in names), names[0]
    else:
        producers = {site.producer for site in found[-1]}
        last = {site.producer: site for site in found[-1]}
        assert "post_attention_layernorm" in producers
        assert "mlp.gate.weight" in last["post_attention_layernorm"].readers, (
            "the router reads it too"
        )
        down = {"mixtral": "w2"}.get(family, "down_proj")
        experts = [
            site
            for site in found[-1]
            if re.fullmatch(rf"mlp.experts.\d+.{down}.weight", site.readers[0])
        ]
        assert len(experts) == (4 if family == "mixtral" else 8)


def test_every_query_head_of_a_group_shares_the_factors_of_its_value_head(
    tiny_model: Build, batches: Batches
):
    channels: list[Tensor] = []

    def prepare(block: CalibratedBlock, run: Callable[[], Tensor]) -> None:
        channels.append(find_sites(block.module, groups(block), run)[1].channel)

    prepared(
        MemorySource(tiny_model("llama")), batches, prepare
    )  # 4 heads of 16, 2 key-value heads
    expected = torch.arange(32).view(2, 1, 16).expand(2, 2, 16).flatten()
    assert all(torch.equal(channel, expected) for channel in channels)


def test_a_norm_that_somebody_else_reads_is_left_alone(tiny_model: Build, batches: Batches):
    """``up_proj`` is to stay as it is, and reads what ``gate_proj`` reads."""
    producers: list[set[str]] = []

    def prepare(block: CalibratedBlock, run: Callable[[], Tensor]) -> None:
        producers.append({site.producer for site in find_sites(block.module, groups(block), run)})

    prepared(
        MemorySource(tiny_model("llama")), batches, prepare, lambda name: name.endswith("up_proj")
    )
    assert producers == [{"input_layernorm", "self_attn.v_proj"}] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_trials_leave_the_parameters_as_they_were(dtype: torch.dtype):
    block = Block(dtype).requires_grad_(False)
    block.left.weight[0] = 3e-7  # too small for float16 to be halved
    before = {name: (p, p.clone()) for name, p in block.named_parameters()}
    x = torch.randn(5, 8, dtype=dtype)
    sites = find_sites(block, GROUPS, lambda: block(x))
    assert dtype == torch.float16 or {site.producer for site in sites} == {"norm", "right"}
    for name, parameter in block.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])


def test_no_site_where_the_block_is_not_homogeneous():
    block = Block().requires_grad_(False)
    x = torch.randn(5, 8)

    def run() -> Tensor:
        y = block.norm(x)
        return x + block.out((block.left(y) * block.right(y)).tanh()) + y

    assert find_sites(block, GROUPS, run) == []


def test_a_reader_whose_result_is_not_used_counts():
    """As the indexer of sparse attention on texts that are too short for it."""
    block = Block().requires_grad_(False)
    block.index = nn.Linear(8, 4, bias=False).requires_grad_(False)
    x = torch.randn(5, 8)

    def run() -> Tensor:
        y = block.norm(x)
        block.index(y)
        return x + block.out(block.left(y) * block.right(y))

    assert {site.producer for site in find_sites(block, GROUPS, run)} == {"right"}


def test_a_clamp_far_above_what_is_seen_shows():
    block = Block().requires_grad_(False)
    x = torch.randn(5, 8)
    limit = 4 * float((block.left(block.norm(x)) * block.right(block.norm(x))).abs().max())

    def run() -> Tensor:
        y = block.norm(x)
        return x + block.out((block.left(y) * block.right(y)).clamp(-limit, limit))

    assert {site.producer for site in find_sites(block, GROUPS, run)} == {"norm"}


def test_float16_parameters_keep_their_storage():
    """A model in memory is known by its tensors, which a trial must leave as they were."""
    block = Block(torch.float16).requires_grad_(False)
    kept = {name: (p.data, p.data.clone()) for name, p in block.named_parameters()}
    x = torch.randn(5, 8, dtype=torch.float16)
    find_sites(block, GROUPS, lambda: block(x))
    for name, parameter in block.named_parameters():
        alias, value = kept[name]
        assert parameter.data_ptr() == alias.data_ptr() and torch.equal(alias, value), name


def test_experts_cost_no_run_each(tiny_model: Build, batches: Batches):
    runs: list[int] = []

    def prepare(block: CalibratedBlock, run: Callable[[], Tensor]) -> None:
        count = 0

        def counted() -> Tensor:
            nonlocal count
            count += 1
            return run()

        find_sites(block.module, groups(block), counted)
        runs.append(count)

    model = tiny_model("qwen3_moe", num_experts=32, num_hidden_layers=1)
    prepared(MemorySource(model), batches, prepare, is_router)
    assert len(runs) == 1 and runs[0] < 40
