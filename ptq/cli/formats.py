"""``ptq formats``: which formats there are, what runs them, and when to choose which."""

from dataclasses import asdict, dataclass

from ptq.cli.errors import guarded
from ptq.cli.options import Debug, Json

BLACKWELL, ADA = "Blackwell", "Ada +"
NOWHERE = "none"
# Format → the GPUs whose tensor cores multiply it, and what it is for.
GUIDE: dict[str, tuple[str, str]] = {
    "nvfp4": (BLACKWELL, "the first choice: accurate, and other engines open it, w4a4 too"),
    "mxfp4": (BLACKWELL, "the smallest that other engines open; loses more than nvfp4"),
    "nvint4": ("none", "the least loss at w4a4, with ptq; w4a16 is like nvfp4 and opens elsewhere"),
    "mxint4": ("none", "int4 in groups of 32, w4a16 with --rotation none; comparisons with mxfp4"),
    "mxint6": ("none", "sensitive layers of a mixed recipe"),
    "mxfp6": (BLACKWELL, "comparisons with mxint6"),
    "mxint8": ("none", "the most sensitive layers of a mixed recipe"),
    "mxfp8": (BLACKWELL, "sensitive layers beside nvfp4 or mxfp4, which other engines open too"),
    "int4-g128": ("none", "engines and GPUs without 4-bit floats: what GPTQ and AWQ tools write"),
    "int4-g32": ("none", "the same, closer to the model: groups of 32 with free scales"),
    "fp8-channel": (ADA, "8 bits for every engine; sensitive layers beside nvfp4 on Hopper"),
}


@dataclass(frozen=True)
class Row:
    """A format as the table shows it; ``opens`` by scheme: the engines that compute the default
    recipe right.

    ``area`` of an arithmetic unit, in gates over those of MXFP8 (a model, no synthesis);
    ``paper_area`` and ``paper_energy`` as "INT v.s. FP" has them, None where it says nothing.
    ``blackwell``: multiplications a second over those in bfloat16 where they are native.
    """

    format: str
    bits_per_weight: float
    group_size: int
    rotation: int
    native: str
    kernels: bool
    opens: dict[str, str]
    choose: str
    area: float
    paper_area: float | None
    paper_energy: float | None
    blackwell: float | None


def rows() -> list[Row]:
    """One for each format, in the order of the guide."""
    from ptq.kernels import coverage
    from ptq.numerics.formats import FORMATS
    from ptq.numerics.hardware_cost import PUBLISHED, TENSOR_CORES, relative_area

    found = []
    for name, (native, choose) in GUIDE.items():
        fmt, paper = FORMATS[name], PUBLISHED.get(name)
        found.append(
            Row(
                format=name,
                bits_per_weight=fmt.bits_per_weight,
                group_size=fmt.group_size,
                rotation=fmt.default_rotation,
                native=native,
                kernels=(fmt.element.name, fmt.scale_name) in coverage.FORMATS,
                opens={
                    scheme: NOWHERE
                    if fmt.weights_only and scheme == "w4a4"
                    else opens(name, scheme)
                    for scheme in ("w4a16", "w4a4")
                },
                choose=choose,
                area=relative_area(fmt),
                paper_area=None if paper is None else paper.area,
                paper_energy=None if paper is None else paper.energy,
                blackwell=TENSOR_CORES.get(name),
            )
        )
    return found


def opens(format: str, scheme: str) -> str:
    """Who computes a checkpoint of the default recipe right, by the dialect that it gets."""
    from ptq.checkpoint.dialect_choice import choose
    from ptq.checkpoint.dialects import DIALECTS
    from ptq.checkpoint.engines import Verdict
    from ptq.checkpoint.quantization_config import LayerInfo
    from ptq.pipeline.recipe import Recipe

    recipe = Recipe.default(format, scheme=scheme)
    info = LayerInfo(
        format=format,
        rotation=int(recipe.rotation),
        quantize_inputs=recipe.quantize_inputs,
        static_inputs=recipe.static_inputs,
    )
    layers = {"model.layers.0.mlp.down_proj": info}
    openings = DIALECTS[choose(layers, dtype="bfloat16").dialect].opens(layers)
    marks = {Verdict.RIGHT: "", Verdict.NARROW: "", Verdict.INSTALL: "*"}
    engines = [
        f"{engine}{marks[opening.verdict]}"
        for engine, opening in openings.items()
        if opening.verdict in marks
    ]
    return "all" if len(engines) == len(openings) else ", ".join([*engines, "ptq"])


@guarded
def formats(json: Json = False, debug: Debug = False) -> None:
    """Which formats there are, on which GPUs they are native, who opens them, and when to choose
    which."""
    from rich import box
    from rich.table import Table

    from ptq.checkpoint.engines import INSTALL
    from ptq.cli import display

    if json:
        display.print_json([asdict(row) for row in rows()])
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("format", no_wrap=True)
    for name in ("bits", "group", "rotation", "area"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("native on", "kernels"):
        table.add_column(name, no_wrap=True)
    for name in ("w4a16 in", "w4a4 in"):
        table.add_column(name, max_width=18)  # in lines: names of engines need room
    table.add_column("choose it for", ratio=1)
    for row in rows():
        table.add_row(
            row.format,
            f"{row.bits_per_weight:g}",
            str(row.group_size) if row.group_size else "row",
            str(row.rotation) if row.rotation > 1 else "none",
            f"{row.area:.2f}",
            row.native,
            "Ampere +" if row.kernels else "none",
            *row.opens.values(),
            row.choose,
        )
    display.out.print(table)
    for line in (
        "bits: of a weight, with its share of the scale. group: weights that share a scale. "
        "rotation: the default. area: gates of an arithmetic unit over those of mxfp8, a model and "
        "no synthesis (docs/int-vs-fp.md).",
        "native on: GPUs whose tensor cores multiply it (Blackwell: B200, GB200, RTX 50; Ada +: "
        "RTX 40, L40S, Hopper too); needed "
        "for a gain from w4a4, not to run it.",
        "kernels: GPUs on which ptq computes with packed weights; elsewhere, and on a CPU, it "
        "unpacks them: the same numbers, slower.",
        "w4a16 in, w4a4 in: what opens the result; all is ptq, transformers, vLLM, SGLang and "
        "TensorRT-LLM, as far as is known: docs/engines.md. transformers opens the others after "
        f"import ptq; * is after {INSTALL} beside it, run on a CPU.",
    ):
        display.out.print(line, style="dim", markup=False)
