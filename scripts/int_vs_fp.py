"""Write docs/int-vs-fp.md: every number of "INT v.s. FP" that can be recomputed, and whether it is
the same.

python scripts/int_vs_fp.py            # rewrite
python scripts/int_vs_fp.py --check    # exit 1 if the document is out of date

Nothing is random: integrals, enumerations of number formats, recounts of published cells, and
direct casts that were measured and are kept in direct_casts.json:

python scripts/int_vs_fp.py --cast MODEL TEXT TOKENS NAME      # measure one, and keep it
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy import special

from ptq.numerics.formats import INT8, MICROSCALED, Format
from ptq.numerics.hardware_cost import (
    PUBLISHED,
    TENSOR_CORES,
    gates,
    mac,
    relative_area,
    relative_traffic,
)
from ptq.numerics.int_vs_fp import (
    CEIL_OVERHEAD_SQUARED,
    PAIRS,
    corrected_qsnr,
    crossing,
    crossover,
    gaussian_crest,
    gaussian_qsnr,
    integrated_qsnr,
    printed_qsnr,
)
from ptq.pipeline.cast_results import PAPER_MODELS, PAPER_WINS, DirectCast, versus
from ptq.pipeline.direct_cast import CastOptions, direct_cast
from ptq.reading.schema import plain, read_json
from ptq.runtime.loaded_model import resolve_model

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "int-vs-fp.md"
CASTS = Path(__file__).resolve().parent / "direct_casts.json"
WHY = (
    "SmolLM2, the largest of these, agrees with the study in all eight rows, and nearly in "
    "size: NVINT4 over NVFP4 is 1.34 as they are and 0.62 rotated (study: 1.36, 0.65), and "
    "rotation makes NVFP4 1.49 times as bad (1.56). The two smaller models differ in one row: "
    "NVINT4 as it is wins. The third model says why: it computes the same as the first, but one "
    "input channel in 64 of q/k/v, gate/up and down is 16 times as large, and its column of "
    "weights 16 times smaller (exact in floating point). With such outliers NVFP4 wins every "
    "window as it is, and rotation costs it 2.3 times the KL. What decides is the crest factor "
    "of inputs: the QSNR of NVFP4 rises with it up to 3.25, that of NVINT4 falls (above). Other "
    "differences of method: windows of 512 tokens where the study takes 4096; Hadamard matrices "
    "without random signs; a factor of NVINT4 that is a power of two (0.02 dB); NVFP4's factor "
    "by tensor, and of inputs by window."
)
# Tables 12 and 13 of the paper, KL · 10⁶ as printed: Qwen3 0.6B, 1.7B, 4B, 8B, 14B-Base, 32B,
# 30B-A3B-2507, 235B-A22B-2507, Llama 3.2-1B, 3.2-3B, 3.1-8B, 3.1-70B; R_ with rotation.
KL = """
MXINT8 191 209 112 168 96 118 160 276 111 77 82 191
MXFP8 579 406 346 362 300 457 380 483 464 325 359 514
MXINT6 1944 2464 928 1104 804 1012 768 1333 1133 743 776 1744
MXFP6 1030 874 539 592 467 627 606 1099 651 457 491 1436
MXINT4 39936 30208 17408 15552 34304 27392 13248 16331 26153 14089 12380 22538
MXFP4 17602 14614 8568 8228 8119 10302 6194 16238 14446 8251 7586 21372
NVINT4 10560 8320 4864 5120 5568 7968 3120 9702 7508 4312 4224 10970
NVFP4 8104 4995 3844 3430 2835 3778 2443 9238 5691 3684 3718 10544
R_MXINT8 137 150 80 130 70 88 135 229 89 63 65 145
R_MXFP8 921 1321 468 577 393 497 391 707 573 388 409 1393
R_MXINT6 1137 1274 547 690 481 615 444 809 773 531 558 1518
R_MXFP6 1007 1446 497 618 454 558 422 740 643 447 457 1476
R_MXINT4 26488 26578 10498 12241 8459 9510 6080 9660 20126 11116 10272 137612
R_MXFP4 17995 20443 7260 8562 6410 6536 5087 7058 11967 8269 7189 129471
R_NVINT4 7771 7236 3431 4026 3070 3647 2222 3931 5854 3912 3609 19975
R_NVFP4 12031 10582 5065 5912 4214 4662 3200 5786 8129 5240 4752 77363
"""
# Tables 14 and 15: perplexity on WikiText2, the 6-bit rows left out.
PERPLEXITY = """
BF16 11.5868 8.7084 7.3368 6.5135 5.9498 7.0168 6.8178 4.0929 9.0625 7.2857 5.8402 2.637
MXINT8 11.6377 8.7424 7.3511 6.5174 5.955 7.0185 6.8167 4.0959 9.0815 7.2944 5.8487 2.6674
MXFP8 11.7494 8.7822 7.3813 6.5444 5.9711 7.0357 6.8335 4.1101 9.1695 7.3381 5.895 2.6674
MXINT4 48.6713 21.8749 11.9487 10.0423 16.7227 15.1619 9.3837 5.918 21.9893 11.2715 8.7408 5.1894
MXFP4 20.4522 24.0766 9.1553 8.0135 7.2471 8.2047 7.8203 5.9007 14.0516 9.2355 6.4845 4.9492
NVINT4 15.9729 10.9128 8.3304 7.415 6.81 8.0161 7.2024 4.8916 11.3987 8.225 6.5957 3.5502
NVFP4 14.6818 9.9966 8.0144 7.0285 6.3129 7.3604 7.1874 4.8309 10.7473 8.0343 6.4917 3.492
R_MXINT4 28.6510 21.3032 9.8238 9.2029 7.3564 8.2083 7.8292 4.9891 17.9797 10.3057 8.0745 1146.7256
R_MXFP4 20.3684 15.9527 8.8148 8.1113 6.9521 7.7401 7.9673 4.7035 13.3987 9.262 7.2318 1118.4431
R_NVINT4 14.6052 10.7822 7.9824 7.1705 6.3702 7.3625 7.1557 4.3913 10.8399 8.1119 6.4701 4.9786
R_NVFP4 16.5762 11.7541 8.2716 7.5084 6.5427 7.4522 7.3214 4.5918 11.7635 8.4693 6.7028 79.7586
"""
WINS = PAPER_WINS  # its Table 3
# Crossovers as printed: κ and the QSNR there.
PRINTED = {
    "mxint8": (7.55, 31.86),
    "mxint6": (1.96, 31.54),
    "mxint4": (2.04, 19.14),
    "nvint4": (2.39, 21.14),
}
# Figure 4: mean QSNR of tensors, (INT, FP), without and with rotation.
FIGURE_4 = {
    "mxint8": ((40.35, 31.50), (41.93, 31.51)),
    "mxint6": ((28.57, 30.39), (30.18, 31.03)),
    "mxint4": ((15.89, 17.98), (17.22, 18.79)),
    "nvint4": ((20.55, 20.60), (21.65, 20.35)),
}
# Table 2, medians with a 32 × 32 rotation, by block size.
CREST_ROTATED = {32: 2.35, 16: 2.10}


@dataclass(frozen=True)
class Row:
    """A number of the paper, what it is by our computation, and how far they may be apart."""

    what: str
    printed: float
    recomputed: float
    tolerance: float
    why: str
    digits: int = 2

    def cells(self) -> str:
        agrees = abs(self.printed - self.recomputed) <= self.tolerance
        shown = (f"{value:.{self.digits}f}" for value in (self.printed, self.recomputed))
        verdict = "agree" if agrees else "**differs**"
        return f"| {self.what} | {' | '.join(shown)} | {verdict} | {self.why} |"


def published(table: str) -> dict[str, list[float]]:
    """Rows of a published table by their name, such as ``R_MXINT8``."""
    rows = (line.split() for line in table.strip().splitlines())
    return {name: [float(cell) for cell in cells] for name, *cells in rows}


def shown(fmt: Format) -> str:
    """A format as the paper writes it."""
    return fmt.name.upper()


def wins(table: dict[str, list[float]], pair: tuple[Format, Format], prefix: str) -> int:
    """On how many models the integers have the smaller number."""
    ints, floats = (table[prefix + shown(fmt)] for fmt in pair)
    return sum(i < f for i, f in zip(ints, floats, strict=True))


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The geometric mean of the quotients."""
    return statistics.geometric_mean(a / b for a, b in zip(above, below, strict=True))


def crossovers() -> list[Row]:
    rows = []
    for pair in PAIRS:
        kappa, decibels = PRINTED[pair[0].name]
        name = f"{shown(pair[0])}/{shown(pair[1])}"
        e4m3 = pair[0].has_global_scale
        limit = math.sqrt(pair[0].group_size)
        # the formulas of E8M0 scales go on where no block does, those of E4M3 end there
        reach = limit if e4m3 else 9.0

        def solve(overhead: float | None, exact: bool, pair=pair, reach=reach) -> float:
            def law(fmt: Format, k: float) -> float:
                return printed_qsnr(fmt, k, overhead=overhead, exact_max=exact)

            found = crossing(lambda k: law(pair[0], k) - law(pair[1], k), 1.1, reach)
            assert found is not None
            return found

        text = solve(None, False)
        why = "the printed formulas, solved"
        if e4m3:
            why += " with ρ = 1 as the text has it"
        rows.append(Row(f"κ, {name}", kappa, text, 0.01, why))
        if e4m3:
            plotted = solve(1.05, False)
            rows.append(Row(f"κ, {name}", kappa, plotted, 0.01, "with ρ = 1.05, as its plots"))
            at = printed_qsnr(pair[1], plotted, overhead=1.05)
            rows.append(Row(f"dB there, {name}", decibels, at, 0.01, "likewise"))
        else:
            at = printed_qsnr(pair[1], text)
            rows.append(Row(f"dB there, {name}", decibels, at, 0.01, "the printed formulas"))
        exact = solve(1.05 if e4m3 else None, True)
        rows.append(
            Row(f"κ, {name}", kappa, exact, 0.01, "with Q = 2^(b-1) - 1: integers lose a step")
        )
        if (blocks := crossover(pair, integrated_qsnr)) is None:
            rows.append(
                Row(f"κ, {name}", kappa, limit, 0.01, "the largest κ of a block, √g: INT wins all")
            )
        else:
            rows.append(Row(f"κ, {name}", kappa, blocks, 0.01, "blocks, by integration"))
    return rows


def constants() -> list[Row]:
    ceiling = printed_qsnr(PAIRS[0][1], 2.0)
    return [
        Row(
            "INT: dB at b = 0", 4.78, 10 * math.log10(12) - 20 * math.log10(2), 0.01,
            "10 log₁₀ 12 - 20 log₁₀ 2",
        ),
        *(
            Row(
                f"INT, {bits} bits: dB by Q", 0.0,
                -20 * math.log10(1 - 0.5 ** (bits - 1)), 0.05,
                "2^(b-1) steps are one more than symmetric integers have",
            )
            for bits in (8, 6, 4)
        ),
        Row(
            "ρ of E8M0 scales", 1.5, math.sqrt(CEIL_OVERHEAD_SQUARED), 0.01,
            "root mean square of a power of two rounded up: √(3 / (2 ln 2))", 3,
        ),
        Row("MXFP8 ceiling, dB: formula", 31.86, ceiling, 0.01, "13.80 + 6.02 M"),
        Row(
            "MXFP8 ceiling, dB: its own Figure 4", 31.51, corrected_qsnr(PAIRS[0][1], 2.0), 0.02,
            "E[1/r²] is 3 / (8 ln 2) and not 1/2: 13.46 + 6.02 M",
        ),
        *(
            Row(
                f"median κ after rotation, g = {size}", kappa, gaussian_crest(size), 0.02,
                "the mean of Gaussian blocks: rotation reaches it, and cannot go below", 3,
            )
            for size, kappa in CREST_ROTATED.items()
        ),
        Row("tensors in Figure 4", 10752, 224 * 6, 0.5, "224 · 6; with eight sequences 10752", 0),
    ]  # fmt: skip


def figure_4() -> list[Row]:
    return [
        Row(
            f"{shown(fmt)}, rotated: dB", FIGURE_4[pair[0].name][1][i], gaussian_qsnr(fmt), 0.15,
            "Gaussian blocks; tensors keep some spread of energy between blocks",
        )
        for pair in PAIRS
        for i, fmt in enumerate(pair)
    ]  # fmt: skip


def recounts() -> list[Row]:
    kl, ppl = published(KL), published(PERPLEXITY)
    rows = []
    for pair in PAIRS:
        for prefix, count in zip(("", "R_"), WINS[pair[0].name], strict=True):
            rotated = ", rotated" if prefix else ""
            what = f"Table 3, {shown(pair[0])} wins of {PAPER_MODELS}{rotated}"
            rows.append(Row(what, count, wins(kl, pair, prefix), 0.5, "recounted by KL", 0))
            if prefix + shown(pair[0]) in ppl:
                by = wins(ppl, pair, prefix)
                rows.append(Row(what, count, by, 0.5, "by perplexity instead", 0))
    own = sum(a < b for a, b in zip(kl["R_NVINT4"], kl["NVFP4"], strict=True))
    rows.append(
        Row(
            f"NVINT4 better than NVFP4, of {PAPER_MODELS}", 12, own, 0.5,
            "each at its own best: NVINT4 rotated, NVFP4 not", 0,
        )
    )  # fmt: skip
    return rows


def hardware() -> list[Row]:
    rows = [
        Row("energy, MXINT8 against MXFP8, %", -37, 100 * (0.63 - 1), 0.5, "from its table", 0),
        Row("energy, NVINT4 against NVFP4, %", -38, 100 * (0.34 / 0.55 - 1), 0.5, "likewise", 0),
        Row("area, 8 + 4 bits together, %", -34, 100 * (0.66 - 1), 0.5, "likewise", 0),
    ]
    for ints, floats in (PAIRS[0], PAIRS[3]):
        alone = [sum(mac(fmt.element, fmt.group_size).values()) for fmt in (ints, floats)]
        paper = PUBLISHED[ints.name].area / PUBLISHED[floats.name].area
        name = f"area, {shown(ints)} over {shown(floats)}"
        whole = relative_area(ints, floats)
        rows.append(Row(name, paper, whole, 0.05, "our cells, with scales and accumulator"))
        rows.append(Row(name, paper, alone[0] / alone[1], 0.05, "our cells, one lane alone"))
    return rows


def units() -> list[str]:
    """Gates of a unit of every format, over those of MXFP8, beside what is published."""
    lines = [
        "| format | gates a product | of those, lane | area | paper: area | paper: energy | "
        "weights to read | Blackwell |",
        "|---" * 8 + "|",
    ]
    for fmt in MICROSCALED.values():
        paper, rate = PUBLISHED.get(fmt.name), TENSOR_CORES.get(fmt.name)
        cells = (
            f"{gates(fmt):.0f}",
            f"{sum(mac(fmt.element, fmt.group_size).values()):.0f}",
            f"{relative_area(fmt):.2f}",
            *(("–", "–") if paper is None else (f"{paper.area:.2f}", f"{paper.energy:.2f}")),
            f"{relative_traffic(fmt):.2f}",
            "–" if rate is None else f"{rate:g} ×",
        )
        lines.append(f"| {shown(fmt)} | {' | '.join(cells)} |")
    return lines


# ---------------------------------------------------------------- direct casts


@dataclass(frozen=True)
class Measured:
    """A direct cast of a model on a text, as it was run."""

    name: str
    text: str
    result: DirectCast


def casts() -> tuple[Measured, ...]:
    """Those that were kept."""
    if not CASTS.exists():
        return ()
    return read_json(CASTS, tuple[Measured, ...], "run scripts/int_vs_fp.py --cast again")


def keep(model: str, text: str, tokens: int, name: str) -> None:
    """Run a direct cast and keep it in place of one of the same name."""
    options = CastOptions(text=text, max_tokens=tokens)
    made = direct_cast(
        resolve_model(model), options, on_step=lambda *step: print(*step, file=sys.stderr)
    )
    about = "built-in" if text == "builtin" else Path(text).name
    made = replace(made, identity={**made.identity, "text": about})
    kept = [plain(old) for old in casts() if old.name != name]
    kept.append(plain(Measured(name, about, made)))
    CASTS.write_text(json.dumps(kept, separators=(",", ":")) + "\n", "utf-8")


def cast_table(found: DirectCast) -> list[str]:
    """Perplexity and KL of every format, without and with rotation."""
    lines = [
        "| format | perplexity | KL | as printed | rotated: perplexity | KL | as printed |",
        "|---" * 7 + "|",
    ]
    for fmt in MICROSCALED.values():
        cells = []
        for rotated in (False, True):
            cast = found.cast(fmt.name, rotated=rotated)
            cells += [
                f"{cast.perplexity:.3f}", f"{cast.kl:.4f}", f"{cast.kl_top25_printed:.0f}",
            ]  # fmt: skip
        lines.append(f"| {shown(fmt)} | {' | '.join(cells)} |")
    return lines


def win_table(found: Sequence[Measured]) -> list[str]:
    """Who wins by KL over the top 25, by model, and in how many windows; the study's counts."""
    names = " | ".join(cast.name for cast in found)
    lines = [
        f"| pair | form | {names} | models INT wins | study |",
        "|---" * (4 + len(found)) + "|",
    ]
    by_model = [versus(cast.result) for cast in found]
    for rows in zip(*by_model, strict=True):
        first = rows[0]
        cells = [f"{'INT' if row.ints_win else 'FP'} ({row.won} of {row.windows})" for row in rows]
        count = sum(row.ints_win for row in rows)
        pair = f"{first.ints.upper()}/{first.floats.upper()}"
        lines.append(
            f"| {pair} | {'rotated' if first.rotated else 'as it is'} | {' | '.join(cells)} | "
            f"{count} of {len(rows)} | {first.paper} of {PAPER_MODELS} |"
        )
    return lines


def direct_casts() -> list[str]:
    """The section on whole models."""
    found = casts()
    if not found:
        return []
    parts = [
        "## Whole models: direct cast",
        "`ptq analyze MODEL --direct-cast`: weights and inputs of all linear layers in blocks "
        "rounded to nearest, scales that never clip, nothing calibrated, the head left alone. "
        "Windows of 512 tokens, without a start token. KL in nats per token over the full "
        "vocabulary; as printed: over the top 25 in the unit of the study's tables (× 10⁶ / 25).",
    ]
    for cast in found:
        result = cast.result
        parts.append(
            f"**{cast.name}**, {cast.text}, {result.tokens} predictions, perplexity "
            f"{result.reference_perplexity:.3f} as it is:"
        )
        parts.append("\n".join(cast_table(result)))
    parts.append("Who has the smaller KL over the top 25, and in how many windows INT has:")
    parts.append("\n".join(win_table(found)))
    parts.append(WHY)
    return parts


def asymmetric() -> list[Row]:
    """How often rounding a number to itself over 127 gives 128, by the dtype of the arithmetic."""
    rows = []
    for name, dtype, bits, printed in (
        ("bf16", torch.bfloat16, 7, 16.82),
        ("fp16", torch.float16, 10, 0.02),
        ("fp32", torch.float32, 23, 0.0),
    ):
        every = max(2**bits >> 18, 1)  # of float32, an even sample of the mantissas
        mantissa = 1 + torch.arange(0, 2**bits, every, dtype=torch.float64) / 2**bits
        half = every / 2 ** (bits + 1)
        edges = np.append(mantissa.numpy() - half, 2 - half)
        share = 0.0
        for binade in range(-24, 3):  # of a standard normal number
            x = (mantissa * 2.0**binade).to(dtype)
            over = ((x / (x / 127)).round() > INT8.max).double().numpy()
            share += float((2 * np.diff(special.ndtr(edges * 2.0**binade)) * over).sum())
        why = "Gaussian numbers over their own magnitude, rounded: integers beyond 127"
        rows.append(Row(f"128 appears in {name}, %", printed, 100 * share, 0.005, why))
    return rows


def laws() -> list[str]:
    """What the three laws say of a block."""
    lines = [
        "| κ | " + " | ".join(shown(fmt) for pair in PAIRS for fmt in pair) + " |",
        "|---" * (1 + 2 * len(PAIRS)) + "|",
    ]
    for kappa in (1.5, 1.8, 2.0, 2.2, 2.366, 2.6, 3.0, 3.5, 3.95):
        cells = (
            "/".join(
                f"{law(fmt, kappa):.2f}" for law in (printed_qsnr, corrected_qsnr, integrated_qsnr)
            )
            for pair in PAIRS
            for fmt in pair
        )
        lines.append(f"| {kappa:g} | {' | '.join(cells)} |")
    return lines


def ratios() -> list[str]:
    """Geometric means of KL over the twelve models, and of what rotation does."""
    kl = published(KL)
    lines = [
        "| pair | INT / FP | rotated | rotation: INT | FP | helps INT | helps FP |",
        "|---|---|---|---|---|---|---|",
    ]
    for pair in PAIRS:
        ints, floats = (shown(fmt) for fmt in pair)
        cells = [
            ratio(kl[ints], kl[floats]),
            ratio(kl[f"R_{ints}"], kl[f"R_{floats}"]),
            *(ratio(kl[f"R_{name}"], kl[name]) for name in (ints, floats)),
        ]
        helped = (
            sum(a < b for a, b in zip(kl[f"R_{name}"], kl[name], strict=True))
            for name in (ints, floats)
        )
        numbers = [*(f"{cell:.2f}" for cell in cells), *map(str, helped)]
        lines.append(f"| {ints}/{floats} | {' | '.join(numbers)} |")
    return lines


def per_entry() -> float:
    """The median of ΔNLL over the printed KL: what the printed figure has been divided by."""
    kl, ppl = published(KL), published(PERPLEXITY)
    found = [
        (math.log(p) - math.log(base)) / (k * 1e-6)
        for name in ppl
        if name in kl
        for p, base, k in zip(ppl[name], ppl["BF16"], kl[name], strict=True)
    ]
    return statistics.median(found)


def table(rows: Sequence[Row]) -> list[str]:
    """Rows in markdown."""
    head = ["| what | paper | recomputed | verdict | how, and why |", "|---|---|---|---|---|"]
    return [*head, *(row.cells() for row in rows)]


def document() -> str:
    """The whole of it."""
    parts = [
        "# INT against FP: what of the paper can be recomputed",
        "<!-- written by scripts/int_vs_fp.py -->",
        'The study is "INT v.s. FP" (arXiv 2510.25602, v1). Laws, crossovers and Gaussian blocks '
        "are `ptq/numerics/int_vs_fp.py`; `ptq analyze` applies them to a model. κ is the crest "
        "factor of a block, max / rms; g its size; scales never clip (`ceil` for E8M0, nearest for "
        "E4M3).",
        "## Crossovers",
        "INT has the smaller error below the crossover. The printed values solve the printed "
        "formulas; real blocks cross elsewhere.",
        "\n".join(table(crossovers())),
        "## Constants of the formulas",
        "\n".join(table(constants())),
        "## QSNR by crest factor",
        "dB: printed / corrected / integrated. The closed forms of NVFP4 hold up to κ = 2.6 only: "
        "beyond, the term κ²/g cancels the error. Simulated blocks agree with the last figure "
        "within 0.1 dB (`tests/numerics/test_int_vs_fp.py`).",
        "\n".join(laws()),
        "## Figure 4 against Gaussian blocks",
        "Rotation makes blocks Gaussian and no better, so its averages should be those of Gaussian "
        "blocks.",
        "\n".join(table(figure_4())),
        "## Tables 3, 12, 14: recounted",
        "\n".join(table(recounts())),
        "KL over the twelve models, geometric means; below 1 is for INT, or for rotation:",
        "\n".join(ratios()),
        "The printed KL is a mean over tokens *and* the 25 entries of a distribution: nats per "
        "token are 25 times as many. From the tables alone, the rise of log perplexity over the "
        f"printed KL has the median {per_entry():.1f}. Perplexities of Llama-3.1-70B "
        "in MXINT8 and MXFP8 are the same to four digits while KL differs by 2.7: a copy.",
        *direct_casts(),
        "## Symmetric integers",
        "\n".join(table(asymmetric())),
        *trained(),
        "## Hardware model",
        "Published from a model of gates with undisclosed cell factors, not from synthesis: the "
        "quotients can be checked, the figures cannot. What it consists of is "
        "`ptq/numerics/hardware_cost.py`, with cells of our own (NAND2 equivalents: AND, OR 4/3, "
        "XOR and multiplexer 2, full adder 5; libraries differ by a fifth).",
        "\n".join(table(hardware())),
        "Gates for a product, one lane and its share of what a block has once (scales, float32 "
        "accumulator; ours, the paper does not say how they are built). Area is over MXFP8; so is "
        "energy if all gates toggle equally often, and the throughput of an equal area is the "
        "inverse. Weights to read: bits over 16, the inverse of the throughput where memory is the "
        "limit. Blackwell: multiplications a second over bfloat16 (data sheet of B200, dense); it "
        "has no block-scaled integers. Six-bit and MX four-bit units have no published figures. "
        "Energies of the paper cannot be recomputed: they need the toggling of every cell. "
        "A synthesis by others (LLM-FP4, 40 nm) has INT4 at 0.93 of the area of E2M1, where the "
        "lane alone is 0.78 here.",
        "\n".join(units()),
    ]
    return "\n\n".join(parts) + "\n"


def trained() -> list[str]:
    """What training with both kinds of integers gave; the record of ``train_mxint8.py``."""
    record = json.loads((DOCUMENT.parent / "mxint8-training.json").read_text("utf-8"))
    settings, rows = record["settings"], record["summary"]
    seeds = len({run["seed"] for run in record["runs"]})
    lines = ["| products | held out, nats | to bfloat16 | bias, millionths |", "|---|---|---|---|"]
    for name, row in rows.items():
        gap = f"{row['to_bfloat16']:+.4f} ± {row['standard_error']:.4f}"
        lines.append(
            f"| {name} | {row['held_out']:.4f} | {'–' if name == 'bfloat16' else gap} | "
            f"{row['bias_millionths']:.0f} |"
        )
    sums = "integers over bfloat16 scales, the asymmetric ones less the symmetric ones"
    of = {
        kind: {r["seed"]: r["held_out"] for r in record["runs"] if r["run"].endswith(f", {kind}")
               and r["run"].startswith("int8")}
        for kind in ("symmetric", "asymmetric")
    }  # fmt: skip
    gaps = [of["asymmetric"][seed] - of["symmetric"][seed] for seed in sorted(of["symmetric"])]
    return [
        f"Training (`python scripts/train_mxint8.py`, {record['machine']['date']}, one core): the "
        f"bundled model's architecture and text, {settings['steps']} steps of {settings['batch']} "
        f"windows of {settings['window']} tokens, {seeds} seeds; outputs and both gradients of all "
        "linear layers in blocks are products of rounded blocks of 32. ± is a standard error over "
        "seeds, of differences between runs with the same start and the same windows; the bias is "
        "the mean error of rounding Gaussian numbers over their root mean square.",
        "\n".join(lines),
        "![Loss curves, and their distance to bfloat16](mxint8-training.svg)",
        f"Of {sums}: {', '.join(f'{gap:+.4f}' for gap in gaps)} nats by seed. The paper has "
        "+.0103 there after 20 billion tokens of a model of 145M parameters, and +.0030 with "
        "power-of-two scales. So with bfloat16 scales the spare code harms every seed, as in the "
        "paper; with power-of-two scales, where it appears a twelfth as often, nothing can be told "
        f"after {settings['steps']} steps, nor between eight bits and bfloat16, which are all "
        "within two or three standard errors of each other.",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether it is current")
    parser.add_argument("--cast", nargs=4, metavar=("MODEL", "TEXT", "TOKENS", "NAME"))
    given = parser.parse_args()
    if given.cast:
        keep(given.cast[0], given.cast[1], int(given.cast[2]), given.cast[3])
    check = given.check
    fresh = document()
    current = DOCUMENT.read_text("utf-8") if DOCUMENT.exists() else ""
    if check and fresh != current:
        print(
            f"error: {DOCUMENT.name} is out of date: run python scripts/int_vs_fp.py",
            file=sys.stderr,
        )
        return 1
    if fresh != current:
        DOCUMENT.write_text(fresh, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
