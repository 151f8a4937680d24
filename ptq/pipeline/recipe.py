"""Recipe: every choice that changes the numbers in a checkpoint, and nothing else.

A recipe is stored verbatim in the checkpoint. Rules for single modules are part of it: the first
rule whose pattern matches a module's name replaces some of its fields for that module, or leaves
the module unquantized.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field

from ptq.checkpoint.quantization_config import KEY_VALUES
from ptq.numerics.activations import best_rule, default_rule, input_rules, quantize_inputs
from ptq.numerics.algorithms import ALGORITHMS, BLIND, CHOICES, SWEEPING
from ptq.numerics.formats import FORMATS, MICROSCALED, Format
from ptq.numerics.nested import narrower
from ptq.numerics.rotation import Rotation
from ptq.numerics.scales import RULES, Grid
from ptq.pipeline.quality import QUALITIES
from ptq.reading.name_patterns import check_pattern, matches
from ptq.reading.schema import Count, Share, check, check_fields

SCHEMES = ("w4a16", "w4a4")
# Scale choices beyond the rules of ptq.numerics.scales: made inside the GPTQ sweep, from the
# compensated weights.
IN_LOOP = {"in_loop_mse": "mse", "trial": "trial"}
# How tuning moves codes, and what is said of that: by latents that drift through their cells
# (ptq.numerics.latents), or a few to a neighbour in every step (ptq.numerics.discrete_step).
TUNED_BY = {"latents": "", "pv": ", codes in the manner of PV-Tuning"}
# Fields that a rule for single modules may replace.
PER_MODULE = (
    "format",
    "scheme",
    "algorithm",
    "rotation",
    "scales",
    "weighted",
    "order",
    "damping",
    "descent",
    "global_scale",
    "input_scale",
    "input_rule",
    "balance",
    "nested",
)
Pattern = Annotated[str, AfterValidator(check_pattern)]
# What a rule says of a module: fields to replace, "skip", or the name of a format.
Change = dict[str, Any] | str


def check_patterns(patterns: Iterable[str], names: Iterable[str], what: str) -> None:
    """Raise ValueError for a pattern that selects none of ``names``, with those that look like it;
    ``what`` they are names of."""
    names = list(names)
    for pattern in patterns:
        if not matches(pattern, *names):
            leaves = sorted({name.rpartition(".")[2] for name in names})
            near = difflib.get_close_matches(pattern, [*leaves, *names], n=4, cutoff=0.4)
            raise ValueError(
                f"pattern {pattern!r} matches no {what} of the model; near names: "
                f"{', '.join(near or leaves[:8])}"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to quantize a model.

    Attributes:
        format: a key of :data:`ptq.numerics.formats.FORMATS`.
        quality: a key of :data:`ptq.pipeline.quality.QUALITIES`: how much text is read where
            ``samples`` and ``seq_len`` do not say it.
        scheme: ``w4a16`` quantizes weights; ``w4a4`` quantizes activations too, dynamically and to
            the same format.
        algorithm: a key of :data:`ptq.numerics.algorithms.ALGORITHMS`.
        rotation: size of the Hadamard blocks, 1 for none, or ``auto``: per input group, by measured
            loss.
        scales: a rule of :data:`ptq.numerics.scales.RULES`, or ``in_loop_mse`` / ``trial`` (chosen
            inside the GPTQ sweep).
        weighted: a static scale search weights columns by the diagonal of the Hessian.
        order: column order of GPTQ: ``natural``, ``act`` or ``group``.
        damping: share of the mean diagonal added to the Hessian; raised tenfold, and logged, if the
            factorisation fails.
        descent: sweeps of coordinate descent on the codes after the algorithm (0: none).
        global_scale: ``absmax`` or ``alternating`` (refitted by turns with the group scales).
        input_scale: global scale of activations in ``w4a4``: ``static`` (calibrated) or ``token``.
        input_rule: scale rule of activations, one of
            :func:`ptq.numerics.activations.input_rules`; None is the best one measured for the
            format and a layer's rotation.
        balance: strength of diagonal balancing, 0 (none) … 1 (all inputs of a layer equally large),
            where it folds into what produces the inputs (:mod:`ptq.calib.balance`).
        balance_factors: ``exact``, or ``power_of_two``: rounded to one, so that they only move
            exponents.
        nested: bits of the narrower format that the codes are to hold within them, and which they
            are chosen for (:mod:`ptq.numerics.nested`); 0 for none.
        fisher: windows of the calibration text whose gradients tell which errors of a layer's
            outputs cost the model much (:mod:`ptq.numerics.both_sides`); 0 lets every output count
            alike.
        eight_bit: share of the weights that may be quantized to 8 bits, where that gains most by
            measured loss (:mod:`ptq.pipeline.budget`); in a checkpoint it has become rules.
        budget: the same as bits per weight, on average.
        kv_cache: ``fp8`` calibrates scales for a cache of keys and values in E4M3; None leaves it.
        tune: steps of end-to-end distillation of codes and norms, after everything else
            (:mod:`ptq.pipeline.tuning`); 0 for none.
        tune_codes: a key of :data:`TUNED_BY`: how these steps move codes.
        ignore: patterns of modules that stay as they are.
        rules: ``(pattern, {field: value})`` or ``(pattern, "skip")``, the first match wins. Routers
            and gates of shared experts stay as they are unless a rule selects them and nothing
            else.
        lm_head: quantize the output head too.
        route_all_experts: calibrate experts with all tokens, not only with those that the router
            sends to them.
        calibration, field, samples, seq_len, batch_size, seed: the calibration data; batch_size
            changes the order of summation. Samples and seq_len are None until a plan is made:
            then the quality, the model and the device decide.
    """

    format: str
    quality: str = "default"
    scheme: str = "w4a16"
    algorithm: str = "gptq"
    rotation: int | str = 1
    scales: str = "mse"
    weighted: bool = False
    order: str = "act"
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    descent: Annotated[int, Field(ge=0, le=1000)] = 0
    global_scale: str = "absmax"
    input_scale: str = "static"
    input_rule: str | None = None
    balance: Share = 0.0
    balance_factors: str = "exact"
    nested: Annotated[int, Field(ge=0, le=16)] = 0
    fisher: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    eight_bit: Share = 0.0
    budget: Annotated[float, Field(gt=0, le=16)] | None = None
    kv_cache: str | None = None
    tune: Annotated[int, Field(ge=0, le=100_000)] = 0
    tune_codes: str = "latents"
    ignore: tuple[Pattern, ...] = ()
    rules: tuple[tuple[Pattern, Change], ...] = ()
    lm_head: bool = False
    route_all_experts: bool = False
    calibration: str = "builtin"
    field: str | None = None
    samples: Count | None = None
    seq_len: Count | None = None
    batch_size: Count = 4
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    def __post_init__(self) -> None:
        check_fields(self, "the recipe")
        _choice("format", self.format, FORMATS)
        _choice("quality", self.quality, QUALITIES)
        _choice("scheme", self.scheme, SCHEMES)
        _choice("algorithm", self.algorithm, ALGORITHMS)
        _choice("scales", self.scales, (*RULES, *IN_LOOP))
        _choice("order", self.order, ("natural", "act", "group"))
        _choice("global_scale", self.global_scale, ("absmax", "alternating"))
        _choice("input_scale", self.input_scale, ("static", "token"))
        _choice("tune_codes", self.tune_codes, TUNED_BY)
        _choice("balance_factors", self.balance_factors, ("exact", "power_of_two"))
        if self.kv_cache is not None:
            _choice("kv_cache", self.kv_cache, KEY_VALUES)
        if self.quantize_inputs and self.fmt.weights_only:
            raise ValueError(
                f"{self.format} is a format of weights alone: use --scheme w4a16, or a format of "
                f"{', '.join(MICROSCALED)}"
            )
        if self.input_rule is not None:
            _choice("input_rule", self.input_rule, input_rules(self.fmt))
        if self.rotation != "auto":
            if isinstance(self.rotation, str):
                raise ValueError(
                    f"unknown rotation {self.rotation!r}; give none, a power of two, or auto"
                )
            Rotation(self.rotation)
        if self.scales in IN_LOOP and self.algorithm not in SWEEPING:
            raise ValueError(
                f"scales {self.scales!r} are chosen inside the GPTQ sweep; use --algorithm gptq, "
                "or --scales mse"
            )
        if self.scales in IN_LOOP and not self.fmt.group_size:
            raise ValueError(
                f"scales {self.scales!r} are chosen for a group of columns, and {self.format} has "
                "one scale a row; use --scales absmax or mse"
            )
        if self.scales in IN_LOOP and self.order == "act":
            raise ValueError(
                f"scales {self.scales!r} need the columns of a group together; use order group or "
                "natural, not act"
            )
        _try_rules(self.format, None if self.scales in IN_LOOP else self.scales, self.input_rule)
        if self.fisher and (self.algorithm not in SWEEPING or self.nested):
            what = f"nested {self.format}" if self.nested else self.algorithm
            raise ValueError(
                f"{what} does not look at what errors of outputs cost: leave out --fisher, or use "
                "--algorithm gptq without --nested"
            )
        if self.nested:
            self._check_nested()
        for pattern, change in self.rules:
            self._apply(pattern, change)

    def _check_nested(self) -> None:
        narrower(self.fmt, self.nested)
        if self.quantize_inputs:
            raise ValueError(
                "nested codes are of weights, and inputs quantized to one width are wrong for the "
                "other; use --scheme w4a16"
            )
        if self.eight_bit or self.budget is not None:
            raise ValueError(
                f"nested {self.format} has 8 bits everywhere: leave out --eight-bit and --budget"
            )

    @property
    def fmt(self) -> Format:
        """The record of ``format``."""
        return FORMATS[self.format]

    @property
    def quantize_inputs(self) -> bool:
        return self.scheme == "w4a4"

    @property
    def static_inputs(self) -> bool:
        """Whether inputs are quantized with one calibrated global scale."""
        return self.quantize_inputs and self.input_scale == "static" and self.fmt.has_global_scale

    @property
    def levers(self) -> str:
        """In words, what is done for accuracy beyond rounding to nearest with scales by absmax."""
        parts = ["round to nearest" if self.algorithm == "rtn" else self.algorithm.upper()]
        parts.append(f"scales by {self.scales}")
        if self.descent:
            parts.append(f"{self.descent} sweeps of descent")
        if self.fisher:
            parts.append(f"outputs weighed by gradients of {self.fisher} windows")
        if self.nested:
            parts.append(f"{narrower(self.fmt, self.nested).name} nested in it")
        if self.balance:
            powers = " in powers of two" if self.balance_factors == "power_of_two" else ""
            parts.append(f"balance {self.balance:g}{powers}")
        if self.rotation != 1:
            size = "chosen by loss" if self.rotation == "auto" else f"{self.rotation}"
            parts.append(f"Hadamard {size}")
        if self.eight_bit:
            parts.append(f"8 bits for {self.eight_bit:g} of the weights, chosen by loss")
        if self.budget is not None:
            parts.append(f"{self.budget:g} bits per weight, more of them chosen by loss")
        if self.kv_cache is not None:
            parts.append(f"keys and values in {self.kv_cache}")
        if self.tune:
            parts.append(f"{self.tune} steps of tuning{TUNED_BY[self.tune_codes]}")
        return ", ".join(parts)

    @property
    def measures(self) -> bool:
        """Whether second moments of the inputs are needed: round to nearest by itself does without
        them."""
        return (
            self.algorithm not in BLIND
            or self.weighted
            or self.descent > 0
            or self.balance > 0
            or self.rotation == "auto"
        )

    def rule_of_inputs(self, rotation: int) -> str:
        """The scale rule of inputs that are rotated in blocks of so many."""
        return self.input_rule or best_rule(self.fmt, rotation)

    def stored_input_rule(self, rotation: int) -> str:
        """The same as checkpoints say it: ``"default"`` is the format's own, and that of inputs
        which are not quantized."""
        rule = self.rule_of_inputs(rotation)
        own = not self.quantize_inputs or rule == default_rule(self.fmt)
        return "default" if own else rule

    @property
    def in_loop(self) -> str | None:
        """How scales are chosen inside the sweep, or None when they are chosen before it."""
        return IN_LOOP.get(self.scales)

    def rotations(self, features: int) -> list[int]:
        """The block sizes to choose from for a layer with so many inputs.

        Raises:
            ValueError: a fixed rotation does not divide the inputs.
        """
        if self.rotation != "auto":
            Rotation(int(self.rotation)).check(features)
            return [int(self.rotation)]
        sizes = sorted({1, self.fmt.group_size or 1, 128})
        return [size for size in sizes if features % size == 0]

    def for_module(self, *names: str) -> "Recipe | None":
        """The recipe of the module that has these names (one in the model, perhaps another in its
        checkpoints), or None if it stays as it is."""
        if any(matches(pattern, *names) for pattern in self.ignore):
            return None
        for pattern, change in self.rules:
            if matches(pattern, *names):
                return self._apply(pattern, change)
        return self

    def _apply(self, pattern: str, change: Mapping[str, Any] | str) -> "Recipe | None":
        if change == "skip":
            return None
        if isinstance(change, str):
            return self.in_format(change)
        if unknown := sorted(change.keys() - set(PER_MODULE)):
            raise ValueError(
                f"rule for {pattern!r}: {', '.join(unknown)} cannot differ by module; "
                f"{', '.join(PER_MODULE)} can"
            )
        fisher = self.fisher if change.get("algorithm", "gptq") in SWEEPING else 0
        try:
            return replace(self, ignore=(), rules=(), fisher=fisher, **change)
        except ValueError as error:
            raise ValueError(f"rule for {pattern!r}: {error}") from error

    def in_format(self, format: str) -> "Recipe":
        """The best known recipe of another format for single modules, with the run's own data."""
        best = {k: v for k, v in _defaults(format, self.scheme).items() if k in PER_MODULE}
        fisher = self.fisher if _coarse(FORMATS[format]) else 0
        return replace(self, ignore=(), rules=(), **best, input_rule=None, nested=0, fisher=fisher)

    @classmethod
    def default(cls, format: str, **given: Any) -> "Recipe":
        """The best known recipe of a format and scheme, changed by what is given; None counts as
        not given."""
        _choice("format", format, FORMATS)
        given = {k: v for k, v in given.items() if v is not None}
        scheme = given.get("scheme", "w4a16")
        _choice("scheme", scheme, SCHEMES)
        quality = given.get("quality", "default")
        _choice("quality", quality, QUALITIES)
        solved = format
        if nested := given.get("nested"):  # codes are chosen for the narrower format
            solved = narrower(FORMATS[format], nested).name
        best = {**_defaults(solved, scheme), "format": format}
        choices = {**best, **QUALITIES[quality].choices, **given}
        if "fisher" not in given and (nested or not _coarse(FORMATS[format])):
            choices.pop("fisher", None)
        own = CHOICES.get(str(choices["algorithm"]), {})
        choices |= {name: value for name, value in own.items() if name not in given}
        sweeps = choices["algorithm"] in SWEEPING and choices["scales"] not in IN_LOOP
        if sweeps and "scales" in given and "order" not in given:
            choices["order"] = "act"
        return cls.from_dict(choices)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """The recipe written by :meth:`to_dict`.

        Raises:
            ValueError: unknown keys or values.
        """
        choices = checked_choices(values, "the recipe")
        if "format" not in choices:
            raise ValueError(f"the recipe has no format; choose one of {', '.join(FORMATS)}")
        return cls(**choices)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = asdict(self)
        values["ignore"] = list(self.ignore)
        values["rules"] = [
            [pattern, change if isinstance(change, str) else dict(change)]
            for pattern, change in self.rules
        ]
        return values


def _coarse(fmt: Format) -> bool:
    """Whether errors are worth every effort."""
    return fmt.element.bits < 8


def _defaults(format: str, scheme: str) -> dict[str, Any]:
    """The best known recipe (README states the measurements behind it)."""
    _choice("format", format, FORMATS)
    fmt = FORMATS[format]
    scheme = "w4a16" if fmt.weights_only else scheme
    best: dict[str, Any] = {
        "format": format,
        "scheme": scheme,
        "algorithm": "gptq",
        "rotation": fmt.default_rotation,
        "balance": 0.5 if scheme == "w4a4" else 0.25,
    }
    if _coarse(fmt):
        return {**best, "scales": "trial", "order": "group", "descent": 4, "damping": 0.05}
    return {**best, "scales": "absmax", "order": "act"}


def _choice(field: str, value: str, known: Iterable[str]) -> None:
    known = list(known)
    if value not in known:
        raise ValueError(f"unknown {field} {value!r}; choose from {', '.join(known)}")


@lru_cache(maxsize=1024)
def _try_rules(format: str, scales: str | None, input_rule: str | None) -> None:
    """Raise ValueError where a format does not have a rule for the scales of weights or of inputs:
    seen by trying it on a group."""
    fmt, group = FORMATS[format], torch.ones(1, FORMATS[format].size(16))
    if scales is not None:
        Grid(fmt, torch.ones(()), scales).scales(group)
    if input_rule is not None:
        quantize_inputs(group, fmt, Rotation(1), torch.ones(()), input_rule)


def checked_choices(choices: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of a recipe as JSON or TOML has them, as :class:`Recipe` takes them.

    Raises:
        ValueError: a name that is no field, or a value of another type; ``where`` it stands.
    """
    types = {f.name: f.type for f in fields(Recipe)}
    if unknown := sorted(choices.keys() - types.keys()):
        raise ValueError(
            f"{where}: unknown recipe keys {', '.join(unknown)}; known are "
            f"{', '.join(sorted(types))}"
        )
    if isinstance(rules := choices.get("rules"), Mapping):
        choices = {**choices, "rules": list(rules.items())}
    return {
        key: check(value, types[key], f"{where}: {key}")  # pyright: ignore[reportArgumentType]
        for key, value in choices.items()
    }
