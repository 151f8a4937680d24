"""What was measured as rows, and as a page.

The file has ``settings`` (model, calibration, texts, machine), ``windows`` (the sha256 of the
calibration windows of each seed), ``runs`` (a record for each tool, method, format, scheme and
seed) and ``absent`` (tools that could not be installed). Everything here is derived from it.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

Data = Mapping[str, Any]
BEST = ("ptq", "default")
BUNDLED = ", the small one that comes with ptq: it shows damage, and predicts no large model's"
WITH = {"w4a4": "weights and inputs in 4 bits", "w4a16": "weights alone in 4 bits"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method in a format and scheme, its seeds together.

    Attributes:
        kl, error, range, perplexity: by the name of the text. A mean over seeds; of one seed the
            standard error over windows, else the smallest and the largest of all seeds.
        cpu_seconds: a mean over seeds; peak_gb and megabytes the largest; None where memory
            was not measured.
    """

    tool: str
    version: str
    method: str
    note: str
    seeds: tuple[int, ...]
    kl: Mapping[str, float]
    error: Mapping[str, float | None]
    range: Mapping[str, tuple[float, float] | None]
    perplexity: Mapping[str, float]
    cpu_seconds: float
    peak_gb: float | None
    megabytes: float

    @property
    def ours(self) -> bool:
        return self.tool == "ptq"

    @property
    def best(self) -> bool:
        """Whether it is what ptq does unless told otherwise."""
        return (self.tool, self.method) == BEST

    @property
    def name(self) -> str:
        return f"{self.tool} {self.version}: {self.method}"


def text_names(data: Data) -> list[str]:
    return [text["name"] for text in data["settings"]["texts"]]


def rows(data: Data, fmt: str, scheme: str) -> list[Row]:
    """The finished runs of a format and scheme, by falling KL on the first text."""
    together: dict[tuple[str, str], list[Data]] = {}
    for run in data["runs"]:
        if (run["format"], run["scheme"]) == (fmt, scheme) and "error" not in run:
            together.setdefault((run["tool"], run["method"]), []).append(run)
    found = [_row(runs, text_names(data)) for runs in together.values()]
    first = text_names(data)[0]
    return sorted(found, key=lambda row: -row.kl[first])


def _row(runs: Sequence[Data], texts: Sequence[str]) -> Row:
    first, several = runs[0], len(runs) > 1
    kl = {text: [run["texts"][text]["kl"] for run in runs] for text in texts}
    return Row(
        tool=first["tool"],
        version=first["version"],
        method=first["method"],
        note=first["note"],
        seeds=tuple(run["seed"] for run in runs),
        kl={text: fmean(values) for text, values in kl.items()},
        error={text: first["texts"][text]["kl_error"] for text in texts},
        range={
            text: (min(values), max(values)) if several else None for text, values in kl.items()
        },
        perplexity={
            text: fmean(run["texts"][text]["perplexity"] for run in runs) for text in texts
        },
        cpu_seconds=fmean(run["cpu_seconds"] for run in runs),
        peak_gb=max((run["peak_gb"] for run in runs if run["peak_gb"]), default=None),
        megabytes=max(run["megabytes"] for run in runs),
    )


def number(value: float) -> str:
    """Three digits, as far as they mean something."""
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}"


def _kl(row: Row, text: str) -> str:
    value, between, error = number(row.kl[text]), row.range[text], row.error[text]
    if between is not None:
        value += f" ({number(between[0])} … {number(between[1])})"
    elif error is not None:
        value += f" ± {number(error)}"
    return f"**{value}**" if row.best else value


def page(data: Data, stem: str) -> str:
    """The whole page; ``stem`` is the name of the results beside it, and of their pictures."""
    settings = data["settings"]
    texts = settings["texts"]
    threads = settings["threads"]
    lines = ["# Beside other tools", ""]
    lines += _wrapped(
        "Written by `scripts/compare_peers`, which makes an environment for each tool, runs all of "
        "them on the same windows of tokens, and scores what they wrote by one scorer that decodes "
        f"the files itself; the numbers are in [{stem}.json]({stem}.json)."
    )
    lines += [
        "",
        "<picture>",
        f'  <source media="(prefers-color-scheme: dark)" srcset="{stem}-dark.svg">',
        f'  <img alt="KL to the original at W4A4 by tool and method" src="{stem}-light.svg">',
        "</picture>",
        "",
    ]
    for bullet in (
        f"- **Model** `{settings['model']}`{BUNDLED * (settings['model'] == 'demo')}.",
        f"- **Calibration** {settings['samples']} windows of {settings['seq_len']} tokens of "
        f"`{settings['calibration']}`, cut once for each seed and handed to every tool as token "
        "ids, in the same order.",
        "- **KL** of the original and the quantized model over the full vocabulary, nats per "
        f"token, on held-out text: {'; '.join(map(_about, texts))}. ± is the standard error of the "
        "mean over windows; all tools are scored on the same ones, so that the order of two of "
        "them is surer than that. Where several seeds ran: the mean, the least and the largest.",
        "- **Inputs** (W4A4) are quantized as an engine of the checkpoint's dialect would, all "
        "else is float32.",
        "- **CPU** seconds of the whole program, user and system, and its largest memory; "
        f"{threads} thread{'s' if threads != 1 else ''}.",
        f"- **Machine** {settings['machine']}; {_dates(data)}.",
    ):
        lines += _wrapped(bullet)
    lines.append("")
    for scheme in ("w4a4", "w4a16"):
        for fmt in ("nvfp4", "mxfp4"):
            if found := rows(data, fmt, scheme):
                lines += _table(found, texts, f"{fmt.upper()}, {scheme.upper()}: {WITH[scheme]}")
    lines += _last(data)
    return "\n".join(lines).rstrip() + "\n"


def _wrapped(words: str) -> list[str]:
    hanging = "  " if words.startswith("- ") else ""
    return textwrap.wrap(words, 130, subsequent_indent=hanging, break_on_hyphens=False)


def _about(text: Mapping[str, Any]) -> str:
    return (
        f"`{text['name']}`, {text['predictions']} predictions, on which the original has "
        f"perplexity {text['perplexity']:.2f}"
    )


def _dates(data: Data) -> str:
    days = sorted({run["date"] for run in data["runs"]})
    return "no run yet" if not days else " to ".join(dict.fromkeys((days[0], days[-1])))


def _table(found: Sequence[Row], texts: Sequence[Mapping[str, Any]], title: str) -> list[str]:
    names = [text["name"] for text in texts]
    heads = ["tool and method", *(f"KL {name}" for name in names)]
    heads += [*(f"perplexity {name}" for name in names), "CPU s", "peak GB", "file MB"]
    lines = [f"## {title}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    notes: dict[str, int] = {}
    for row in found:
        mark = f" [{notes.setdefault(row.note, len(notes) + 1)}]" if row.note else ""
        name = f"**{row.name}**" if row.best else row.name
        seeds = f", {len(row.seeds)} seeds" if len(row.seeds) > 1 else ""
        cells = [f"{name}{mark}{seeds}", *(_kl(row, text) for text in names)]
        cells += [f"{row.perplexity[text]:.2f}" for text in names]
        peak = "–" if row.peak_gb is None else f"{row.peak_gb:.2f}"
        cells += [f"{row.cpu_seconds:.0f}", peak, f"{row.megabytes:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *(f"{i}. {note}" for note, i in notes.items()), *([""] if notes else [])]


def _last(data: Data) -> list[str]:
    """What did not run, and why."""
    lines = []
    failed: dict[str, list[str]] = {}
    for run in data["runs"]:
        if "error" in run:
            what = f"{run['method']} at {run['format'].upper()} {run['scheme'].upper()}"
            failed.setdefault(f"{run['tool']} {run['version']}: {run['error']}", []).append(what)
    if failed or data["absent"]:
        lines = ["## What did not run", ""]
        lines += [f"- {reason} ({'; '.join(dict.fromkeys(w))})" for reason, w in failed.items()]
        lines += [f"- {name} is not installed" for name in data["absent"]]
    if checks := data.get("checks"):
        lines += [*([""] if lines else []), "## The scorer, checked", ""]
        lines += _wrapped(
            f"Checkpoints of llm-compressor as {checks[0]['by']} computes them, in bfloat16, "
            "beside the scorer: KL to the original on the first "
            f"{checks[0]['predictions']} predictions of `{checks[0]['text']}`. How far both are "
            "apart in bfloat16 compares with what bfloat16 itself does to the scorer: rounding "
            "inputs to 4 bits makes a great deal of a last bit."
        )
        heads = ("", "transformers", "scorer, bfloat16", "scorer", "apart", "bfloat16 alone")
        lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for c in checks:
            figures = (c[name] for name in ("theirs", "ours_16", "ours", "apart", "rounding"))
            lines.append(f"| {c['of']} | {' | '.join(f'{value:.3g}' for value in figures)} |")
    return lines
