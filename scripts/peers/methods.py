"""Who is compared: tools, what each of them is asked to do, and in which order runs go.

A tool runs in an environment of its own, `.peers/NAME`, by its driver beside this file; ptq runs as
its users run it, by `ptq quantize`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from ptq.numerics.formats import FORMATS

FORMAT_NAMES, SCHEMES = ("nvfp4", "mxfp4"), ("w4a4", "w4a16")
EVERYWHERE = tuple(product(FORMAT_NAMES, SCHEMES))
# Rounding to nearest reads text only for the static scale of inputs.
BLIND = frozenset(set(EVERYWHERE) - {("nvfp4", "w4a4")})


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way of a tool.

    Attributes:
        tool, name: as tables say them.
        key: what its driver knows it by.
        late: runs after all others; for those that take much longer.
        offers: (format, scheme) pairs that it can write without a GPU.
        blind: those of them for which it reads no text, so that seeds make no difference.
        choices: fields of ptq's recipe, for ptq alone.
        dialect: in which ptq writes it.
        own_text: it decides itself how much text it reads (ptq's presets), and only its seed is
            given.
        note: what a reader of the table should know.
    """

    tool: str
    name: str
    key: str
    late: bool = False
    offers: tuple[tuple[str, str], ...] = EVERYWHERE
    blind: frozenset[tuple[str, str]] = frozenset()
    choices: Mapping[str, Any] = field(default_factory=dict)
    dialect: str = "auto"
    own_text: bool = False
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A program that quantizes.

    Attributes:
        driver: the file beside this one that runs it; empty for ptq.
        packages: whose versions are noted, the tool's own first.
    """

    name: str
    driver: str
    packages: tuple[str, ...]


TOOLS = {
    tool.name: tool
    for tool in (
        Tool(name="ptq", driver="", packages=("ptq-llm", "torch", "transformers")),
        Tool(
            name="llm-compressor",
            driver="with_llm_compressor.py",
            packages=("llmcompressor", "compressed-tensors", "torch", "transformers"),
        ),
        Tool(
            name="modelopt",
            driver="with_modelopt.py",
            packages=("nvidia-modelopt", "torch", "transformers"),
        ),
        Tool(
            name="auto-round",
            driver="with_auto_round.py",
            packages=("auto-round", "compressed-tensors", "torch", "transformers"),
        ),
    )
}
QUANTIZED_INPUTS = tuple((fmt, "w4a4") for fmt in FORMAT_NAMES)
NEAREST = "round to nearest"
# The recipe of the MR-GPTQ paper; its rotation, the size of a group, is the format's.
PAPER = {
    "algorithm": "gptq",
    "scales": "mse",
    "order": "act",
    "damping": 0.01,
    "descent": 0,
    "balance": 0.0,
}
# As near as ptq comes to the rounding of the others: NVFP4 by the largest magnitude, MXFP4 by a
# threshold of 7.25 where llm-compressor has 7.
PLAIN_SCALES = {"nvfp4": "absmax", "mxfp4": "theta"}

METHODS: tuple[Method, ...] = (
    Method(tool="ptq", name="default", key="default"),
    Method(tool="llm-compressor", name="GPTQ", key="gptq"),
    Method(
        tool="llm-compressor",
        name="GPTQ + Hadamard 32",
        key="gptq-hadamard",
        offers=(("mxfp4", "w4a4"), ("mxfp4", "w4a16"), ("nvfp4", "w4a4")),
    ),
    Method(tool="ptq", name=NEAREST, key="rtn", blind=BLIND),
    Method(tool="llm-compressor", name=NEAREST, key="rtn", blind=BLIND),
    Method(
        tool="modelopt",
        name=NEAREST,
        key="max",
        offers=(("nvfp4", "w4a4"), ("mxfp4", "w4a4"), ("nvfp4", "w4a16")),
        blind=BLIND,
    ),
    Method(
        tool="ptq",
        name="default, --dialect ptq",
        key="four-six",
        offers=(("nvfp4", "w4a4"),),
        dialect="ptq",
        note="inputs take the better of two scales, which no other engine computes",
    ),
    Method(
        tool="ptq",
        name="default, --eight-bit 10%",
        key="eight-bit",
        choices={"eight_bit": 0.1},
        note="10 % of the weights are in MXFP8, chosen by measured loss",
    ),
    Method(tool="ptq", name="the MR-GPTQ paper's recipe", key="paper", choices=PAPER),
    Method(
        tool="ptq",
        name="--quality fast",
        key="fast",
        choices={"quality": "fast"},
        blind=BLIND,
        own_text=True,
        note="reads text only for static scales of inputs, and less of it: 8 windows",
    ),
    Method(
        tool="modelopt",
        name="MSE-searched scales",
        key="mse",
        offers=(("nvfp4", "w4a4"),),
        note="its kernel needs a GPU: a stand-in of the same arithmetic ran",
    ),
    Method(
        tool="auto-round",
        name="0 steps",
        key="0",
        late=True,
        offers=QUANTIZED_INPUTS,
        note="its round to nearest, scales searched by the size of inputs",
    ),
    Method(
        tool="auto-round",
        name="50 steps",
        key="50",
        late=True,
        offers=QUANTIZED_INPUTS,
        note="the steps of its preset `light`; its default of 200 takes four times as long",
    ),
    Method(
        tool="ptq",
        name="--quality best",
        key="best",
        late=True,
        choices={"quality": "best"},
        own_text=True,
        note="reads twice the text, and gradients of 32 windows",
    ),
)


@dataclass(frozen=True)
class Run:
    """One row to measure."""

    method: Method
    format: str
    scheme: str
    seed: int

    @property
    def key(self) -> str:
        """Of its row and of its folder."""
        parts = (self.method.tool, self.method.key, self.format, self.scheme, str(self.seed))
        return "-".join(parts)


def runs(
    tools: Sequence[str], formats: Sequence[str], schemes: Sequence[str], seeds: Sequence[int]
) -> Iterator[Run]:
    """All that is asked for and offered, the most telling first: one seed before others, quick
    methods before slow ones, then by scheme, format and method.

    Raises:
        ValueError: an unknown name.
    """
    for what, given, known in (
        ("tool", tools, tuple(TOOLS)),
        ("format", formats, FORMAT_NAMES),
        ("scheme", schemes, SCHEMES),
    ):
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"unknown {what} {unknown[0]!r}; choose from {', '.join(known)}")
    for seed, late, scheme, fmt in product(seeds, (False, True), schemes, formats):
        for method in METHODS:
            wanted = method.tool in tools and method.late == late
            again = seed != seeds[0] and (fmt, scheme) in method.blind
            if wanted and (fmt, scheme) in method.offers and not again:
                yield Run(method, fmt, scheme, seed)


def recipe(run: Run, calibration: str, samples: int, seq_len: int) -> dict[str, Any]:
    """The choices of a run of ptq, as `ptq quantize --recipe` reads them."""
    said: dict[str, Any] = {
        "format": run.format,
        "scheme": run.scheme,
        "calibration": calibration,
        "seed": run.seed,
        **run.method.choices,
    }
    if not run.method.own_text:
        said |= {"samples": samples, "seq_len": seq_len}
    if run.method.key == "rtn":
        said |= {"algorithm": "rtn", "rotation": 1, "scales": PLAIN_SCALES[run.format]}
    if run.method.key == "paper":
        said["rotation"] = FORMATS[run.format].group_size
    return said


def last_line(output: str) -> str:
    """What a program that failed said last, in one line without folders of this machine."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|error)\b", line)), "")
    return re.sub(r"/\S*/", "", said or (lines[-1] if lines else "it said nothing"))[:300]
