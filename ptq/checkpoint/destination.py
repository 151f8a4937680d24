"""Where a result may go: never over what is not a checkpoint of ours, never over its own source."""

import json
from pathlib import Path


def check_destination(out: Path | str, model: Path | None = None, *, overwrite: bool) -> Path:
    """The real path of ``out``, links resolved, after making sure that a result may take its place.

    Nothing is written, and nothing is removed.

    Args:
        model: the directory that the run reads, if there is one.
        overwrite: allow a directory that holds a checkpoint of ours, to be replaced.

    Raises:
        ValueError: an empty path; one that is, contains or lies in the model or is, or contains,
            the working directory; with ``overwrite`` a directory that holds something else than a
            checkpoint of ours.
        FileExistsError: a file, or without ``overwrite`` a directory that is not empty.
    """
    if not str(out).strip():
        raise ValueError("--out is empty: give the directory of the result")
    place = Path(out).resolve()
    shown = str(out) if str(place) == str(out) else f"{out} ({place})"
    if place == Path.cwd() or place in Path.cwd().parents:
        raise ValueError(
            f"--out {shown} is, or contains, the working directory: name a directory of its own"
        )
    if model is not None and model.exists():
        _refuse_overlap(place, shown, model.resolve())
    if place.exists() and not place.is_dir():
        raise FileExistsError(f"{shown} exists and is not a directory: choose another --out")
    holds = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
    if holds and not overwrite:
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
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(quantization, dict):
        return False
    return quantization.get("quant_method") == "ptq" or isinstance(quantization.get("ptq"), dict)
