"""The lab recipe over several seeds: base, zero, cold start and final, mean and spread per split.

    python -m bench.seeds recipes/lab-specs.yaml [key=value ...] --seeds 0 1 2 [--out bench/results/cpu/lab_seeds.json]

Each seed is a whole run (its own training order, samples and cold start) on the same base model and
evaluation questions.
Runs live in ``runs/seeds/<recipe><label>-<seed>`` and continue where they stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.machine import provenance

MODELS = ("base", "zero", "coldstart", "final")
METRICS = ("accuracy_any", "accuracy_strict", "format")


def run_seed(recipe: Path, seed: int, label: str, overrides: list[str]) -> Path:
    """One run to its end; its folder."""
    folder = Path("runs/seeds") / f"{recipe.stem}{label}-{seed}"
    command = [
        sys.executable,
        "-m",
        "specs_fast",
        "run",
        str(recipe),
        f"output_dir={folder}",
        f"seed={seed}",
        *overrides,
    ]
    subprocess.run(command, check=True)
    return folder


def read(folder: Path) -> dict[str, Any]:
    """model -> split -> "sampled"/"greedy" -> metrics of one run."""
    return {model: json.loads((folder / "eval" / f"{model}.json").read_text())["splits"] for model in MODELS}


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, and sample standard deviation over seeds, in percent, of every metric."""
    table: dict[str, Any] = {}
    for model in MODELS:
        for split in runs[0][model]:
            for mode in ("sampled", "greedy"):
                for metric in METRICS:
                    values = [100 * run[model][split][mode][metric] for run in runs]
                    cell = {"mean": round(statistics.mean(values), 2), "values": [round(value, 2) for value in values]}
                    if len(values) > 1:
                        cell["std"] = round(statistics.stdev(values), 2)
                    table.setdefault(split, {}).setdefault(mode, {}).setdefault(metric, {})[model] = cell
    return table


def show(table: dict[str, Any]) -> None:
    for split, modes in table.items():
        for mode, metrics in modes.items():
            for metric, models in metrics.items():
                cells = "  ".join(f"{m} {c['mean']:5.1f}±{c.get('std', 0):3.1f}" for m, c in models.items())
                print(f"{split:10} {mode:8} {metric:16} {cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--label", default="", help="suffix of the run folders, for variants of one recipe")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    started = time.time()
    folders = [run_seed(arguments.recipe, seed, arguments.label, arguments.overrides) for seed in arguments.seeds]
    table = summarise([read(folder) for folder in folders])
    show(table)
    if arguments.out:
        result = {
            **provenance(),
            "recipe": str(arguments.recipe),
            "overrides": arguments.overrides,
            "seeds": arguments.seeds,
            "seconds": round(time.time() - started, 1),
            "percent": table,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
