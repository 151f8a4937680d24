"""ptq beside other tools: the same model, the same tokens, one scorer.

    scripts/compare_peers [--model DIR] [--calibration FILE] [--text FILE …] [--out FILE.json]

Calibration text is cut into windows once for each seed by ptq, and every tool gets their token ids.
Each run is a process of its own, so that its CPU seconds (user and system) and its largest memory
are known. Results go to --out, the table and the pictures beside it; finished runs are not repeated
when the same command is given again, failed ones are. Checkpoints stay in --work.
"""

import argparse
import hashlib
import json
import shutil
import signal
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peers.check import check_scorer
from peers.methods import FORMAT_NAMES, METHODS, SCHEMES, TOOLS, Run, last_line, recipe, runs
from peers.modelopt_mxfp4 import readable
from peers.page import page
from peers.picture import draw
from peers.run import ROOT, environment, installed, machine, measured, python_of, versions_of
from peers.score import Original, open_checkpoint, read_text, score
from pictures import THEMES
from safetensors.torch import save_file
from torch import Tensor

from ptq.checkpoint.reader import Checkpoint
from ptq.checkpoint.safetensors_files import sha256
from ptq.runtime.loaded_model import resolve_model
from ptq.text.windows import load_calibration, load_tokenizer

DRIVERS = ROOT / "scripts" / "peers"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="demo", help="a directory, or demo, the bundled model")
    add("--calibration", default="builtin", help="text to cut windows of; builtin for the demo's")
    add("--text", action="append", help="held-out text, repeatable; builtin for the demo's")
    add("--samples", type=int, default=32, help="windows of calibration text")
    add("--seq-len", type=int, default=512, help="tokens in each, and in those of held-out text")
    add("--max-tokens", type=int, default=8192, help="of each held-out text")
    add("--peers", nargs="+", default=list(TOOLS), metavar="TOOL", help=", ".join(TOOLS))
    add("--formats", nargs="+", default=list(FORMAT_NAMES), metavar="FORMAT")
    add("--schemes", nargs="+", default=list(SCHEMES), metavar="SCHEME")
    keys = ", ".join(dict.fromkeys(method.key for method in METHODS))
    add("--methods", nargs="+", metavar="KEY", help=f"only these: {keys}")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the choice of windows")
    add("--threads", type=int, default=1, help="OMP_NUM_THREADS of every run")
    add("--runs", type=int, help="stop after so many, to go on another time")
    add("--check", action="store_true", help="only compare the scorer with transformers")
    add("--out", type=Path, default=ROOT / "results" / "peers.json", help="results, as JSON")
    add("--work", type=Path, default=ROOT / "results" / "peers", help="checkpoints and logs")
    return parser.parse_args()


# ---------------------------------------------------------------- what is asked of it


class Comparison:
    """The results file, and what every run needs."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Raises ValueError for a results file of other settings."""
        self.args, self.out, self.work = args, args.out.resolve(), args.work.resolve()
        self.model = resolve_model(args.model).resolve()
        self.tokenizer = load_tokenizer(self.model)
        self.work.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        for file in sorted(self.model.glob("*.safetensors")):
            digest.update(sha256(file).encode())
        self.original = Original(self.model, self.work, digest.hexdigest())
        self.texts = [
            read_text(text, self.tokenizer, args.seq_len, args.max_tokens)
            for text in args.text or ["builtin"]
        ]
        if len({text.name for text in self.texts}) < len(self.texts):
            raise ValueError("two held-out texts have the same name; rename a file")
        calibration = args.calibration
        self.calibration = (
            str(Path(calibration).resolve()) if Path(calibration).is_file() else calibration
        )
        known = json.loads(self.out.read_text("utf-8")) if self.out.is_file() else None
        settings = {
            "model": self.model.name,
            "model_sha256": digest.hexdigest(),
            "calibration": Path(calibration).name,
            "samples": args.samples,
            "seq_len": args.seq_len,
            "threads": args.threads,
            "machine": machine(),
            "texts": [
                {"name": t.name, "sha256": t.sha256, "predictions": t.predictions}
                for t in self.texts
            ],
        }
        if known is not None:
            self._compare(settings, known["settings"])
            self.data: dict[str, Any] = known
            return
        for text, about in zip(self.texts, settings["texts"], strict=True):
            about["perplexity"] = round(self.original.perplexity(text), 4)
        self.data = {"settings": settings, "windows": {}, "absent": [], "runs": []}

    def _compare(self, settings: Mapping[str, Any], known: Mapping[str, Any]) -> None:
        """Raises ValueError for a results file of other settings."""
        for name, value in settings.items():
            said = known.get(name)
            if name == "texts":
                said = [{k: v for k, v in text.items() if k != "perplexity"} for text in said or ()]
            if said != value:
                raise ValueError(
                    f"{self.out} has results with another {name}; choose another --out"
                )

    def windows(self, seed: int) -> Tensor:
        """(samples, seq_len) token ids, and their hash noted."""
        args = self.args
        data = load_calibration(
            self.tokenizer,
            self.calibration,
            samples=args.samples,
            seq_len=args.seq_len,
            batch_size=args.samples,
            seed=seed,
        )
        self.data["windows"][str(seed)] = data.description["sha256"]
        return data.batches[0]

    def save(self) -> None:
        """The results, the table and the pictures, each whole or not at all."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        files = {self.out: json.dumps(self.data, indent=1, ensure_ascii=False) + "\n"}
        files[self.out.with_suffix(".md")] = page(self.data, self.out.stem)
        for theme, colours in THEMES.items():
            drawn = draw(colours, self.data)
            files[self.out.with_name(f"{self.out.stem}-{theme}.svg")] = drawn
        for file, content in files.items():
            part = file.with_name(f"{file.name}.part")
            part.write_text(content, "utf-8")
            part.rename(file)

    def finished(self) -> set[str]:
        return {run["key"] for run in self.data["runs"] if "error" not in run}

    # ------------------------------------------------------------ one run

    def command(self, run: Run, folder: Path) -> list[str]:
        """What runs it; writes the file that says what is wanted."""
        windows, job = self.windows(run.seed), folder / "job.json"
        python, out = str(python_of(run.method.tool)), str(folder / "out")
        if run.method.tool == "ptq":
            wanted = recipe(run, self.calibration, self.args.samples, self.args.seq_len)
            job.write_text(json.dumps(wanted))
            command = [python, "-m", "ptq", "quantize", str(self.model), "--recipe", str(job)]
            return [
                *(*command, "--out", out, "--device", "cpu", "--quiet"),
                *("--dialect", run.method.dialect),
            ]
        save_file({"input_ids": windows}, folder / "windows.safetensors")
        wanted = {
            "model": str(self.model),
            "windows": str(folder / "windows.safetensors"),
            "format": run.format,
            "scheme": run.scheme,
            "method": run.method.key,
            "seed": run.seed,
            "out": out,
        }
        job.write_text(json.dumps(wanted))
        return [python, "-P", str(DRIVERS / TOOLS[run.method.tool].driver), str(job)]

    def perform(self, run: Run, versions: Mapping[str, str]) -> dict[str, Any]:
        """Its record; with ``error`` instead of scores where the tool or its result fails."""
        folder = self.work / run.key
        if folder.exists():  # of a run that was broken off, or failed
            shutil.rmtree(folder)
        folder.mkdir()
        out, log = folder / "out", folder / "log.txt"
        record = {
            "key": run.key,
            "tool": run.method.tool,
            "version": next(iter(versions.values())),
            "method": run.method.name,
            "note": run.method.note,
            "format": run.format,
            "scheme": run.scheme,
            "seed": run.seed,
            "date": datetime.now(UTC).date().isoformat(),
            "versions": dict(versions),
        }
        variables = environment(run.method.tool, self.args.threads)
        cost = measured(self.command(run, folder), folder, variables, log)
        if cost.code:
            said = last_line(log.read_text("utf-8", errors="replace"))
            return record | {"error": said if cost.code > 0 else f"ended by signal {-cost.code}"}
        record |= {
            "cpu_seconds": round(cost.cpu_seconds, 1),
            "peak_gb": round(cost.peak_gb, 3),
            "megabytes": round(sum(f.stat().st_size for f in out.glob("*.safetensors")) / 1e6, 2),
        }
        try:
            checkpoint = Checkpoint(readable(out))
            self._check_windows(run, checkpoint)
            model = open_checkpoint(checkpoint.path)
            scores = {text.name: score(model, self.original, text).to_dict() for text in self.texts}
        except (ValueError, OSError) as error:
            return record | {"error": f"not scored: {last_line(str(error))}"}
        return record | {"dialect": checkpoint.dialect, "texts": scores}

    def _check_windows(self, run: Run, checkpoint: Checkpoint) -> None:
        """Of ptq, which cuts its text again: raise ValueError if other windows came of it."""
        method = run.method
        if method.tool != "ptq" or method.own_text or (run.format, run.scheme) in method.blind:
            return
        said = checkpoint.parsed.provenance["calibration"]
        assert isinstance(said, Mapping)
        if said["sha256"] != self.data["windows"][str(run.seed)]:
            raise ValueError("ptq calibrated on other windows than the other tools")


def selected(args: argparse.Namespace) -> list[Run]:
    """Raises ValueError for an unknown name."""
    keys = {method.key for method in METHODS}
    if unknown := sorted(set(args.methods or ()) - keys):
        raise ValueError(f"unknown method {unknown[0]!r}; choose from {', '.join(sorted(keys))}")
    return [
        run
        for run in runs(args.peers, args.formats, args.schemes, args.seeds)
        if args.methods is None or run.method.key in args.methods
    ]


def main() -> int:
    args = options()
    try:
        wanted, here = selected(args), Comparison(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.check:
        return check(here)
    here.data["absent"] = [tool for tool in TOOLS if not installed(tool)]
    done = here.finished()
    left = [run for run in wanted if run.key not in done and installed(run.method.tool)]
    versions = {tool: versions_of(tool) for tool in {run.method.tool for run in left}}
    for run in left[: args.runs]:
        print(f"{run.key} ({len(left)} left)", file=sys.stderr, flush=True)
        record = here.perform(run, versions[run.method.tool])
        known = [other for other in here.data["runs"] if other["key"] != run.key]
        here.data["runs"] = [*known, record]
        here.save()
        print(json.dumps({k: v for k, v in record.items() if k != "versions"}), flush=True)
    if not left:
        here.save()
    return 0


def check(here: Comparison) -> int:
    """Of all finished runs of llm-compressor but those with a rotation, which transformers does not
    apply."""
    found, python, threads = [], python_of("llm-compressor"), here.args.threads
    for run in here.data["runs"]:
        folder = here.work / run["key"]
        plain = run["tool"] == "llm-compressor" and "hadamard" not in run["key"]
        if plain and "error" not in run and (folder / "out").is_dir():
            print(f"checking {run['key']}", file=sys.stderr, flush=True)
            found.append(check_scorer(folder, python, here.original, here.texts[0], threads))
    if not found:
        print("error: --check needs a finished run of llm-compressor in --work", file=sys.stderr)
        return 2
    here.data["checks"] = found
    here.save()
    return 0


def interrupted(*_: object) -> None:
    """Ends the run in progress too: :func:`peers.run.measured` sees to it."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupted)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after what is finished", file=sys.stderr)
        sys.exit(130)
