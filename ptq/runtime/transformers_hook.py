"""``import ptq`` lets ``from_pretrained`` open what ptq writes, and imports nothing for it.

transformers looks into two tables for what reads a ``quant_method``. Once they exist they are
replaced by :class:`Waiting` ones: the first question about a dialect of ours imports
:mod:`ptq.runtime.transformers_plugin`, which answers it. Until then neither torch nor transformers
is imported; a program that never opens such a checkpoint pays nothing.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importlib.abc takes longer than all else here
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

TABLES_IN = "transformers.quantizers.auto"
TABLES = ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING")
PLUGIN = "ptq.runtime.transformers_plugin"
# the dialects that the plugin registers; a test compares them with its own table
NAMES = frozenset({"compressed-tensors", "ptq"})


class Waiting(dict):
    """A table of transformers in which the plugin writes when it is first asked for one of
    ``NAMES``."""

    def __getitem__(self, name):
        if name in NAMES:
            import_module(PLUGIN)
        return super().__getitem__(name)

    def __contains__(self, name):
        return name in NAMES or super().__contains__(name)

    def get(self, name, default=None):
        if name in NAMES:
            import_module(PLUGIN)
        return super().get(name, default)


def prepare(tables: "ModuleType") -> None:
    """Let the tables of ``tables`` wait; nothing where they do, or the plugin has written in
    them."""
    if PLUGIN in sys.modules:
        return
    for name in TABLES:
        table = getattr(tables, name)
        if not isinstance(table, Waiting):
            setattr(tables, name, Waiting(table))


class Prepared:
    """Another loader, after which :func:`prepare` runs; everything else is the other's."""

    def __init__(self, loader: "Loader") -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        return self._loader.create_module(spec)

    def exec_module(self, module: "ModuleType") -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        prepare(module)


class Finder:
    """Finds the module of the tables where the other finders do, and prepares it."""

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None", target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if fullname != TABLES_IN:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, Finder):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = Prepared(spec.loader)  # pyright: ignore[reportAttributeAccessIssue] - a loader by what it does
                return spec
        return None


def install() -> None:
    """Prepare the tables, now if transformers has them, else when it makes them; a second call
    changes nothing."""
    if TABLES_IN in sys.modules:
        prepare(sys.modules[TABLES_IN])
    elif not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
