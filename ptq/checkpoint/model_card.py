"""The model card (README.md) of a checkpoint: what it is, who runs it and who computes it wrongly,
how to load it."""

from collections.abc import Iterable, Mapping

from ptq.checkpoint.dialect import Dialect
from ptq.checkpoint.dialect_choice import Choice
from ptq.checkpoint.dialects import DIALECTS
from ptq.checkpoint.engines import (
    IMPORT,
    IMPORTED,
    INSTALL,
    PLUGGED,
    TRANSFORMERS,
    VLLM,
    Kind,
    Verdict,
    opened_by,
)
from ptq.checkpoint.quantization_config import JsonDict, LayerInfo
from ptq.checkpoint.tuning_report import TuningReport
from ptq.numerics.activations import default_rule
from ptq.numerics.formats import FORMATS

_KEY_VALUES = {
    None: "16 bit",
    "fp8": "calibrated scales for E4M3: `ptq` computes with them, and vLLM with "
    "`--kv-cache-dtype fp8`; transformers alone leaves keys and values in 16 bit, and says so",
}
TASK = "text-generation"
LICENCE = ("license", "license_name", "license_link")  # what a source says of its own


def model_card(
    choice: Choice,
    layers: Mapping[str, LayerInfo],
    total_bytes: int,
    recipe: JsonDict,
    provenance: JsonDict,
    name: str,
    tuned: TuningReport | None = None,
) -> str:
    """Markdown with the front matter of the hub; depends on nothing but its arguments."""
    dialect = DIALECTS[choice.dialect]
    formats = sorted({info.format for info in layers.values()})
    bits = ", ".join(f"{FORMATS[f].bits_per_weight:g} bits a weight in {f}" for f in formats)
    rotations = sorted({info.rotation for info in layers.values()} - {1})
    rules = sorted(
        default_rule(FORMATS[info.format]) if info.input_rule == "default" else info.input_rule
        for info in {i for i in layers.values() if i.quantize_inputs}
    )
    source = provenance.get("source") or provenance.get("model")
    rows = [
        ("format", ", ".join(formats)),
        (
            "activations",
            f"quantized to the same format, scaled by {_code(rules)}" if rules else "16 bit",
        ),
        (
            "rotation",
            f"Hadamard blocks of {', '.join(map(str, rotations))} inputs, online"
            if rotations
            else "none",
        ),
        (
            "balance",
            f"strength {recipe['balance']}, folded into the weights"
            if recipe.get("balance")
            else "none",
        ),
        *((("nested", _nested(layers)),) if any(i.nested for i in layers.values()) else ()),
        ("keys and values", _KEY_VALUES[recipe.get("kv_cache")]),
        *([("tuning", str(tuned))] if tuned is not None else []),
        ("dialect", f"{choice.dialect} ({choice.reason})"),
        ("size", f"{total_bytes / 1e9:.3g} GB, {len(layers)} quantized layers, {bits}"),
    ]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [ptq, quantized, " + ", ".join(formats) + "]",
    ]
    lines += [f"base_model: {source}"] if isinstance(source, str) and source.count("/") == 1 else []
    said = {key: provenance.get(key) for key in LICENCE}
    lines += [f"{key}: {value}" for key, value in said.items() if isinstance(value, str)]
    lines += [f"pipeline_tag: {TASK}"]
    lines += [
        "---",
        "",
        f"# {name}",
        "",
        "```",
        f"pip install {' '.join(_packages(dialect, layers))}",
        "```",
        "",
        "```python",
        *_loading(dialect, layers),
        "```",
        "",
    ]
    lines += [
        f"Quantized by ptq from `{source}`." if source else "Quantized by ptq.",
        "",
    ]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows), ""]
    lines += [
        "## What runs it",
        "",
        "- **ptq** (`ptq.load`): right.",
        *(f"- {line}" for line in _engines(dialect, layers)),
        *(f"- {line}" for line in dialect.caveats(layers)),
        "",
        "## Recipe",
        "",
    ]
    lines += [
        "| | |",
        "|---|---|",
        *(f"| {key} | `{value}` |" for key, value in recipe.items()),
        "",
    ]
    before = ", as they were before tuning" if tuned is not None and tuned.kept else ""
    lines += [f"Errors of every layer are in `ptq_report.json`{before}.", ""]
    return "\n".join(lines)


def _nested(layers: Mapping[str, LayerInfo]) -> str:
    widths = sorted({info.nested for info in layers.values() if info.nested})
    return "; ".join(
        f"the upper {bits} bits of a code are one of {bits} bits: `ptq.load(path, bits={bits})`"
        for bits in widths
    )


def _engines(dialect: Dialect, layers: Mapping[str, LayerInfo]) -> list[str]:
    """A line for each engine: what it makes of the checkpoint, and who says so (C2)."""
    kind = Kind.of(dialect.name, layers)
    lines = []
    for engine, opening in dialect.opens(layers).items():
        way = _WAYS.get(opening.verdict, engine)
        versions = opened_by(way, kind)
        evidence = f"tested with {versions}" if versions else "read in its source, not run"
        if engine == VLLM and way == VLLM and (plugged := opened_by(PLUGGED, kind)):
            evidence += f"; after `{INSTALL}` tested on a CPU with {plugged}"
        wrong = opening.verdict is Verdict.WRONG
        verdict = f"**{opening.verdict.value}, do not use it**" if wrong else opening.verdict.value
        note = f"; {opening.note}" if opening.note and opening.verdict.serves else ""
        lines.append(f"**{engine}**: {verdict}{note} ({evidence}).")
    return lines


# How an engine was opened where more than itself is needed.
_WAYS = {Verdict.IMPORT: IMPORTED, Verdict.INSTALL: PLUGGED}


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in dict.fromkeys(names))


def _opens(dialect: Dialect, layers: Mapping[str, LayerInfo]) -> bool:
    """Whether transformers reads it, if only after an import."""
    return dialect.opens(layers)[TRANSFORMERS].verdict.serves


def _packages(dialect: Dialect, layers: Mapping[str, LayerInfo]) -> list[str]:
    """What has to be installed for :func:`_loading`."""
    ours = dialect.why_import(layers) is not None or not _opens(dialect, layers)
    needed = [name.replace("_", "-") for name in dialect.needs]
    return ["transformers", *needed, *(["ptq-llm"] if ours else [])]


def _loading(dialect: Dialect, layers: Mapping[str, LayerInfo]) -> list[str]:
    """Python that loads the model."""
    if not _opens(dialect, layers):
        return ["import ptq", 'model = ptq.load("path/to/this/directory")']
    why = dialect.why_import(layers)
    return [
        *([f"{IMPORT}  # {why}"] if why else []),
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")',
    ]
