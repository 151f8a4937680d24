"""Recipe: every choice that changes the numbers in a checkpoint, and nothing else.

A recipe is stored verbatim in the checkpoint. Rules for single modules are part of it: the first
rule whose pattern matches a module's name replaces some of its fields for that module, or leaves
the module unquantized.
"""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ptq.numerics.algorithms import ALGORITHMS
from ptq.numerics.formats import FORMATS, Format
from ptq.numerics.rotation import Rotation
from ptq.numerics.scales import RULES

SCHEMES = ("w4a16", "w4a4")
# Scale choices beyond the rules of ptq.numerics.scales: made inside the GPTQ sweep, from the
# compensated weights.
IN_LOOP = {"in_loop_mse": "mse", "trial": "trial"}
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
)


def matches(pattern: str, *names: str) -> bool:
    """Whether a pattern selects a module that has these names: ``re:`` and a regular expression
    matched from the start, a shell-style wildcard pattern, or a name; a pattern without wildcard
    also selects by the last parts of the name (``down_proj``, ``mlp.gate``)."""
    if pattern.startswith("re:"):
        return any(re.match(pattern[3:], name) for name in names)
    tail = f"*.{pattern}"
    return any(fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, tail) for n in names)


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
        scheme: ``w4a16`` quantizes weights; ``w4a4`` quantizes activations too, dynamically and to
            the same format.
        algorithm: ``rtn`` or ``gptq``.
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
        input_rule: scale rule of activations; None is the format's default.
        balance: strength of diagonal balancing, 0 (none) … 1 (all inputs of a layer equally large),
            where it folds into what produces the inputs (:mod:`ptq.calib.balance`).
        ignore: patterns of modules that stay as they are.
        rules: ``(pattern, {field: value})`` or ``(pattern, "skip")``, the first match wins. Routers
            and gates of shared experts stay as they are unless a rule selects them and nothing
            else.
        lm_head: quantize the output head too.
        route_all_experts: calibrate experts with all tokens, not only with those that the router
            sends to them.
        calibration, field, samples, seq_len, batch_size, seed: the calibration data; batch_size
        changes the order of summation.
    """

    format: str
    scheme: str = "w4a16"
    algorithm: str = "gptq"
    rotation: int | str = 1
    scales: str = "mse"
    weighted: bool = False
    order: str = "act"
    damping: float = 0.01
    descent: int = 0
    global_scale: str = "absmax"
    input_scale: str = "static"
    input_rule: str | None = None
    balance: float = 0.0
    ignore: tuple[str, ...] = ()
    rules: tuple[tuple[str, Mapping[str, Any] | str], ...] = ()
    lm_head: bool = False
    route_all_experts: bool = False
    calibration: str = "builtin"
    field: str | None = None
    samples: int = 128
    seq_len: int = 2048
    batch_size: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        _choice("format", self.format, FORMATS)
        _choice("scheme", self.scheme, SCHEMES)
        _choice("algorithm", self.algorithm, ALGORITHMS)
        _choice("scales", self.scales, (*RULES, *IN_LOOP))
        _choice("order", self.order, ("natural", "act", "group"))
        _choice("global_scale", self.global_scale, ("absmax", "alternating"))
        _choice("input_scale", self.input_scale, ("static", "token"))
        if self.rotation != "auto":
            if not isinstance(self.rotation, int):
                raise ValueError(
                    f"unknown rotation {self.rotation!r}; give none, a power of two, or auto"
                )
            Rotation(self.rotation)
        if self.scales in IN_LOOP and self.algorithm != "gptq":
            raise ValueError(
                f"scales {self.scales!r} are chosen inside the GPTQ sweep; use --algorithm gptq, "
                "or --scales mse"
            )
        if self.scales in IN_LOOP and self.order == "act":
            raise ValueError(
                f"scales {self.scales!r} need the columns of a group together; use order group or "
                "natural, not act"
            )
        _positive("damping", self.damping)
        if not isinstance(self.balance, int | float) or not 0 <= self.balance <= 1:
            raise ValueError(f"balance must be from 0 (none) to 1, got {self.balance!r}")
        for name in ("samples", "seq_len", "batch_size"):
            _positive(name, getattr(self, name))
        for pattern, change in self.rules:
            self._apply(pattern, change)

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
        return [size for size in (1, self.fmt.group_size, 128) if features % size == 0]

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
        if isinstance(
            change, str
        ):  # a format alone: the best known recipe of that format, the run's own data
            change = {k: v for k, v in _defaults(change, self.scheme).items() if k in PER_MODULE}
        if unknown := sorted(change.keys() - set(PER_MODULE)):
            raise ValueError(
                f"rule for {pattern!r}: {', '.join(unknown)} cannot differ by module; "
                f"{', '.join(PER_MODULE)} can"
            )
        return replace(self, ignore=(), rules=(), **change)

    @classmethod
    def default(cls, format: str, **given: Any) -> "Recipe":
        """The best known recipe of a format and scheme, changed by what is given; None counts as
        not given."""
        _choice("format", format, FORMATS)
        given = {k: v for k, v in given.items() if v is not None}
        scheme = given.get("scheme", "w4a16")
        _choice("scheme", scheme, SCHEMES)
        choices = {**_defaults(format, scheme), **given}
        if (
            choices["algorithm"] == "rtn"
        ):  # what belongs to the sweep has no meaning for round to nearest
            for name, value in (("scales", "mse"), ("descent", 0), ("balance", 0.0)):
                if name not in given:
                    choices[name] = value
        elif choices["scales"] not in IN_LOOP and "scales" in given and "order" not in given:
            choices["order"] = "act"
        return cls.from_dict(choices)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """The recipe written by :meth:`to_dict`.

        Raises:
            ValueError: unknown keys or values.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(
                f"unknown recipe keys {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )
        changed = dict(values)
        if "ignore" in changed:
            changed["ignore"] = tuple(changed["ignore"])
        if "rules" in changed:
            rules = changed["rules"]
            changed["rules"] = tuple(
                (p, c) for p, c in (rules.items() if isinstance(rules, Mapping) else rules)
            )
        return cls(**changed)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = asdict(self)
        values["ignore"] = list(self.ignore)
        values["rules"] = [
            [pattern, change if isinstance(change, str) else dict(change)]
            for pattern, change in self.rules
        ]
        return values


def _defaults(format: str, scheme: str) -> dict[str, Any]:
    """The best known recipe (README states the measurements behind it)."""
    _choice("format", format, FORMATS)
    fmt = FORMATS[format]
    best: dict[str, Any] = {
        "format": format,
        "scheme": scheme,
        "algorithm": "gptq",
        "rotation": fmt.default_rotation,
        "balance": 0.5 if scheme == "w4a4" else 0.25,
    }
    if fmt.element.bits < 8:
        return {**best, "scales": "trial", "order": "group", "descent": 4, "damping": 0.05}
    return {**best, "scales": "absmax", "order": "act"}


def _choice(field: str, value: str, known: Iterable[str]) -> None:
    known = list(known)
    if value not in known:
        raise ValueError(f"unknown {field} {value!r}; choose from {', '.join(known)}")


def _positive(field: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{field} must be positive, got {value}")
