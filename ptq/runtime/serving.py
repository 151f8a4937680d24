"""Which server runs a model: vLLM where it is installed and reads the checkpoint rightly, else that
of transformers. There is none of our own."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from ptq.checkpoint.dialect import Dialect, Export
from ptq.checkpoint.dialect_choice import refusal
from ptq.checkpoint.dialects import DIALECTS
from ptq.checkpoint.engines import INSTALL, VLLM, Verdict
from ptq.checkpoint.reader import Checkpoint, config_dtype, read_config

# what ``transformers serve`` imports beside transformers
SERVING = ("fastapi", "uvicorn")
PLUGINS = "vllm.general_plugins"  # the entry points that vLLM calls
# its program, which also reads what ptq writes
TRANSFORMERS = "import ptq.hf; from transformers.cli.transformers import main; main()"


@dataclass(frozen=True)
class Server:
    """A program that serves a model.

    Attributes:
        command: its arguments, the program first.
        reason: why this one and not vLLM; None for vLLM.
    """

    command: list[str]
    reason: str | None


def choose_server(path: Path, *, host: str, port: int, more: Sequence[str] = ()) -> Server:
    """The server for the model in ``path``.

    Args:
        more: arguments that are passed on.

    Raises:
        FileNotFoundError, ValueError: no checkpoint there; or neither server can run it, each with
            the reason.
    """
    place = ["--host", host, "--port", str(port), *more]
    reason = without_vllm(path)
    program = find_program("vllm")
    if reason is None and program is None:
        reason = "vLLM is not installed"
    if reason is None and program is not None and needs_plugin(path) and not has_plugin(program):
        reason = f"{program} needs the plugin of ptq for it, `{INSTALL}` in its environment"
    if reason is None and program is not None:
        return Server([program, "serve", str(path), *place, *_cache(path, more)], None)
    if missing := missing_for_transformers(path):
        names = [name.replace("_", "-") for name in missing if name not in SERVING]
        packages = ["'transformers[serving]'"] * (len(names) < len(missing)) + names
        raise ValueError(
            f"no server runs {path}: {reason}; transformers needs {' and '.join(missing)}: pip "
            f"install {' '.join(packages)}"
        )
    return Server([sys.executable, "-c", TRANSFORMERS, "serve", str(path), *place], reason)


def _cache(path: Path, more: Sequence[str]) -> list[str]:
    """That vLLM is to use the scales of keys and values that a checkpoint has, unless the user
    chooses."""
    option = "--kv-cache-dtype"
    if dialect_in(path) is None or any(word.partition("=")[0] == option for word in more):
        return []
    kept = Checkpoint(path).parsed.kv_cache
    return [] if kept is None else [option, kept]


def without_vllm(path: Path) -> str | None:
    """Why vLLM cannot run the model in ``path``, or None if it can."""
    dialect = dialect_in(path)
    if dialect is None:
        return None
    checkpoint = Checkpoint(path)
    dtype = config_dtype(checkpoint.config)
    export = Export(layers=checkpoint.layers, dtype=dtype, scales={})
    reason = refusal(dialect, export, (VLLM,))
    return f"vLLM does not run it rightly: {reason}" if reason else None


def needs_plugin(path: Path) -> bool:
    """Whether vLLM reads the checkpoint in ``path`` only with ptq's plugin."""
    dialect = dialect_in(path)
    if dialect is None:
        return False
    return dialect.opens(Checkpoint(path).layers)[VLLM].verdict is Verdict.INSTALL


def has_plugin(program: str) -> bool:
    """Whether ``program`` is of this environment, and ptq is installed in it."""
    here = Path(program).parent == Path(sys.executable).parent
    return here and any(found.name == "ptq" for found in entry_points(group=PLUGINS))


def missing_for_transformers(path: Path) -> list[str]:
    """The packages that transformers' server needs for the model in ``path`` and that are not
    here."""
    wanted: list[str] = [*SERVING]
    dialect = dialect_in(path)
    if dialect is not None:
        wanted.extend(dialect.needs)
    return [name for name in wanted if find_spec(name) is None]


def dialect_in(path: Path) -> Dialect | None:
    """The dialect of a quantized checkpoint; None of a model of another kind."""
    quantization = read_config(path).get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return DIALECTS.get(str(method))


def find_program(name: str) -> str | None:
    """Where a program is: beside this Python, or on the PATH."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
