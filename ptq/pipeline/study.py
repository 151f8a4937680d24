"""An analysis from beginning to end: tensors, then the whole model cast and advice where they are
asked for, and what came of it as tables, data and files.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ptq.pipeline.advice import Advice, advise, check_limits
from ptq.pipeline.advisor import AdviceOptions, measure_damage, recipe_of
from ptq.pipeline.analysis import BlockAnalysis, LayerAnalysis
from ptq.pipeline.analysis_files import CAST_STATES, PAGE, RECIPE, Analysis, write_results
from ptq.pipeline.analysis_page import analysis_page
from ptq.pipeline.analysis_summary import Wins, Worst, lines, wins, worst
from ptq.pipeline.analyze import Options, analyze
from ptq.pipeline.cast_results import DirectCast
from ptq.pipeline.direct_cast import CastOptions, direct_cast
from ptq.pipeline.recipe_file import to_toml
from ptq.pipeline.study_tables import advice_table, cast_tables, win_table, worst_table
from ptq.reading.schema import plain
from ptq.runtime.tables import Table, Tabular

# Choices whose names say more than those of the fields that they are.
ANALYZING = {"numbers": "values"}
CASTING = {"window": "seq_len"}
LIMITS = ("budget", "max_kl", "measure")


class Told(Protocol):
    """Is told how many steps of a stage are over, of how many, and what the last one was."""

    def __call__(self, done: int, total: int, text: str, *, known: bool = False) -> object: ...


# By the name of a stage that begins: whom to tell of its steps.
Stages = Callable[[str], AbstractContextManager[Told]]


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """What is looked at.

    Attributes:
        tensors: every layer and its inputs.
        cast: the whole model in every format; None leaves it out.
        advice: a format for every layer; None leaves it out. Then ``budget``, ``max_kl`` and
            ``measure`` are what :func:`ptq.pipeline.advice.advise` takes.
    """

    tensors: Options
    cast: CastOptions | None = None
    advice: AdviceOptions | None = None
    budget: float | None = None
    max_kl: float | None = None
    measure: str = "kl"

    @classmethod
    def of(
        cls, choices: Mapping[str, Any], *, direct_cast: bool = False, advise: bool = False
    ) -> "StudyOptions":
        """From choices under the names of the command line's options; None counts as not given.

        Raises:
            ValueError: a value that cannot be, or limits of an advice that is not asked for.
        """
        given = {name: value for name, value in choices.items() if value is not None}
        for name in ("ignore", "formats"):
            if isinstance(given.get(name), list):
                given[name] = tuple(given[name])
        if advise:
            check_limits(
                budget=given.get("budget"),
                ceiling=given.get("max_kl"),
                measure=given.get("measure", "kl"),
            )
        elif {"budget", "max_kl"} & given.keys():
            raise ValueError("--budget and --max-kl are for --advise")
        # all are looked at, and a mistake in one that is not used is one, too
        casting = CastOptions(**_fields(CastOptions, given, CASTING, without=("formats",)))
        advising = AdviceOptions(**_fields(AdviceOptions, given, {}))
        return cls(
            tensors=Options(**_fields(Options, given, ANALYZING)),
            cast=casting if direct_cast else None,
            advice=advising if advise else None,
            **{name: given[name] for name in LIMITS if name in given},
        )


def _fields(
    record: type, given: Mapping[str, Any], names: Mapping[str, str], without: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The fields of a record that are given, some by other ``names``."""
    by_field = {field.name: field.name for field in fields(record)}
    for name, field in names.items():
        by_field[field] = name
    return {
        field: given[name]
        for field, name in by_field.items()
        if name in given and field not in without
    }


@dataclass(frozen=True, kw_only=True, repr=False)
class Study(Tabular):
    """What an analysis found; prints as tables, and is one in a notebook.

    Attributes:
        analysis: every figure: of each of its ``blocks`` the ``tensors`` in all forms and formats.
        folder: where ``analysis.json``, ``analysis.csv`` and the page lie; None if nothing was
            written.
        recipe: the one that was advised, as TOML; None where no advice was asked for.
        layers: all linear layers in the order of the model, with the errors of their outputs.
        wins: who wins, INT or FP, for every pair, form and role, and whether laws foresaw it.
        worst: the ten layers that will hurt most in four bits, and what to do about each.
        direct_cast: the whole model in every format; None unless that was ever asked for.
        advice: the choice for every unit of layers, what was measured of each, and the front of
            bits against loss; None likewise.
        report: path of the page to look at; ``recipe_file``: of the recipe, as :func:`quantize`
            takes it; None where they were not written.
    """

    analysis: Analysis
    folder: Path | None = None
    recipe: str | None = None

    @property
    def rule(self) -> str:
        """How scales were chosen."""
        return str(self.analysis.identity["scales"])

    @property
    def layers(self) -> tuple[LayerAnalysis, ...]:
        """All linear layers in the order of the model, with the errors of their outputs."""
        return tuple(layer for block in self.analysis.blocks for layer in block.layers)

    @property
    def wins(self) -> list[Wins]:
        """Who wins, INT or FP, in every form, and whether that was foreseen."""
        return wins(self.analysis.blocks, self.rule)

    @property
    def worst(self) -> list[Worst]:
        """The ten layers that will hurt most in four bits, and what to do about each."""
        return worst(self.analysis.blocks)

    @property
    def direct_cast(self) -> DirectCast | None:
        """The whole model in every format, if that was asked for."""
        return self.analysis.direct_cast

    @property
    def advice(self) -> Advice | None:
        """The format that was advised for every layer, and the front of bits against loss."""
        return self.analysis.advice

    @property
    def report(self) -> Path | None:
        """The page to look at."""
        return None if self.folder is None else self.folder / PAGE

    @property
    def recipe_file(self) -> Path | None:
        """The advised recipe, as ``ptq.quantize(…, recipe=…)`` takes it."""
        return None if self.folder is None or self.recipe is None else self.folder / RECIPE

    def tables(self) -> tuple[Table, ...]:
        """Who wins; the layers that will hurt; and what else was asked for."""
        blocks = self.analysis.blocks
        found = [win_table(blocks, self.rule), worst_table(self.worst)]
        if self.direct_cast is not None:
            found += cast_tables(self.direct_cast)
        if self.advice is not None:
            found.append(advice_table(self.advice))
        return tuple(found)

    def to_dict(self) -> dict[str, object]:
        """For JSON: win tables and the worst layers, and what else was asked for; all figures are
        in analysis.json."""
        return {
            "model": self.analysis.model,
            "options": self.analysis.identity,
            "seconds": self.analysis.seconds,
            "crossovers": lines(self.rule),
            "wins": [asdict(row) for row in self.wins],
            "worst": [asdict(row) for row in self.worst],
            "direct_cast": None if self.direct_cast is None else plain(self.direct_cast),
            "advice": None if self.advice is None else plain(self.advice),
            **({} if self.recipe is None else {"recipe": self.recipe}),
        }


def study(
    model: str | Path,
    options: StudyOptions,
    stages: Stages,
    *,
    folder: Path | None = None,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    activations: str = "ram",
) -> Study:
    """Analyze the model of a directory.

    Args:
        folder: where results go, and where a later call goes on; whoever asks has looked at it
            (:func:`check_folder`). None keeps nothing.
        activations: where hidden states of a cast and of advice wait.

    Raises:
        ValueError, OSError: with one line that says what, where, and what to do.
    """
    with stages("analyzing") as step:

        def on_block(block: BlockAnalysis, count: int, resumed: bool) -> None:
            text = block.name + (" measured before" if resumed else "")
            step(block.index + 1, count, text, known=resumed)

        found = analyze(
            model,
            options.tensors,
            folder=folder,
            overwrite=overwrite,
            device=device,
            dtype=dtype,
            on_block=on_block,
        )
    _write(folder, found)
    if options.cast is not None:
        with stages("casting") as step:
            made = direct_cast(
                model,
                options.cast,
                folder=None if folder is None else folder / CAST_STATES,
                overwrite=overwrite,
                known=found.direct_cast,
                device=device,
                dtype=dtype,
                activations=activations,
                on_step=step,
            )
        found = replace(found, direct_cast=made)
        _write(folder, found)
    recipe = None
    if options.advice is not None:
        with stages("measuring damage") as step:
            damage = measure_damage(
                model,
                options.advice,
                known=None if found.advice is None else found.advice.damage,
                device=device,
                dtype=dtype,
                activations=activations,
                on_block=lambda done, total: step(done, total, ""),
            )
        limits = {"budget": options.budget, "ceiling": options.max_kl, "measure": options.measure}
        advice = advise(damage, **limits)
        found = replace(found, advice=advice)
        recipe = to_toml(recipe_of(advice, options.advice))
        _write(folder, found, recipe)
    return Study(analysis=found, folder=folder, recipe=recipe)


def _write(folder: Path | None, found: Analysis, recipe: str | None = None) -> None:
    if folder is not None:
        write_results(folder, found, analysis_page(found), recipe)
