"""Where a model comes from, as its directory tells: its name on the hub, and its licence.

Both go into the model card of what is made of it.
"""

import re
from pathlib import Path

CARD = "README.md"
FRONT = re.compile(r"\ufeff?---\r?\n(.*?)\r?\n---", re.DOTALL)
LICENCE = re.compile(r"(license(?:_name|_link)?):[ \t]*[\"']?([\w.:/ +-]{1,200}?)[\"']?[ \t]*")


def hub_name(directory: Path) -> tuple[str, str] | None:
    """(``owner/name``, commit) of a model in the hub's cache; None of any other directory."""
    parts = directory.parts
    if len(parts) < 3 or parts[-2] != "snapshots":
        return None
    match = re.fullmatch(r"models--(.+)", parts[-3])
    return (match[1].replace("--", "/", 1), parts[-1]) if match else None


def licence(directory: Path) -> dict[str, str]:
    """What the front matter of a model card says of the licence, by the keys of the hub
    (``license``, ``license_name``, ``license_link``); empty where it says nothing simple."""
    path = directory / CARD
    if not path.is_file():
        return {}
    front = FRONT.match(path.read_text(encoding="utf-8", errors="replace"))
    lines = front[1].splitlines() if front else []
    found = [match for line in lines if (match := LICENCE.fullmatch(line))]
    return {match[1]: match[2] for match in found}
