"""Which engine opens which kind of checkpoint, measured: engine × dialect × format × {dense, MoE} ×
{none, online rotation} × {W4A16, W4A4}.

    scripts/test_engines [--out results/engines] [--only TEXT] [--probes vllm_plugin] [--missing]
    scripts/test_engines --perplexity MODEL TEXT

The dense model is the bundled one, the other a random Mixtral with its tokenizer; both are rounded
to nearest, for what is asked is whether an engine computes what the files say. Writes
ptq/checkpoint/engine_results.json, which the card and "exactly" rely on, and docs/engines.md;
with ``--probes`` only those are opened again, with ``--missing`` only what has no result yet in the
versions at hand. ``--perplexity`` measures a model in vLLM
(scripts/engine_perplexity.py), and writes that into the page.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from engine_perplexity import measure
from transformers import MixtralConfig, MixtralForCausalLM

from ptq.checkpoint.dialect_choice import Readers
from ptq.checkpoint.dialects import DIALECTS
from ptq.checkpoint.engines import (
    ENGINES,
    IMPORTED,
    PLUGGED,
    REFUSED,
    RESULTS,
    UNCLEAR,
    Kind,
    Result,
    results,
)
from ptq.checkpoint.reader import Checkpoint
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.run import quantize_model
from ptq.runtime import engine_probe
from ptq.runtime.engine_check import AGAIN, judged, token_ids
from ptq.runtime.engine_probe import IN_FLOAT32
from ptq.runtime.loaded_model import demo_path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "engines.md"
FORMATS = ("nvfp4", "mxfp4", "nvint4", "mxfp8")
# Unrotated ones besides, for these schemes, in the dialect ptq dense alone; of two formats the
# second is that of attention.
BESIDES = (
    ("compressed-tensors", ("int4-g128", "int4-g32", "mxint4"), ("w4a16",)),
    ("compressed-tensors", ("nvfp4+mxfp8", "fp8-channel", "nvfp4+fp8-channel"), ("w4a16", "w4a4")),
    ("ptq", ("int4-g128", "int4-g32"), ("w4a16",)),
    ("ptq", ("mxint4", "mxint6", "mxfp6", "mxint8", "fp8-channel"), ("w4a16", "w4a4")),
)
ATTENTION = "re:.*self_attn.*"
ROTATION = 32
SECONDS = 1800
# Environment → the ways in which it opens checkpoints, by the name of the probe.
ENVIRONMENTS = {
    "oldest": {"plain": "transformers", "plugin": IMPORTED},
    "newest": {
        "plain": "transformers",
        "plugin": IMPORTED,
        "lm_eval": "lm-eval after import ptq",
    },
    "vllm": {"vllm": "vLLM", "vllm_plugin": PLUGGED},
}
PROBES = tuple(dict.fromkeys(probe for known in ENVIRONMENTS.values() for probe in known))
PERPLEXITY = "## Perplexity"
HEAD = (
    "Written by `scripts/test_engines`, which opens every kind of checkpoint in every engine that",
    "runs without a GPU, and compares probabilities over the whole vocabulary after each of 32",
    "tokens with those of `ptq.load` in float32: KL in nats per token, and in parentheses that of",
    "`ptq.load` in bfloat16, the yardstick. *Works* is a median of at most ten times that, and of",
    "at most 0.1: inputs that round to the other side make more than that in a random model, where",
    "nothing can be told unless every logit is the same; vLLM with ptq's plugin is asked again",
    "there, in float32 (*32*). `=` says that every logit is that of `ptq.load` in bfloat16, bit by",
    "bit. *16* works with inputs in 16 bits where the checkpoint quantizes them.",
    f"Rotation is online, in blocks of {ROTATION}. Of two formats the second is of attention.",
    "Dense is the bundled Llama, MoE a random Mixtral; rounded to nearest. What is shown are",
    "means: where that of a MoE is far beyond the yardstick, a router chose other experts for a",
    "token or two (MXFP4 W4A16 in transformers: KL .22 at one token, whose experts differ; medians",
    "are 3.0e-4 and 3.3e-4).",
)
READ = (
    "SGLang and TensorRT-LLM need a GPU, and so does vLLM but for the build for CPUs above. What",
    "their source was read to do with each kind, which `--target` goes by:",
)
OURS = ("reference", "reference_16", "reference_full_16")


@dataclass(frozen=True)
class Cell:
    """A checkpoint that is asked for."""

    dialect: str
    format: str
    experts: bool
    rotated: bool
    scheme: str

    @property
    def name(self) -> str:
        """Of its folder."""
        parts = (
            self.dialect,
            self.format,
            "moe" if self.experts else "dense",
            "rotated" if self.rotated else "plain",
            self.scheme,
        )
        return "-".join(parts)

    @property
    def kind(self) -> Kind:
        """What engines tell it by."""
        return Kind(
            dialect=self.dialect,
            formats="+".join(sorted(self.format.split("+"))),
            experts=self.experts,
            rotated=self.rotated,
            quantize_inputs=self.scheme == "w4a4",
        )


def cells() -> Iterator[Cell]:
    """All of them."""
    for values in product(DIALECTS, FORMATS, (False, True), (False, True), ("w4a16", "w4a4")):
        yield Cell(*values)
    for dialect, formats, schemes in BESIDES:
        kinds = (False,) if dialect == "ptq" else (False, True)
        for fmt, experts, scheme in product(formats, kinds, schemes):
            yield Cell(dialect, fmt, experts, False, scheme)


def moe(folder: Path) -> Path:
    """A random Mixtral of two blocks, whose probabilities are far from uniform."""
    path = folder / "mixtral"
    if (path / "config.json").is_file():
        return path
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        initializer_range=0.15,
    )
    MixtralForCausalLM(config).bfloat16().save_pretrained(path)
    for file in demo_path().glob("tokenizer*"):
        shutil.copy(file, path)
    return path


def write(cell: Cell, models: Mapping[bool, Path], folder: Path) -> str | None:
    """Write the checkpoint, or say why it is refused."""
    out = folder / cell.name
    if (out / "config.json").is_file():
        return None
    fmt, *attention = cell.format.split("+")
    recipe = Recipe.default(
        fmt,
        scheme=cell.scheme,
        algorithm="rtn",
        rotation=ROTATION if cell.rotated else 1,
        input_rule="absmax" if cell.scheme == "w4a4" else None,
        rules=tuple((ATTENTION, {"format": other}) for other in attention),
        samples=4,
        seq_len=64,
    )
    try:
        quantize_model(
            models[cell.experts], out, recipe=recipe, device="cpu", dialect=readers(cell)
        )
    except ValueError as error:
        return str(error)
    return None


def readers(cell: Cell) -> Readers:
    """In that dialect, for the engine that can read most of what it holds."""
    return Readers(cell.dialect, "vllm" if cell.dialect == "modelopt" else "transformers")


def run(
    environment: str, probe: str, names: Sequence[str], folder: Path, python: Path
) -> dict[str, dict[str, Any]]:
    """The answers of a probe, by the name of the checkpoint: of one process, or where that dies of
    one of them, of the next."""
    place = folder / "answers" / environment / probe
    place.mkdir(parents=True, exist_ok=True)
    jobs = [
        {
            "path": str(folder / name),
            "tokens": token_ids(Checkpoint(folder / name)),
            "result": str(place / f"{name}.pt"),
        }
        for name in names
    ]
    (place / "jobs.json").write_text(json.dumps(jobs))
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "scripts" / "path"), "OMP_NUM_THREADS": "1"}
    while left := [job for job in jobs if not Path(job["result"]).is_file()]:
        print(f"{environment} {probe}: {len(left)} to open", file=sys.stderr, flush=True)
        command = [str(python), "-P", engine_probe.__file__, probe, str(place / "jobs.json")]
        try:
            done = subprocess.run(
                command, env=environ, capture_output=True, timeout=SECONDS, check=False
            )
            reason = f"its process ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"no answer after {SECONDS} s"
        still = [job for job in left if not Path(job["result"]).is_file()]
        if still:  # the first of them is what it died of
            torch.save({"version": "", "error": reason}, still[0]["result"])
    return {
        name: torch.load(job["result"], weights_only=True)
        for name, job in zip(names, jobs, strict=True)
    }


def judge_all(
    answers: Mapping[str, Mapping[str, Any]], ours: Mapping[str, Mapping[str, Any]], engine: str
) -> dict[str, Result]:
    """What those of an engine mean, beside those of :data:`OURS`."""
    found = {}
    for name, answer in answers.items():
        exact, rounded, full = (ours[probe].get(name, {}).get("logits") for probe in OURS)
        if exact is None or rounded is None:
            raise SystemExit(f"ptq.load does not open {name}: {ours['reference'][name]['error']}")
        wanted = full if name.endswith("w4a4") else None
        found[name] = judged(engine, answer, exact, rounded, wanted)
    return found


def kept(cells: Sequence[Cell], probes: Sequence[str]) -> list[tuple[Cell, Result]]:
    """The results of ``cells`` in engines that none of ``probes`` opens again."""
    again = {names[p] for names in ENVIRONMENTS.values() for p in probes if p in names}
    old = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
    by_kind = {cell.kind: cell for cell in cells}
    found = [(Kind(**row["kind"]), Result(**row["result"])) for row in old]
    return [(by_kind[k], r) for k, r in found if k in by_kind and r.engine not in again]


def version(python: Path, probe: str) -> str:
    """Of the engine that a probe opens in an environment."""
    place = str(Path(engine_probe.__file__).parent)
    code = f"import sys; sys.path.append({place!r}); import engine_probe as p; "
    command = [str(python), "-P", "-c", f"{code}print(p.versions({probe!r}))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def of_version(
    rows: Sequence[tuple[Cell, Result]], engine: str, version: str
) -> dict[str, tuple[Cell, Result]]:
    """The rows of an engine in that version, by the name of the checkpoint."""
    return {
        cell.name: (cell, result)
        for cell, result in rows
        if result.engine == engine and result.version.removesuffix(IN_FLOAT32) == version
    }


def section(title: str) -> list[str]:
    """The lines of a section of the page as it is, from its title to the next one."""
    lines = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.is_file() else []
    if title not in lines:
        return []
    rest = lines[lines.index(title) :]
    end = next((i for i, line in enumerate(rest) if i and line.startswith("## ")), len(rest))
    return rest[:end]


def page(
    rows: Sequence[tuple[Cell, Result]],
    refused: Mapping[str, str],
    absent: Sequence[str],
    perplexity: Sequence[str] = (),
) -> str:
    """docs/engines.md."""
    engines = list(dict.fromkeys(_column(r) for _, r in rows))
    lines = [
        "# Engines",
        "",
        *HEAD,
        "",
        "## Measured",
        "",
        "| checkpoint | " + " | ".join(f"{name}, {version}" for name, version in engines) + " |",
        "|---|" + "---|" * len(engines),
    ]
    notes: dict[str, int] = {}
    by_cell: dict[Cell, dict[tuple[str, str], Result]] = {}
    for cell, result in rows:
        by_cell.setdefault(cell, {})[_column(result)] = result
    for cell, by_engine in by_cell.items():
        said = [_cell(by_engine.get(engine), notes) for engine in engines]
        lines.append(f"| {_title(cell)} | " + " | ".join(said) + " |")
    lines += ["", *(f"{number}. {reason}" for reason, number in notes.items()), ""]
    lines += [f"Not installed here, so not run: {', '.join(absent)}.", ""] if absent else []
    lines += perplexity
    lines += ["## Not written", "", "What `ptq` refuses, with what it says:", ""]
    by_reason: dict[str, list[str]] = {}
    for name, reason in refused.items():
        by_reason.setdefault(reason, []).append(name)
    lines += [f"- {reason}: {'; '.join(names)}" for reason, names in by_reason.items()]
    lines += [
        "",
        "## Read, not run",
        "",
        *READ,
        "",
        "| checkpoint | " + " | ".join(ENGINES) + " |",
        "|---|" + "---|" * len(ENGINES),
    ]
    for cell in by_cell:
        checkpoint_layers = layers_of(cell)
        openings = DIALECTS[cell.dialect].opens(checkpoint_layers)
        verdicts = (openings[engine].verdict.value for engine in ENGINES)
        lines.append(f"| {_title(cell)} | " + " | ".join(verdicts) + " |")
    return "\n".join([*lines, ""])


_LAYERS: dict[str, Any] = {}


def layers_of(cell: Cell) -> Any:
    """The layers of the checkpoint that was written."""
    return _LAYERS[cell.name]


def _title(cell: Cell) -> str:
    kind = "MoE" if cell.experts else "dense"
    return f"{cell.dialect} {cell.format} {cell.scheme}, {kind}{', rotated' * cell.rotated}"


def _column(result: Result) -> tuple[str, str]:
    return result.engine, result.version.removesuffix(IN_FLOAT32)


def _cell(result: Result | None, notes: dict[str, int]) -> str:
    if result is None:
        return "—"
    if result.outcome == REFUSED:
        number = notes.setdefault(result.reason or "", len(notes) + 1)
        return f"refused [{number}]"
    kl = "" if result.kl is None else f" {result.kl:.0e} ({result.yardstick:.0e})"
    narrow = " 16" if result.outcome != "works" and result.works else ""
    word = "works" if result.works else f"**{result.outcome}**"
    word += " 32" if result.version.endswith(IN_FLOAT32) else ""
    return f"{word}{narrow}{' =' * result.same_bits}{kl}"


def with_perplexity(page: str, found: Sequence[str]) -> str:
    """``page`` with a section of what was measured, in the place of the one that it has."""
    old = "\n".join([*section(PERPLEXITY), ""])
    new = "\n".join([PERPLEXITY, "", *found, "", ""])
    if old.strip():
        return page.replace(old, new)
    return page.replace("## Not written\n", f"{new}## Not written\n")


def engine_python(environment: str) -> Path:
    """The Python of an environment that ``scripts/test_engines`` makes."""
    return ROOT / ".engines" / environment / "bin" / "python"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "engines")
    parser.add_argument("--only", default="", help="a part of the names of what is opened")
    parser.add_argument("--probes", default=",".join(PROBES), help="the engines that are opened")
    parser.add_argument("--missing", action="store_true", help="keep the results that there are")
    parser.add_argument("--perplexity", nargs=2, type=Path, metavar=("MODEL", "TEXT"))
    options = parser.parse_args()
    folder, chosen = options.out.resolve(), options.probes.split(",")
    folder.mkdir(parents=True, exist_ok=True)
    if options.perplexity:
        model, text = options.perplexity
        found = measure(model, text, folder, engine_python("vllm"))
        PAGE.write_text(with_perplexity(PAGE.read_text(encoding="utf-8"), found))
        print("\n".join(found))
        return
    models = {False: demo_path(), True: moe(folder)}
    refused, written = {}, []
    for cell in cells():
        if options.only not in cell.name:
            continue
        if reason := write(cell, models, folder):
            refused[_title(cell)] = reason
        else:
            written.append(cell)
            _LAYERS[cell.name] = Checkpoint(folder / cell.name).layers
    names = [cell.name for cell in written]
    ours = {}
    for probe in OURS:
        asked = names if probe != OURS[-1] else [n for n in names if n.endswith("w4a4")]
        ours[probe] = run("ours", probe, asked, folder, Path(sys.executable))
    rows, old, absent = kept(written, chosen), kept(written, ()), []
    for environment, known in ENVIRONMENTS.items():
        probes, python = {p: known[p] for p in chosen if p in known}, engine_python(environment)
        if not python.is_file():
            absent += [f"{name} ({environment})" for name in probes.values()]
            continue
        for probe, engine in probes.items():
            had = of_version(old, engine, version(python, probe)) if options.missing else {}
            rows += had.values()
            left = [name for name in names if name not in had]
            found = judge_all(run(environment, probe, left, folder, python), ours, engine)
            noisy = [name for name, result in found.items() if result.outcome == UNCLEAR]
            if noisy and (again := AGAIN.get(probe)) is not None:
                found |= judge_all(run(environment, again, noisy, folder, python), ours, engine)
            rows += [(cell, found[cell.name]) for cell in written if cell.name in found]
    rows.sort(key=lambda row: written.index(row[0]))
    if not options.only:
        data = [{"kind": asdict(cell.kind), "result": r.to_dict()} for cell, r in rows]
        RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, data)) + "\n]\n")
        results.cache_clear()
        PAGE.write_text(page(rows, refused, absent, section(PERPLEXITY)))
    for cell, result in rows:
        print(f"{cell.name:48} {result.engine:28} {_cell(result, {})} {result.reason or ''}")


if __name__ == "__main__":
    main()
