"""Where an analysis lies: blocks as they are finished, and at the end analysis.json and .csv.

What was asked for beside it is part of analysis.json and has tables of its own: direct-cast.csv,
pareto.csv and the recipe that was advised. A folder holds ``analysis.partial.jsonl`` while it is
made: a line that says of which run, then one for every finished block. A line that was cut off is
not counted. The results appear complete or not at all, and replace only files of these names.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ptq.checkpoint.safetensors_files import sync_folder, write_file
from ptq.numerics.formats import FORMATS
from ptq.pipeline import advice, cast_results
from ptq.pipeline.advice import Advice
from ptq.pipeline.analysis import BlockAnalysis
from ptq.pipeline.cast_results import DirectCast
from ptq.reading.schema import JsonObject, check, plain, read_json

PARTIAL, RESULT, TABLE, PAGE = (
    "analysis.partial.jsonl",
    "analysis.json",
    "analysis.csv",
    "report.html",
)
CAST_TABLE, FRONT_TABLE, RECIPE = "direct-cast.csv", "pareto.csv", "recipe.toml"
CAST_STATES = "direct-cast.partial"  # folder of an unfinished direct cast
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """A whole analysis.

    Attributes:
        version: of this layout.
        model: as it was given.
        identity: what decides the numbers: fingerprint of the model, options, versions.
        seconds: that it took, those of interrupted runs not counted.
        direct_cast, advice: of those who asked for them.
    """

    version: int
    model: str
    identity: JsonObject
    seconds: float
    blocks: tuple[BlockAnalysis, ...]
    direct_cast: DirectCast | None = None
    advice: Advice | None = None


def read_analysis(folder: Path) -> Analysis:
    """The analysis in ``folder``.

    Raises:
        ValueError: it is damaged, or of another version.
        OSError: there is none.
    """
    file = folder / RESULT
    if not file.exists():
        raise FileNotFoundError(f"{folder} holds no {RESULT}: run ptq analyze MODEL --out {folder}")
    found = read_json(file, Analysis, "run ptq analyze again")
    if found.version != VERSION:
        raise ValueError(
            f"{file}: version is {found.version} and this ptq reads {VERSION}: run ptq analyze "
            "again"
        )
    return found


def check_folder(folder: Path, *, overwrite: bool, adding: bool = False) -> None:
    """Make sure that results may go to ``folder``: it is new, empty, holds an unfinished analysis,
    or, with ``overwrite`` or to be added to, a finished one.

    Raises:
        FileExistsError, ValueError: otherwise, with what to do.
    """
    if not str(folder).strip():
        raise ValueError("--out is empty: give the directory of the result")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} exists and is not a directory: choose another --out")
    holds = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    ours = {PARTIAL, RESULT, TABLE, PAGE, CAST_TABLE, FRONT_TABLE, RECIPE, CAST_STATES}
    if strangers := [name for name in holds if name not in ours]:
        raise FileExistsError(
            f"{folder} holds {', '.join(strangers[:3])}, which no analysis wrote: choose another "
            "--out"
        )
    if RESULT in holds and not overwrite and not adding:
        raise FileExistsError(f"{folder} holds a finished analysis: choose another, or --overwrite")


def finished(folder: Path, identity: Mapping[str, object]) -> Analysis | None:
    """The analysis in ``folder`` if that is finished.

    Raises:
        FileExistsError: one of another run.
        ValueError: it is damaged.
    """
    if not (folder / RESULT).exists():
        return None
    found = read_analysis(folder)
    if json.dumps(found.identity, sort_keys=True) != json.dumps(identity, sort_keys=True):
        raise FileExistsError(
            f"{folder / RESULT} is an analysis of another model, text or version, or with other "
            "options: choose another --out, or --overwrite"
        )
    return found


class Partial:
    """Finished blocks of a run, in a file that grows by a line each.

    Without a folder nothing is kept.

    Args:
        identity: decides the numbers; a file of another run is replaced only with ``overwrite``.

    Raises:
        FileExistsError: an unfinished analysis of another run.
        ValueError: a damaged line.
    """

    def __init__(
        self, folder: Path | None, identity: Mapping[str, object], *, overwrite: bool = False
    ) -> None:
        self.blocks: dict[str, BlockAnalysis] = {}
        self._file = None if folder is None else folder / PARTIAL
        if self._file is None:
            return
        head = json.dumps({"version": VERSION, "identity": identity}, sort_keys=True)
        lines = self._file.read_bytes().split(b"\n") if self._file.exists() else []
        whole = lines[:-1]  # what follows the last newline was cut off
        same = bool(whole) and whole[0].decode("utf-8", "replace") == head
        if whole and not same and not overwrite:
            raise FileExistsError(
                f"{self._file} is an unfinished analysis of another model, text or version, or "
                "with other options: choose another --out, or --overwrite"
            )
        if not same:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_file(self._file, [f"{head}\n".encode()])
            sync_folder(self._file.parent)
            return
        for number, line in enumerate(whole[1:], 2):
            try:
                value = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{self._file}, line {number}: {error}; remove the file to begin again"
                ) from error
            block = check(
                value, BlockAnalysis, f"{self._file}, line {number}", "remove it to begin again"
            )
            self.blocks[block.name] = block
        if lines[-1]:
            write_file(self._file, [line + b"\n" for line in whole])

    def add(self, block: BlockAnalysis) -> None:
        """Keep a finished block."""
        self.blocks[block.name] = block
        if self._file is not None:
            with open(self._file, "ab") as file:
                file.write(json.dumps(plain(block), ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())


def write_results(
    folder: Path, analysis: Analysis, page: str | None = None, recipe: str | None = None
) -> None:
    """Write the tables, the page and the advised recipe if there are any, and analysis.json, that
    one last; then remove the partial file."""
    write_file(folder / TABLE, [table(analysis.blocks).encode()])
    if analysis.direct_cast is not None:
        write_file(folder / CAST_TABLE, [cast_results.table(analysis.direct_cast).encode()])
    if analysis.advice is not None:
        write_file(folder / FRONT_TABLE, [advice.table(analysis.advice).encode()])
    if recipe is not None:
        write_file(folder / RECIPE, [recipe.encode()])
    if page is not None:
        write_file(folder / PAGE, [page.encode()])
    compact = json.dumps(plain(analysis), ensure_ascii=False, separators=(",", ":"))
    write_file(folder / RESULT, [f"{compact}\n".encode()])
    (folder / PARTIAL).unlink(missing_ok=True)
    sync_folder(folder)


def table(blocks: Iterable[BlockAnalysis]) -> str:
    """A row for every tensor, form and format, as CSV with a head."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(
        (
            "role", "name", "layers", "rows", "columns", "balanced", "rotated", "format", "qsnr_db",
            "printed_db", "corrected_db", "integrated_db", "crest_mean", "crest_q1", "crest_median",
            "crest_q3", "crest_max", "excess_kurtosis", "outlier_channels",
        )
    )  # fmt: skip
    for block in blocks:
        for tensor in block.tensors:
            for variant in tensor.variants:
                by_size = {crest.size: crest for crest in variant.crest}
                for name, figures in variant.formats.items():
                    crest = by_size[FORMATS[name].group_size]
                    numbers = (
                        figures.qsnr, figures.printed, figures.corrected, figures.integrated,
                        crest.mean, crest.first_quartile, crest.median, crest.third_quartile,
                        crest.maximum, variant.kurtosis,
                    )  # fmt: skip
                    rows.writerow(
                        (
                            tensor.role, tensor.name, " ".join(tensor.layers), tensor.rows,
                            tensor.columns, int(variant.balanced), int(variant.rotated), name,
                            *("" if n is None else f"{n:.6g}" for n in numbers),
                            tensor.channels.outliers,
                        )
                    )  # fmt: skip
    return text.getvalue()
