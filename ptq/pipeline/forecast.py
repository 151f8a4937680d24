"""What a run will need, from the model's configuration alone: memory, time, size of the result.

``ptq quantize --dry-run`` prints it.

    peak = program + activations + block + Hessians + solver + outputs, or that of what comes before
    (gradients) or after (tuning)

- program: what this process holds already: Python and its libraries.
- activations: samples · seq_len · hidden, in the dtype of the computation, and one batch inside a
  block. On the host, on the device or on disk (``--activations``).
- block: the largest decoder block's parameters in the dtype of the computation (float32 where they
  are balanced), and once more as they lie on disk while they are read; the token embedding takes
  its place at the start if it is larger.
- Hessians: two (calibration, held out) of in² entries and a sample of the inputs for every input
  group of a block; of experts those of a round (``--hessian-memory``), and if there are several
  the inputs of the experts are kept like activations.
- solver: for the input group that needs most, copies of the rows that are solved at a time and of
  its Hessian; codes of all that is solved in a block, a byte each.
- outputs: what errors of outputs cost, of all layers (:mod:`ptq.pipeline.output_costs`), unless on
  disk.
- tuning (:mod:`ptq.pipeline.tuning_cost`).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from ptq.calib.expert_rounds import expert_of, split
from ptq.calib.hessian import entry_bytes
from ptq.calib.hidden_states import check_storage
from ptq.calib.observer import statistics_bytes
from ptq.checkpoint.dialects import DIALECTS
from ptq.checkpoint.reader import config_dtype, read_config
from ptq.model.blueprint import Blueprint
from ptq.model.checkpoint_source import CheckpointSource
from ptq.model.weight_files import Shards, has_weights
from ptq.pipeline.budget import more_bits
from ptq.pipeline.duration import Group, Work, block_seconds, other_seconds
from ptq.pipeline.memory import held_bytes, machine_bytes, statistics_limit
from ptq.pipeline.output_costs import output_costs_bytes
from ptq.pipeline.plan import LayerPlan, Plan
from ptq.pipeline.readers import plan_for, readers_in_words, with_eight_bits
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.solve import PART_ELEMENTS
from ptq.pipeline.speed import measure
from ptq.pipeline.tuning import check_tunable
from ptq.pipeline.tuning_cost import Shapes, tuning_bytes, tuning_seconds
from ptq.runtime.figures import count, size, span
from ptq.runtime.tables import Table, Tabular

# Copies of the rows that are solved at a time (float32) and of the Hessian (float64) that are alive
# together: solve.py.
WEIGHT_COPIES, HESSIAN_COPIES = 11, 2


@dataclass(frozen=True, kw_only=True, repr=False)
class Forecast(Tabular):
    """All sizes in bytes, ``seconds`` on this machine (None when the device is not here), of which
    ``block_seconds`` are those of every block.

    ``samples`` of ``seq_len`` tokens are read of ``calibration``, or nothing (None). The result is
    written in ``dialect`` for that ``reason``; ``remarks`` are what else there is to know before.

    ``tuning`` is what that takes in all after everything else, 0 without.

    ``opens`` says what engines make of the result in its ``dialect``.

    Statistics of experts are taken in ``rounds``; in one they would be ``hessians_at_once``. With
    more than one, experts run once more over their calibration tokens: ``seconds`` counts that.
    """

    levers: str
    format: str
    scheme: str
    quality: str
    samples: int
    seq_len: int
    calibration: str | None
    dialect: str
    reason: str
    remarks: tuple[str, ...]
    parameters: int
    quantized: int
    layers: int
    blocks: int
    source_bytes: int
    output_bytes: int
    bits_per_quantized_weight: float
    bits_per_parameter: float
    program: int
    activations: int
    block: int
    hessians: int
    hessians_at_once: int
    rounds: int
    solver: int
    outputs: int
    tuning: int
    peak_bytes: int
    device: str
    machine_bytes: int
    seconds: float | None
    block_seconds: tuple[float, ...]
    opens: dict[str, str]

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values."""
        return asdict(self)

    @property
    def fits(self) -> bool:
        """Whether this machine has the memory, a tenth of it left for others."""
        return self.peak_bytes < 0.9 * self.machine_bytes

    @property
    def overview(self) -> tuple[tuple[str, str], ...]:
        """What a run does and needs: (label, text)."""
        tokens = self.samples * self.seq_len
        text = f"{self.samples} × {self.seq_len} = {tokens:,} tokens of {self.calibration}"
        time = "" if self.seconds is None else f"about {span(self.seconds)} and "
        needs = f"{time}{size(self.peak_bytes)} of the {size(self.machine_bytes)} on {self.device}"
        if not self.fits:
            needs += ": it does NOT fit; try --activations disk, --batch-size 1"
        return (
            (
                "model",
                f"{count(self.parameters)} parameters, {self.quantized / self.parameters:.0%} of "
                "them quantized",
            ),
            (
                "recipe",
                f"{self.format} {self.scheme}, {self.layers} layers in {self.blocks} blocks: "
                f"{self.levers}",
            ),
            (
                "text",
                f"{'none is read' if self.calibration is None else text} "
                f"(--quality {self.quality})",
            ),
            ("opens in", readers_in_words(self.dialect, self.reason)),
            *(("inputs", remark.removeprefix("inputs are ")) for remark in self.remarks),
            (
                "result",
                f"{size(self.output_bytes)}, {self.output_bytes / self.source_bytes:.0%} of "
                f"{size(self.source_bytes)}; {self.bits_per_quantized_weight:.2f} bits per "
                f"quantized weight, {self.bits_per_parameter:.2f} per parameter",
            ),
            ("needs", needs),
        )

    @property
    def memory(self) -> Table:
        """Memory at the peak, part by part."""
        parts = ("program", "activations", "block", "hessians", "solver")
        rounds = (
            f"Hessians of experts in {self.rounds} rounds (all at once would be "
            f"{size(self.hessians_at_once)}; --hessian-memory): the same result, for one more "
            "pass over the experts"
        )
        return Table(
            title="memory at the peak",
            columns=("part", "size"),
            rows=(
                *((part, size(getattr(self, part))) for part in parts),
                *([("outputs", size(self.outputs))] if self.outputs else []),
                *([("tuning, afterwards", size(self.tuning))] if self.tuning else []),
                ("peak", size(self.peak_bytes)),
            ),
            notes=(rounds,) if self.rounds > 1 else (),
        )

    def tables(self) -> tuple[Table, ...]:
        """Two: memory part by part, with what a run does and needs as notes."""
        lines = tuple(f"{label}: {text}" for label, text in self.overview)
        return (replace(self.memory, notes=(*self.memory.notes, *lines)),)


def forecast(
    model: str | Path,
    recipe: Recipe,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    activations: str = "ram",
    dialect: str = "auto",
    target: str | None = None,
    hessian_memory: float | None = None,
    ranks: int = 1,
) -> Forecast:
    """Predict a run of :func:`ptq.pipeline.run.quantize_model` with the same arguments; reads no
    weights.

    Raises:
        ValueError, FileNotFoundError: what the run itself would refuse before reading weights.
    """
    check_storage(activations)
    blueprint, device = Blueprint.of(model), torch.device(device)
    if has_weights(blueprint.path):
        CheckpointSource(blueprint.path).blocks()  # refuses what does not fit together
    named = config_dtype(read_config(blueprint.path)) or "float32"
    plan = plan_for(blueprint, recipe, dialect, target=target, dtype=named, device=device.type)
    assert plan.written is not None
    check_tunable(plan, on_disk=True, ranks=ranks)
    openings = DIALECTS[plan.written.dialect].opens(with_eight_bits(plan))
    skeleton = blueprint.model
    stored = next((p.dtype for p in skeleton.parameters() if p.is_floating_point()), torch.bfloat16)
    computed = dtype or (torch.float32 if device.type == "cpu" else stored)
    total = _parameters(skeleton)
    quantized = sum(layer.weights for layer in plan.layers.values())
    packed = sum(_packed_bytes(layer) for layer in plan.layers.values())
    packed += more_bits(plan) / 8
    source_bytes = _stored_bytes(blueprint.path) or total * stored.itemsize
    output_bytes = round((total - quantized) * stored.itemsize + packed)
    tokens = plan.tokens // ranks
    works = _blocks(blueprint, plan)
    groups = [work.groups for work in works]
    work = [(group.features, sum(group.rows)) for block in groups for group in block]
    sizes = [sum(p.numel() for p in block.parameters()) for _, block in blueprint.blocks()]
    codes = max((sum(group.weights for group in block) for block in groups), default=0)
    parts = {
        "program": held_bytes(),
        "activations": _activations(blueprint, plan, computed, activations, tokens),
        "block": _block(skeleton, max(sizes), plan, computed, stored),
        "solver": max((_solver(n, rows, device) for n, rows in work), default=0) + codes,
    }
    free = machine_bytes(device) - sum(parts.values()) + parts["solver"]
    limit = statistics_limit(device, hessian_memory, free)
    # balanced weights are float32, and with them the samples
    width = 4 if plan.balances else computed.itemsize
    measured = groups if plan.measures else []
    statistics = [_Statistics.of(block, device, width, limit) for block in measured]
    rounds = max((block.rounds for block in statistics), default=1)
    if rounds > 1 and activations != "disk":
        parts["activations"] += tokens * _hidden(blueprint.config) * computed.itemsize
    parts["hessians"] = max((block.bytes for block in statistics), default=0)
    if plan.measures:
        again = [block.repeated for block in statistics]
        works = [replace(w, repeated=more) for w, more in zip(works, again, strict=True)]
    times = _times(blueprint, plan, works, device, tokens, ranks)
    outputs = [[rows for group in block for rows in group.rows] for block in groups]
    kept, gradients = output_costs_bytes(plan, outputs, _hidden(blueprint.config), activations)
    before = parts["program"] + parts["activations"] + parts["block"] + kept + gradients
    parts["outputs"] = kept
    shapes = _shapes(blueprint, plan, sizes, total, computed)
    tuning = round(parts["program"] + tuning_bytes(plan, shapes, activations))
    tuning = tuning if recipe.tune else 0
    others = other_seconds(plan, source_bytes) + tuning_seconds(plan, shapes, device)
    return Forecast(
        levers=plan.recipe.levers,
        format=" + ".join(dict.fromkeys(layer.recipe.format for layer in plan.layers.values())),
        scheme=recipe.scheme,
        quality=recipe.quality,
        samples=plan.samples,
        seq_len=plan.seq_len,
        calibration=recipe.calibration if plan.reads_text else None,
        dialect=plan.written.dialect,
        reason=plan.written.reason,
        remarks=(plan.about_inputs,) if plan.about_inputs else (),
        parameters=total,
        quantized=quantized,
        layers=len(plan.layers),
        blocks=len(sizes),
        source_bytes=source_bytes,
        output_bytes=output_bytes,
        bits_per_quantized_weight=8 * packed / quantized,
        bits_per_parameter=8 * output_bytes / total,
        tuning=tuning,
        peak_bytes=max(sum(parts.values()), before, tuning),
        hessians_at_once=max((block.at_once for block in statistics), default=0),
        rounds=rounds,
        device=str(device),
        machine_bytes=machine_bytes(device),
        seconds=None if times is None else sum(times) + others,
        block_seconds=tuple(times or ()),
        opens={engine: str(opening) for engine, opening in openings.items()},
        **parts,
    )


def _shapes(
    blueprint: Blueprint, plan: Plan, sizes: list[int], total: int, computed: torch.dtype
) -> Shapes:
    embeddings = [m for m in blueprint.model.modules() if isinstance(m, nn.Embedding)]
    vocabulary = max((m.num_embeddings for m in embeddings), default=0)
    return Shapes(
        blocks=sizes,
        outside=total - sum(sizes),
        tuned=sum(layer.weights for layer in plan.layers.values() if layer.tunable),
        hidden=_hidden(blueprint.config),
        vocabulary=vocabulary,
        itemsize=computed.itemsize,
    )


def _parameters(model: nn.Module) -> int:
    """How many numbers a checkpoint of the model holds; tied ones once."""
    tied = getattr(model, "all_tied_weights_keys", {})
    parameters = model.named_parameters(remove_duplicate=False)
    return sum({name: p.numel() for name, p in parameters if name not in tied}.values())


def _packed_bytes(layer: LayerPlan) -> float:
    fmt = layer.recipe.fmt
    return layer.weights * fmt.bits_per_weight / 8 + 4 * fmt.has_global_scale


def _activations(
    blueprint: Blueprint, plan: Plan, computed: torch.dtype, where: str, tokens: int
) -> int:
    """Hidden states of all tokens, unless they lie on disk, and what one batch needs in a block."""
    hidden = _hidden(blueprint.config)
    widest = max((layer.in_features for layer in plan.layers.values()), default=hidden)
    per_token = (6 * hidden + 3 * widest) * max(computed.itemsize, 4)
    held = 0 if where == "disk" else tokens * hidden * computed.itemsize
    return held + plan.recipe.batch_size * plan.seq_len * per_token


def _block(
    model: nn.Module, largest: int, plan: Plan, computed: torch.dtype, stored: torch.dtype
) -> int:
    """The largest block of so many parameters, or the embedding, in memory and as it is read."""
    embeddings = (m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    width = 4 if plan.balances else computed.itemsize  # balanced weights are float32
    embedding = max(embeddings, default=0) * (computed.itemsize + stored.itemsize)
    return max(largest * (width + stored.itemsize), embedding)


def _blocks(blueprint: Blueprint, plan: Plan) -> list[Work]:
    """What there is to do in every block, and in the output head as a last one."""
    blocks: dict[str, list[Group]] = {name: [] for name in blueprint.block_names}
    homes = [f"{name}." for name in blueprint.block_names]
    for names in blueprint.input_groups:
        layers = [plan[name] for name in names if name in plan.layers]
        if layers:
            first = layers[0].name
            home = next((h for h in homes if first.startswith(h)), first).removesuffix(".")
            rows = tuple(layer.out_features for layer in layers)
            group = Group(layers[0].in_features, rows, expert_of(blueprint.model, first))
            blocks.setdefault(home, []).append(group)
    sizes = {name: sum(p.numel() for p in block.parameters()) for name, block in blueprint.blocks()}
    config = text_config(blueprint.config)
    heads = getattr(config, "num_attention_heads", 0) or 0
    routed = getattr(config, "num_experts_per_tok", None)
    works = []
    for name, groups in blocks.items():
        weights = sum(group.weights for group in groups)
        inside = sum(group.weights for group in groups if group.expert)
        experts = len({group.expert for group in groups if group.expert})
        share = min(routed / experts, 1.0) if routed and experts else 1.0
        works.append(
            Work(
                parameters=sizes.get(name, weights) - inside * (1 - share),
                groups=groups,
                attention=heads * head_features(config) if name in sizes else 0,
                routed=1.0 if plan.recipe.route_all_experts else share,
            )
        )
    return works


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """That of the language model in a model."""
    return getattr(config, "get_text_config", lambda: config)()


def head_features(config: PretrainedConfig) -> int:
    """Features of an attention head; the hidden state's if there are no heads."""
    heads = getattr(config, "num_attention_heads", None) or 1
    return getattr(config, "head_dim", None) or _hidden(config) // heads


@dataclass(frozen=True)
class _Statistics:
    """Of a block: the bytes of the largest round, of all experts at once, how many rounds there
    are, and how many weights run once more for that."""

    bytes: int
    at_once: int
    rounds: int
    repeated: int

    @classmethod
    def of(
        cls, groups: Sequence[Group], device: torch.device, itemsize: int, limit: float
    ) -> "_Statistics":
        rest, experts = 0, dict[str, int]()
        for group in groups:
            size = statistics_bytes(group.features, device, itemsize)
            if group.expert is None:
                rest += size
            else:
                experts[group.expert] = experts.get(group.expert, 0) + size
        sizes = [sum(experts[name] for name in part) for part in split(experts, limit)]
        repeated = sum(group.weights for group in groups if group.expert) if sizes[1:] else 0
        largest = max(rest + sum(sizes[:1]), max(sizes, default=0))
        return cls(largest, rest + sum(sizes), max(len(sizes), 1), repeated)


def _solver(features: int, rows: int, device: torch.device) -> int:
    """Bytes for one input group: rows being solved, codes of all rows (of two results, and joined),
    Hessians.

    Of the Hessian there are the mean of both parts, those rotated, and the factor in float32.
    """
    weights = WEIGHT_COPIES * 4 * min(rows * features, PART_ELEMENTS) + 3 * rows * features
    return weights + features**2 * (HESSIAN_COPIES * 8 + 4 * entry_bytes(features, device) + 4)


def _hidden(config: PretrainedConfig) -> int:
    text = text_config(config)
    return int(getattr(text, "hidden_size", None) or text.n_embd)


def _stored_bytes(path: Path) -> int:
    """Bytes of the weights beside the configuration; 0 when there are none."""
    return Shards(path).total_bytes if has_weights(path) else 0


def _times(
    blueprint: Blueprint,
    plan: Plan,
    works: list[Work],
    device: torch.device,
    tokens: int,
    ranks: int,
) -> list[float] | None:
    """Of every block, on a machine that has the device."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return None
    config, hidden = text_config(blueprint.config), _hidden(blueprint.config)
    speed = measure(plan.recipe, device, hidden, head_features(config), plan.seq_len)
    return block_seconds(works, plan, speed, tokens=tokens, hidden=hidden, ranks=ranks)
