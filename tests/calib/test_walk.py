"""Laws of the walk (G1, G28, G30): what is fed, what is measured, what is kept in
memory."""

import gc
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from ptq.calib import walk as walk_module
from ptq.calib.block_arguments import Recorder
from ptq.calib.rare_experts import top_up
from ptq.calib.walk import CalibratedBlock, Steps, Watch, held_out, walk
from ptq.model.checkpoint_source import CheckpointSource
from ptq.model.memory_source import MemorySource

Build = Callable[..., transformers.PreTrainedModel]
Save = Callable[[str], Path]
Batches = list[torch.Tensor]
FAMILIES = [
    "llama",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma2",
    "gemma3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
]


def run(source: CheckpointSource, batches: Batches, **changes: object) -> Iterator[CalibratedBlock]:
    """A walk; ``changes`` are fields of its Watch, or options of the walk itself."""
    names = {field.name for field in fields(Watch)}
    watched = {"probes": {1: lambda x: x}} | {k: v for k, v in changes.items() if k in names}
    options = {k: v for k, v in changes.items() if k not in names}
    return walk(source, batches, Watch(**watched), device="cpu", **options)  # pyright: ignore[reportArgumentType]


def hold_out(batches: Batches, every: int) -> dict[str, object]:
    return {"held": held_out([len(batch) for batch in batches], every)}


def finish(blocks: Iterator[CalibratedBlock]) -> list[CalibratedBlock]:
    return list(blocks)


def seen_by(
    model: nn.Module, name: str, batches: Batches, *, outputs: bool = False
) -> list[torch.Tensor]:
    """What module ``name`` reads (or returns) when the whole model runs."""
    seen: list[torch.Tensor] = []

    def note(_: nn.Module, args: tuple, result: object) -> None:
        first = result[0] if isinstance(result, tuple) else result
        chosen = first if outputs else args[0]
        assert isinstance(chosen, torch.Tensor)
        seen.append(chosen.detach().clone())

    hook = model.get_submodule(name).register_forward_hook(note)
    with torch.no_grad():
        for batch in batches:
            model(batch, use_cache=False)
    hook.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unchanged_walk_is_the_model(
    family: str, tiny_model: Build, tiny_checkpoint: Save, batches: Batches
):
    model, source = tiny_model(family), CheckpointSource(tiny_checkpoint(family))
    last = source.blocks()[-1][0]
    finals: dict[int, torch.Tensor] = {}
    blocks = finish(run(source, batches, finished=lambda j, x: finals.update({j: x})))
    assert [b.name for b in blocks] == [name for name, _ in source.blocks()]
    assert [(b.index, b.count) for b in blocks] == [(i, len(blocks)) for i in range(len(blocks))]
    for got, expected in zip(
        finals.values(), seen_by(model, last, batches, outputs=True), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
def test_hessians_are_the_second_moments_of_what_layers_read(
    family: str, tiny_model: Build, tiny_checkpoint: Save, batches: Batches
):
    model = tiny_model(family)
    for block in run(CheckpointSource(tiny_checkpoint(family)), batches):
        for group in block.groups:
            for layer in group.layers:
                x = torch.cat(
                    [s.flatten(0, 1) for s in seen_by(model, f"{block.name}.{layer}", batches)]
                ).double()
                kept = torch.arange(len(x)) // 24 != 7  # the eighth sequence is held out
                for hessian, rows in ((group.hessian, x[kept]), (group.holdout, x[~kept])):
                    exact = rows.T @ rows / len(rows)
                    assert hessian.tokens == len(rows)
                    assert (hessian.mean() - exact).norm() <= 1e-6 * exact.norm()
                torch.testing.assert_close(group.amax[1].double(), x.abs().max())


def test_layers_that_read_the_same_share_one_hessian(tiny_checkpoint: Save, batches: Batches):
    for block in run(CheckpointSource(tiny_checkpoint("llama")), batches):
        assert [list(g.layers) for g in block.groups] == [
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["self_attn.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
            ["mlp.down_proj"],
        ]
        assert len({id(g.hessian) for g in block.groups}) == 4
        assert all(
            layer is block.module.get_submodule(n)
            for g in block.groups
            for n, layer in g.layers.items()
        )


def test_layers_that_read_the_same_with_others_between_share_one_hessian(
    tiny_checkpoint: Save, batches: Batches
):
    first = next(run(CheckpointSource(tiny_checkpoint("deepseek_v3")), batches))
    assert ["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"] in [
        list(g.layers) for g in first.groups
    ]


def test_hooks_leave_inputs_as_they_are_bit_for_bit(tiny_model: Build, batches: Batches):
    model = tiny_model("llama")
    name = "model.layers.0.self_attn.v_proj"  # the last of three readers
    before = seen_by(model, name, batches)
    during: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(
        lambda _, args, __: during.append(args[0].clone())
    )
    next(run(MemorySource(model), batches))
    hook.remove()
    assert all(
        torch.equal(a, b) for a, b in zip(before, during[-3:], strict=True)
    )  # first there was a trial


def test_the_order_of_samples_does_not_change_amax(tiny_checkpoint: Save, batches: Batches):
    probes = {1: lambda x: x, 32: lambda x: x.unflatten(-1, (-1, 32)).sum(-1)}

    def amax(data: Batches) -> list[dict[int, torch.Tensor]]:
        return [
            g.amax
            for b in run(CheckpointSource(tiny_checkpoint("llama")), data, probes=probes)
            for g in b.groups
        ]

    for a, b in zip(amax(batches), amax([batch.flip(0) for batch in batches[::-1]]), strict=True):
        assert a.keys() == b.keys() == {1, 32}
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_probes_apply_where_their_size_divides_the_features(
    tiny_checkpoint: Save, batches: Batches
):
    sizes = {k: (lambda x: x) for k in (1, 32, 64)}
    first = next(run(CheckpointSource(tiny_checkpoint("llama")), batches, probes=sizes))
    assert [set(g.amax) for g in first.groups] == [
        {1, 32, 64},
        {1, 32, 64},
        {1, 32, 64},
        {1, 32},
    ]  # down: 96


def test_what_the_caller_puts_in_place_feeds_the_next_block(
    tiny_model: Build, tiny_checkpoint: Save, batches: Batches
):
    def damage(block: nn.Module) -> None:
        old = block.get_submodule("mlp.down_proj")
        assert isinstance(old, nn.Linear)
        new = nn.Linear(old.in_features, old.out_features, bias=False)
        new.weight = nn.Parameter(old.weight.round(decimals=1), requires_grad=False)
        block.set_submodule("mlp.down_proj", new)

    changed = tiny_model("llama")
    for i in range(2):
        damage(changed.get_submodule(f"model.layers.{i}"))
    finals: list[torch.Tensor] = []
    for block in run(
        CheckpointSource(tiny_checkpoint("llama")), batches, finished=lambda _, x: finals.append(x)
    ):
        damage(block.module)
    expected = seen_by(changed, "model.layers.1", batches, outputs=True)
    assert all(torch.equal(a, b) for a, b in zip(finals, expected, strict=True))
    original = seen_by(tiny_model("llama"), "model.layers.1", batches, outputs=True)
    assert not torch.equal(expected[0], original[0])


def test_only_one_block_is_in_memory_at_a_time(tiny_model: Build, tmp_path: Path, batches: Batches):
    tiny_model("llama", num_hidden_layers=4).save_pretrained(tmp_path)
    source = CheckpointSource(tmp_path)

    def filled() -> list[str]:
        return [n for n, m in source.blocks() if any(not p.is_meta for p in m.parameters())]

    peak = []
    for _, module in source.blocks():
        module.register_forward_pre_hook(lambda *_: peak.append(len(filled())))
    for block in run(source, batches, finished=lambda *_: None):
        assert filled() == [block.name]
        outside = [
            n
            for n, p in source.skeleton().named_parameters()
            if not p.is_meta and "layers" not in n
        ]
        assert not outside
    assert max(peak) == 1
    assert filled() == []


def test_an_abandoned_walk_leaves_nothing_behind(
    tiny_checkpoint: Save, batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = CheckpointSource(tiny_checkpoint("llama"))
    blocks = run(source, batches, activations="disk")
    next(blocks)
    assert len(list(tmp_path.iterdir())) == 1
    blocks.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not list(tmp_path.iterdir())
    assert all(p.is_meta for p in source.skeleton().parameters())
    assert not any(m._forward_pre_hooks for m in source.skeleton().modules())
    gc.collect()


def test_a_model_that_is_refused_leaves_nothing_behind(
    tiny_checkpoint: Save, batches: Batches, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise ValueError("refused")

    monkeypatch.setattr(Recorder, "check", refuse)
    source = CheckpointSource(tiny_checkpoint("llama"))
    with pytest.raises(ValueError, match="refused"):
        next(run(source, batches))
    assert all(p.is_meta for p in source.skeleton().parameters())
    assert not any(
        "forward" in m.__dict__ or m._forward_pre_hooks for m in source.skeleton().modules()
    )


@pytest.mark.parametrize("activations", ["device", "disk"])
def test_where_activations_live_changes_nothing(
    activations: str, tiny_checkpoint: Save, batches: Batches
):
    def result(storage: str) -> list[torch.Tensor]:
        made: list[torch.Tensor] = []
        blocks = finish(
            run(
                CheckpointSource(tiny_checkpoint("gemma3")),
                batches,
                activations=storage,
                finished=lambda _, x: made.append(x),
            )
        )
        return made + [g.hessian.mean() for b in blocks for g in b.groups]

    assert all(torch.equal(a, b) for a, b in zip(result("ram"), result(activations), strict=True))


def test_unknown_storage_is_refused(tiny_checkpoint: Save, batches: Batches):
    with pytest.raises(ValueError, match="'ram', 'device' or 'disk'"):
        next(run(CheckpointSource(tiny_checkpoint("llama")), batches, activations="tape"))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_disk_and_memory_measure_the_same(
    family: str, tiny_model: Build, tiny_checkpoint: Save, batches: Batches
):
    on_disk = finish(run(CheckpointSource(tiny_checkpoint(family)), batches))
    in_memory = finish(run(MemorySource(tiny_model(family)), batches))
    for a, b in zip(on_disk, in_memory, strict=True):
        assert a.name == b.name
        for x, y in zip(a.groups, b.groups, strict=True):
            assert list(x.layers) == list(y.layers)
            assert torch.equal(x.hessian.total(), y.hessian.total())
            assert torch.equal(x.sample, y.sample) and torch.equal(x.amax[1], y.amax[1])


def test_skipped_blocks_are_filled_and_run_but_not_measured(
    tiny_checkpoint: Save, batches: Batches
):
    measured = finish(run(CheckpointSource(tiny_checkpoint("llama")), batches))
    for block in run(
        CheckpointSource(tiny_checkpoint("llama")), batches, skip=lambda name: name.endswith(".0")
    ):
        assert not any(p.is_meta for p in block.module.parameters())
        if block.index == 0:
            assert block.groups == []
        else:
            pairs = zip(block.groups, measured[1].groups, strict=True)
            assert all(torch.equal(a.hessian.total(), b.hessian.total()) for a, b in pairs)


def test_ignored_layers_are_neither_measured_nor_fed(tiny_checkpoint: Save, batches: Batches):
    fed: set[str] = set()

    def feed(name: str, x: torch.Tensor) -> torch.Tensor:
        fed.add(name)
        return x

    ignored = {"model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"}
    source = CheckpointSource(tiny_checkpoint("llama"))
    linears = {
        f"{name}.{inner}"
        for name, block in source.blocks()
        for inner, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
    first = next(run(source, batches, layers=linears - ignored, feed=feed))
    measured = {f"model.layers.0.{n}" for g in first.groups for n in g.layers}
    assert measured == fed and not measured & ignored and len(measured) == 5


def test_feed_changes_what_layers_get_but_not_what_is_measured(
    tiny_checkpoint: Save, batches: Batches
):
    plain = next(run(CheckpointSource(tiny_checkpoint("llama")), batches)).groups
    fed = next(
        run(
            CheckpointSource(tiny_checkpoint("llama")),
            batches,
            feed=lambda name, x: x * 0 if "v_proj" in name else x,
        )
    ).groups
    assert torch.equal(plain[0].hessian.total(), fed[0].hessian.total())  # q/k/v read the same x
    assert (
        fed[1].hessian.total().abs().max() == 0 < plain[1].hessian.total().abs().max()
    )  # o reads what v made


def test_feed_does_not_touch_what_the_next_block_reads(tiny_checkpoint: Save, batches: Batches):
    plain = finish(run(CheckpointSource(tiny_checkpoint("llama")), batches))
    fed = finish(run(CheckpointSource(tiny_checkpoint("llama")), batches, feed=lambda _, x: x * 0))
    assert torch.equal(plain[1].groups[0].hessian.total(), fed[1].groups[0].hessian.total())


@pytest.mark.parametrize("sequences, every, held", [(7, 8, 0), (8, 8, 1), (10, 4, 2), (10, 0, 0)])
def test_every_eighth_sequence_is_held_out(
    sequences: int, every: int, held: int, tiny_checkpoint: Save
):
    data = list(torch.randint(3, 100, (sequences, 12)).split(3))
    for family in ("llama", "mixtral"):
        first = next(run(CheckpointSource(tiny_checkpoint(family)), data, **hold_out(data, every)))
        routed = [
            g
            for g in first.groups
            if "down" in next(iter(g.layers)) or "w2" in next(iter(g.layers))
        ]
        times = 2 if family == "mixtral" else 1  # experts per token
        assert sum(g.holdout.tokens for g in routed) == times * 12 * held
        assert sum(g.hessian.tokens for g in routed) == times * 12 * (sequences - held)


def test_experts_hold_out_the_tokens_of_the_same_sequences(
    tiny_model: Build, tiny_checkpoint: Save, batches: Batches
):
    together = next(run(CheckpointSource(tiny_checkpoint("mixtral")), batches))
    alone = next(
        run(
            CheckpointSource(tiny_checkpoint("mixtral")),
            [batches[1][3:]],
            **hold_out([batches[1][3:]], 0),
        )
    )  # the eighth sequence
    for a, b in zip(together.groups, alone.groups, strict=True):
        assert a.holdout.tokens == b.hessian.tokens
        torch.testing.assert_close(a.holdout.total(), b.hessian.total(), rtol=1e-4, atol=1e-5)


def test_samples_are_real_tokens_from_all_batches(tiny_model: Build, tiny_checkpoint: Save):
    data = list(torch.randint(3, 100, (60, 48)).split(20))  # 2880 tokens
    first = next(run(CheckpointSource(tiny_checkpoint("llama")), data, **hold_out(data, 0)))
    assert [len(g.sample) for g in first.groups] == [2048] * 4
    x = torch.cat(
        [
            s.flatten(0, 1)
            for s in seen_by(tiny_model("llama"), "model.layers.0.self_attn.o_proj", data)
        ]
    )
    where = torch.cdist(
        first.groups[1].sample, x, compute_mode="donot_use_mm_for_euclid_dist"
    ).argmin(1)
    assert torch.equal(x[where], first.groups[1].sample)
    assert (where // 960).unique().tolist() == [0, 1, 2]


def without_two_experts(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The same with a router that never chooses expert 1 or 3."""
    for i in range(2):
        gate = model.get_submodule(f"model.layers.{i}.mlp.gate")
        gate.register_forward_hook(
            lambda _, __, out: (*out[:2], torch.tensor([[0, 2]]).expand(len(out[1]), 2))
        )
    return model


def test_unseen_experts_appear_with_no_tokens(tiny_model: Build, batches: Batches):
    first = next(run(MemorySource(without_two_experts(tiny_model("mixtral"))), batches))
    groups = {tuple(g.layers): g for g in first.groups}
    all_seen = next(run(MemorySource(tiny_model("mixtral")), batches))
    assert list(groups) == [tuple(g.layers) for g in all_seen.groups]
    unseen = groups["mlp.experts.1.w1", "mlp.experts.1.w3"]
    assert unseen.hessian.tokens == unseen.holdout.tokens == 0
    assert unseen.sample.shape == (0, 64) and float(unseen.amax[1]) == 0
    with pytest.raises(ValueError, match="no tokens"):
        unseen.hessian.mean()


def test_rare_experts_are_solved_with_the_pool(tiny_model: Build, batches: Batches):
    block = next(
        run(MemorySource(without_two_experts(tiny_model("mixtral"))), [batches[0][:2, :10]])
    )
    groups = {next(iter(g.layers)): g for g in block.groups}
    seen, unseen, pool = (
        groups["mlp.experts.0.w2"],
        groups["mlp.experts.1.w2"],
        block.hessian(groups["mlp.experts.3.w2"]),
    )
    assert torch.equal(block.hessian(unseen), pool)
    assert seen.hessian.tokens == 20
    assert torch.equal(block.hessian(seen), top_up(seen.hessian.mean(), pool, 20, 96))
    q = groups["self_attn.q_proj"]
    assert torch.equal(block.hessian(q), q.hessian.mean())  # no expert: its own, however few


def test_a_pool_without_tokens_names_the_layer(tiny_model: Build, batches: Batches):
    block = next(run(MemorySource(tiny_model("mixtral")), batches))
    for group in block.groups:
        group.hessian.tokens = 0
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts\.0\.w2: no tokens"):
        block.hessian(next(g for g in block.groups if "mlp.experts.0.w2" in g.layers))


def test_nan_in_activations_names_the_layer(tiny_model: Build, batches: Batches):
    model = tiny_model("llama")
    model.get_parameter("model.layers.1.post_attention_layernorm.weight").data[3] = float("nan")
    blocks = run(MemorySource(model), batches)
    next(blocks)
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp\.gate_proj: its inputs contain NaN"
    ):
        next(blocks)


def test_blocks_that_change_the_type_are_caught(tiny_model: Build, batches: Batches):
    model = tiny_model("llama")
    model.get_submodule("model.layers.0").register_forward_hook(lambda _, __, out: out.double())
    blocks = run(MemorySource(model), batches)
    next(blocks)
    with pytest.raises(ValueError, match=r"model\.layers\.0 turned torch\.float32"):
        next(blocks)


@pytest.mark.parametrize(
    "data, message",
    [
        ([], "no calibration batches"),
        ([torch.zeros(2, 8)], "int64 token ids"),
        (
            [torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 9, dtype=torch.int64)],
            "all of the same length",
        ),
        ([torch.full((1, 8), 128)], "token id 128 is outside the model's vocabulary of 128"),
    ],
)
def test_unusable_batches_are_refused(data: Batches, message: str, tiny_checkpoint: Save):
    with pytest.raises(ValueError, match=message):
        next(run(CheckpointSource(tiny_checkpoint("llama")), data))


def test_the_decoder_of_a_vision_language_model_is_walked(tmp_path: Path, batches: Batches):
    text = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8}
    tower = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
    }
    config = transformers.Gemma3Config(
        text_config=text | heads,
        vision_config=tower | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=127,
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    source, finals = CheckpointSource(tmp_path), []
    assert (
        source.checkpoint_name("model.language_model.layers.0.mlp.up_proj.weight") in source.names()
    )
    names = [b.name for b in run(source, batches, finished=lambda _, x: finals.append(x))]
    assert names == ["model.language_model.layers.0", "model.language_model.layers.1"]
    expected = seen_by(model, names[-1], batches, outputs=True)
    assert all(torch.equal(a, b) for a, b in zip(finals, expected, strict=True))
    assert any("vision_tower" in name for name, _ in source.rest())


def test_what_blocks_share_through_a_dictionary_follows_the_walk(batches: Batches):
    config = transformers.Gemma4TextConfig(
        vocab_size=128,
        vocab_size_per_layer_input=128,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        head_dim=8,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=8,
        num_kv_shared_layers=2,
        pad_token_id=0,
    )
    model, finals = transformers.Gemma4ForCausalLM(config).eval(), []
    finish(run(MemorySource(model), batches, finished=lambda _, x: finals.append(x)))
    expected = seen_by(model, "model.layers.3", batches, outputs=True)  # reads the keys of layer 1
    assert all(torch.equal(a, b) for a, b in zip(finals, expected, strict=True))


@pytest.mark.parametrize("name", ["stories260K-ffn192", "stories260K-phi3", "stories260K-mixtral"])
def test_real_models(name: str, shared_data: Path):
    path = shared_data / "models" / name
    data = list(torch.randint(3, 512, (4, 64), generator=torch.Generator().manual_seed(0)).split(2))
    finals: list[torch.Tensor] = []
    blocks = finish(run(CheckpointSource(path), data, finished=lambda _, x: finals.append(x)))
    model = transformers.AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager")
    expected = seen_by(model, blocks[-1].name, data, outputs=True)
    assert all(torch.equal(a, b) for a, b in zip(finals, expected, strict=True))
    assert all(g.hessian.tokens > 0 for b in blocks for g in b.groups)


HEADS = ["llama", "qwen3_moe", "phi3"]


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("from_disk", [False, True], ids=["memory", "disk"])
def test_the_output_head_is_a_last_block_that_reads_what_it_reads_in_the_model(
    family: str, from_disk: bool, tiny_model: Build, tiny_checkpoint: Save, batches: Batches
):
    source = (
        CheckpointSource(tiny_checkpoint(family)) if from_disk else MemorySource(tiny_model(family))
    )
    count = len(source.blocks())
    *_, last = run(source, batches, head=True)
    assert (last.name, last.prefix, last.index, last.count) == ("lm_head", "", count, count + 1)
    (group,) = last.groups
    x = torch.cat(
        [s.flatten(0, 1) for s in seen_by(tiny_model(family), "lm_head", batches)]
    ).double()
    kept = torch.arange(len(x)) // 24 != 7
    for hessian, rows in ((group.hessian, x[kept]), (group.holdout, x[~kept])):
        exact = rows.T @ rows / len(rows)
        assert (
            hessian.tokens == len(rows) and (hessian.mean() - exact).norm() <= 1e-6 * exact.norm()
        )
    assert last.hessian(group).shape == exact.shape
    if from_disk:
        assert all(p.is_meta for p in source.skeleton().parameters())


def test_the_output_head_has_its_weights_and_what_replaces_it_stays(
    tiny_model: Build, batches: Batches
):
    source = MemorySource(tiny_model("llama"))
    new = nn.Linear(64, 128, bias=False)
    for block in run(source, batches, head=True):
        if block.name == "lm_head":
            assert torch.equal(
                block.module.get_parameter("lm_head.weight"), source.tensor("lm_head.weight")
            )
            block.module.set_submodule("lm_head", new)
    assert source.skeleton().get_submodule("lm_head") is new


def test_the_output_head_reads_what_changed_blocks_make(tiny_model: Build, batches: Batches):
    source, plain = MemorySource(tiny_model("llama")), MemorySource(tiny_model("llama"))
    changed = torch.empty(0)
    for block in run(source, batches, head=True):
        if block.name != "lm_head":
            block.module.get_parameter("mlp.down_proj.weight").mul_(-1)
        else:
            changed = block.groups[0].hessian.mean()
    *_, last = run(plain, batches, head=True)
    x = torch.cat(
        [s.flatten(0, 1) for s in seen_by(source.skeleton(), "lm_head", batches)]
    ).double()
    x = x[torch.arange(len(x)) // 24 != 7]
    assert (changed - x.T @ x / len(x)).norm() <= 1e-6 * changed.norm()
    assert (changed - last.groups[0].hessian.mean()).norm() > 1e-2 * changed.norm()


def test_a_head_that_is_skipped_or_ignored_has_no_statistics(tiny_model: Build, batches: Batches):
    for change in (
        {"skip": lambda name: name == "lm_head"},
        {"layers": ["model.layers.0.self_attn.q_proj"]},
    ):
        *_, last = run(MemorySource(tiny_model("llama")), batches, head=True, **change)
        assert last.name == "lm_head" and last.groups == []


def test_a_tied_head_is_refused_before_anything_runs(tiny_model: Build, batches: Batches):
    with pytest.raises(ValueError, match="lm_head of LlamaForCausalLM is tied to the embedding"):
        next(run(MemorySource(tiny_model("llama", tie_word_embeddings=True)), batches, head=True))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_experts_can_be_calibrated_with_all_tokens(
    family: str, tiny_model: Build, batches: Batches
):
    """Then gate and up of every expert read what the router reads, and the walk goes on as it would
    have."""
    finals: list[dict[int, torch.Tensor]] = []
    for route_all in (False, True):
        finals.append(made := {})
        seen = 0
        for block in run(
            MemorySource(tiny_model(family)),
            batches,
            route_all=route_all,
            finished=lambda j, x, m=made: m.update({j: x}),
        ):
            experts = [g for g in block.groups if ".experts." in next(iter(g.layers))]
            seen += len(experts)
            if route_all:
                assert all((g.hessian.tokens, g.holdout.tokens) == (9 * 24, 24) for g in experts)
                gates = [g.hessian.mean() for g in experts if len(g.layers) == 2]
                assert all(torch.equal(gates[0], other) for other in gates[1:])
            elif experts:
                assert any(g.hessian.tokens < 9 * 24 for g in experts)
        assert seen
    assert all(torch.equal(finals[0][j], finals[1][j]) for j in finals[0])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_prepare_blocks_with_the_tokens_that_one_would_take(
    ranks: int, monkeypatch: pytest.MonkeyPatch
):
    """Batch i is on rank i % ranks: together they take the same first batches, or results depended
    on the ranks."""
    everything = [torch.zeros(4, 2048, dtype=torch.int64) for _ in range(8)]
    monkeypatch.setattr(walk_module, "distributed", lambda: ranks > 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
    taken: list[int] = []
    for rank in range(ranks):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        taken += list(range(8))[rank::ranks][: walk_module._few(everything[rank::ranks])]
    assert sorted(taken) == list(range(walk_module.PREPARE // (4 * 2048)))


FIRST = CalibratedBlock(
    name="a", prefix="a.", module=torch.nn.Identity(), groups=[], index=0, count=1
)


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [((3, 5, 7), (1, 5, 7)), ((4, 3, 5, 7), (4, 1, 5, 7)), ((3, 5, 4, 7), (1, 5, 4, 7))],
)
def test_a_trial_runs_on_few_tokens_of_states_of_any_form(
    shape: tuple[int, ...], tokens: tuple[int, ...]
):
    """Gemma-3n has four streams of hidden states before the sequences."""
    steps = SimpleNamespace(
        states=[torch.randn(shape)],
        batches=[torch.zeros(3, 5)],
        short=[lambda block, hidden: hidden],
    )
    run = Steps.trial(steps, FIRST)  # pyright: ignore[reportArgumentType]
    assert run is not None and run().shape == tokens


@pytest.mark.parametrize("shape", [(15, 7), (3, 5, 3, 5, 7)])
def test_states_of_an_unknown_form_have_no_trial(shape: tuple[int, ...]):
    steps = SimpleNamespace(states=[torch.randn(shape)], batches=[torch.zeros(3, 5)], short=[])
    assert Steps.trial(steps, FIRST) is None  # pyright: ignore[reportArgumentType]
