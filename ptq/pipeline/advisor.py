"""A model in, advice out: what every format and rotation would cost each of its layers, measured,
and a recipe that ``ptq quantize --recipe`` takes.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ptq import __version__
from ptq.calib.sensitivity import ALL
from ptq.model.checkpoint_source import CheckpointSource
from ptq.model.structure import positions
from ptq.numerics.formats import FORMATS, MICROSCALED
from ptq.pipeline.advice import Advice, Damage, Option, Unit
from ptq.pipeline.damage import LENGTH, SEQUENCES, damages
from ptq.pipeline.plan import Plan
from ptq.pipeline.recipe import PER_MODULE, SCHEMES, Change, Recipe
from ptq.reading.schema import as_json, check_fields
from ptq.runtime.evaluate import TOP
from ptq.text.windows import load_calibration, load_tokenizer

SIXTEEN = 16.0  # bits of what stays as it is


@dataclass(frozen=True, kw_only=True)
class AdviceOptions:
    """What decides the numbers that are measured.

    Attributes:
        scheme: ``w4a16`` or ``w4a4``, of all layers.
        formats: to choose from; each with and without rotation in blocks of its group.
        keep: whether layers may also stay in 16 bits.
        calibration, field, seed: the text, as in a recipe.
        ignore: layers that stay as they are and do not count.
    """

    scheme: str = "w4a4"
    formats: tuple[str, ...] = tuple(MICROSCALED)
    keep: bool = True
    calibration: str = "builtin"
    field: str | None = None
    seed: int = 0
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, "the advice")
        if self.scheme not in SCHEMES:
            raise ValueError(f"unknown scheme {self.scheme!r}; choose from {', '.join(SCHEMES)}")
        if not self.formats:
            raise ValueError("name one format at least to choose from")
        for name in self.formats:
            if name not in FORMATS:
                raise ValueError(f"unknown format {name!r}; choose from {', '.join(FORMATS)}")

    def recipe(self, format: str, **given: Any) -> Recipe:
        """The best known recipe of a format, with what is said here."""
        return Recipe.default(
            format,
            scheme=self.scheme,
            calibration=self.calibration,
            field=self.field,
            seed=self.seed,
            ignore=self.ignore or None,
            **given,
        )


def measure_damage(
    model: str | Path,
    options: AdviceOptions,
    *,
    known: Damage | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    activations: str = "ram",
    on_block: Callable[[int, int], object] = lambda done, total: None,
) -> Damage:
    """Measure what the options of every layer cost; nothing of the model is changed.

    Layers that no token reached, as rare experts, take no part; in a recipe they get what the run
    has. ``known`` is returned as it is if it is what would be measured.

    Raises:
        ValueError, OSError: with one line that says what, where, and what to do.
    """
    began = time.monotonic()
    device = torch.device(device)
    source = CheckpointSource.on(model, device, dtype)
    widest = max(options.formats, key=lambda name: FORMATS[name].group_size)
    plan = Plan.of(source, options.recipe(widest, rotation=1), device.type)
    choices = _choices(plan, options)
    limit = positions(source.config)
    data = load_calibration(
        load_tokenizer(source.path),
        options.calibration,
        samples=SEQUENCES,
        seq_len=min(LENGTH, limit or LENGTH),
        batch_size=1,
        seed=options.seed,
        field=options.field,
    )
    identity = as_json(
        {
            **asdict(options),
            "fingerprint": source.fingerprint,
            "dtype": str(source.compute_dtype).removeprefix("torch."),
            "ptq": __version__,
            "text": data.description,
        }
    )
    if known is not None and known.identity == identity:
        return known
    recipes = {label: recipe for label, (_, recipe) in choices.items()}
    found = damages(
        source,
        plan,
        data.batches,
        dict.fromkeys(plan.layers, recipes),
        device=device,
        activations=activations,
        measures=(ALL, TOP),
        on_block=on_block,
    )
    return Damage(
        identity=identity,
        scheme=options.scheme,
        seconds=time.monotonic() - began,
        units=tuple(
            Unit(
                layers=unit.layers,
                weights=unit.weights,
                options=_options(unit.scores, choices, keep=options.keep),
            )
            for unit in found
        ),
    )


def _choices(plan: Plan, options: AdviceOptions) -> dict[str, tuple[Option, Recipe]]:
    """The options of a layer by label, without figures yet, and their recipes."""
    found: dict[str, tuple[Option, Recipe]] = {}
    for name in options.formats:
        fmt = FORMATS[name]
        for size in sorted({1, fmt.group_size or 1}):
            option = Option(
                format=name, rotation=size, bits=fmt.bits_per_weight, kl=0.0, kl_top25=0.0
            )
            recipe = replace(plan.recipe.in_format(name), rotation=size)
            found[option.label] = (option, recipe)
    return found


def _options(
    scores: Mapping[str, Sequence[float]],
    choices: Mapping[str, tuple[Option, Recipe]],
    *,
    keep: bool,
) -> tuple[Option, ...]:
    """The options with their figures; those that no token came by cost nothing that is known."""
    made = [
        replace(choices[label][0], kl=score[0], kl_top25=score[1])
        for label, score in scores.items()
    ]
    if keep:
        made.append(Option(format=None, rotation=1, bits=SIXTEEN, kl=0.0, kl_top25=0.0))
    return tuple(made)


def recipe_of(advice: Advice, options: AdviceOptions) -> Recipe:
    """The recipe of an advice: what most weights get is that of the run, and every other layer has
    a rule.

    Raises:
        ValueError: all layers are to stay as they are.
    """
    picked = [
        (unit, unit.options[chosen])
        for unit, chosen in zip(advice.damage.units, advice.choice, strict=True)
    ]
    weights: Counter[tuple[str, int]] = Counter()
    for unit, option in picked:
        if option.format is not None:
            weights[option.format, option.rotation] += unit.weights
    if not weights:
        raise ValueError(
            "every layer would stay in 16 bits: give fewer bits per weight, or a higher ceiling"
        )
    (format, rotation), _ = weights.most_common(1)[0]
    base = options.recipe(format, rotation=rotation)
    rules = [
        (name, change)
        for unit, option in picked
        if (change := _change(base, option)) is not None
        for name in unit.layers
    ]
    return replace(base, rules=tuple(rules))


def _change(base: Recipe, option: Option) -> Change | None:
    """What a rule says of layers with an option; None where they are as the run's recipe says."""
    if option.format is None:
        return "skip"
    wanted = base if option.format == base.format else base.in_format(option.format)
    if wanted.rotation == option.rotation:
        return None if wanted is base else option.format
    wanted = replace(wanted, rotation=option.rotation)
    return {
        name: getattr(wanted, name)
        for name in PER_MODULE
        if getattr(wanted, name) != getattr(base, name)
    }
