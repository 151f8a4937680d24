"""Where a result may go: never over what is not a checkpoint of ours, never over its own source."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path


def check_destination(
    out: Path | str,
    model: Path | None = None,
    *,
    overwrite: bool,
    recipe: Callable[[], Mapping[str, object]] | None = None,
) -> Path:
    """The real path of ``out``, links resolved, after making sure that a result may take its place.

    Nothing is written, and nothing is removed.

    Args:
        model: the directory that the run reads, if there is one.
        overwrite: allow a directory that holds a checkpoint of ours, to be replaced.
        recipe: gives that of the run, in plain JSON, and is asked once the path itself may be
            used; allow a directory that holds a checkpoint which was made by it, of which the
            writer finds out whether the same run has made it.

    Raises:
        ValueError: an empty path; one that is, contains or lies in the model or is, or contains,
            the working directory; a mount point; with ``overwrite`` a directory that holds
            something else than a checkpoint of ours.
        FileExistsError: a file, or without ``overwrite`` a directory that is not empty.
        OSError: no directory can be made there.
    """
    if not str(out).strip():
        raise ValueError("--out is empty: give the directory of the result")
    place = Path(os.path.realpath(out))
    shown = str(out) if str(place) == str(out) else f"{out} ({place})"
    if place.is_symlink():
        raise ValueError(f"--out {shown} is a link that leads back to itself")
    if place == Path.cwd() or place in Path.cwd().parents:
        raise ValueError(
            f"--out {shown} is, or contains, the working directory: name a directory of its own"
        )
    if model is not None and model.exists():
        _refuse_overlap(place, shown, model.resolve())
    if place.exists() and not place.is_dir():
        raise FileExistsError(f"{shown} exists and is not a directory: choose another --out")
    _check_surroundings(place, shown)
    holds = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
    again = bool(holds) and recipe is not None and recipe() in _recipes(place)
    if holds and not (overwrite or again):
        raise FileExistsError(
            f"{shown} exists and is not empty: choose another directory, or --overwrite"
        )
    if holds and not is_ours(place):
        raise ValueError(
            f"{shown} is not a checkpoint that ptq wrote (it holds {', '.join(holds[:3])}"
            f"{', …' if len(holds) > 3 else ''}): --overwrite does not replace it; choose another "
            "directory"
        )
    return place


def _check_surroundings(place: Path, shown: str) -> None:
    """The result is made beside its place and renamed in the end: better no hours of work before
    that turns out to be impossible."""
    if place.is_mount():
        raise ValueError(
            f"--out {shown} is a mount point, which no result can take the place of: name a "
            "directory in it"
        )
    above = next(parent for parent in place.parents if parent.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"--out {shown}: {above} is not a directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {shown}: no permission to write in {above}")


def _refuse_overlap(place: Path, shown: str, model: Path) -> None:
    if place == model:
        relation = "is"
    elif place in model.parents:
        relation = "contains"
    elif model in place.parents:
        relation = "lies in"
    else:
        return
    raise ValueError(f"--out {shown} {relation} the directory of the model: choose another one")


def is_ours(directory: Path) -> bool:
    """Whether a directory holds a checkpoint that ptq wrote, by its config.json."""
    return _our_part(directory) is not None


def chosen_by(directory: Path, asked: Mapping[str, object]) -> Mapping[str, object] | None:
    """The recipe of a checkpoint of ours that a run chose when it was asked for ``asked``, which
    left something to choose; None if there is no such checkpoint."""
    recipes = _recipes(directory)
    return recipes[0] if recipes[1:] == [asked] else None


def _recipes(directory: Path) -> list[Mapping[str, object]]:
    """What a checkpoint of ours was made by, and what was asked for if that is another; none if it
    is not ours."""
    ours = _our_part(directory) or {}
    provenance = ours.get("provenance")
    asked = provenance.get("asked") if isinstance(provenance, dict) else None
    return [recipe for recipe in (ours.get("recipe"), asked) if isinstance(recipe, dict)]


def _our_part(directory: Path) -> dict[str, object] | None:
    """What ptq noted in the config.json of a checkpoint that it wrote."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(quantization, dict):
        return None
    if quantization.get("quant_method") == "ptq":
        return quantization
    part = quantization.get("ptq")
    return part if isinstance(part, dict) else None
