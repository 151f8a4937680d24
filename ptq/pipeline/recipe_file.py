"""A recipe as text that can be kept, edited, and fed back with ``--recipe``."""

import json
from collections.abc import Mapping

from ptq.pipeline.recipe import Recipe


def to_toml(recipe: Recipe) -> str:
    """Every choice of ``recipe`` as a line of TOML, and a line for each rule. What is None is left
    out, as TOML has no word for it; reading the text gives an equal recipe."""
    choices = {name: value for name, value in recipe.to_dict().items() if value is not None}
    rules = "".join(f"  {_value(rule)},\n" for rule in choices["rules"])
    return "".join(
        f"rules = [\n{rules}]\n" if name == "rules" and rules else f"{name} = {_value(value)}\n"
        for name, value in choices.items()
    )


def _value(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, Mapping):
        pairs = (f"{_string(str(key))} = {_value(item)}" for key, item in value.items())
        return f"{{{', '.join(pairs)}}}"
    return _string(value) if isinstance(value, str) else json.dumps(value)


def _string(text: str) -> str:
    """A basic string: JSON's, but for the one character that TOML wants escaped and JSON does
    not."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
