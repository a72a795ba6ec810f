"""``specs-fast run | eval | report | doctor | bench``: the only place that reads the command line and the environment.

Mistakes of the user (a bad configuration, a missing file) are one line on stderr and exit code 2;
``SPECS_FAST_TRACEBACK=1`` shows where they were found. Results go to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib
import importlib.util
import json
import os
import random
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from specs_fast.config import ConfigError, EvalConfig, SpecsConfig, config_hash, identity, load_config, to_yaml
from specs_fast.config import with_sources as config_with_sources
from specs_fast.progress import Progress, console_progress
from specs_fast.structured import differing_keys, to_data

USER_ERROR = 2
INTERRUPTED = 130
_OVERRIDE = re.compile(r"(--)?[A-Za-z_][\w.-]*=")


class UsageError(ValueError):
    """An option of the command line that cannot be; its text says it all."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for a mistake of the user, 130 when interrupted."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        options.command(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues after the last finished stage", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has seen enough (for example `| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("SPECS_FAST_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        if not isinstance(error, ConfigError | FileNotFoundError | UsageError):
            print("(SPECS_FAST_TRACEBACK=1 shows where this was found)", file=sys.stderr)
        return USER_ERROR
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The parsed command line; ``options.command`` is what it asks for. Exits with code 2 on a usage error."""
    parser = argparse.ArgumentParser(prog="specs-fast", description="Post-training the SPECS way.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a recipe, or continue it after its last finished stage")
    run.add_argument("recipe", type=Path, help="YAML file; see recipes/")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="for example zero.optim.lr=1e-4")
    run.add_argument("--print-config", action="store_true", help="print the whole configuration and stop")
    run.set_defaults(command=run_command)

    evaluation = commands.add_parser("eval", help="evaluate one model folder on question files")
    defaults = EvalConfig()
    evaluation.add_argument("model", type=Path, help="model folder")
    evaluation.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE", help="JSONL question files")
    evaluation.add_argument("--out", type=Path, help="JSON to write (default: eval/<model folder>.json)")
    evaluation.add_argument("--samples", type=int, default=defaults.samples, help="samples per question")
    evaluation.add_argument("--pass-k", type=int, nargs="+", default=None, metavar="K", help="k of pass@k")
    evaluation.add_argument("--temperature", type=float, default=defaults.temperature)
    evaluation.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens)
    evaluation.add_argument("--limit", type=int, default=None, help="questions per file, from the first")
    evaluation.add_argument("--seed", type=int, default=defaults.seed)
    evaluation.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    evaluation.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    evaluation.add_argument("--no-greedy", action="store_true", help="leave out greedy decoding")
    evaluation.set_defaults(command=eval_command)

    report = commands.add_parser("report", help="write a run folder's report.html and print its table")
    report.add_argument("run_dir", type=Path)
    report.set_defaults(command=report_command)

    doctor = commands.add_parser("doctor", help="devices, versions, and which backend every op uses")
    doctor.add_argument("--json", action="store_true", help="as JSON")
    doctor.set_defaults(command=doctor_command)

    commands.add_parser("bench", help="measure an op against its peers (source checkout only)", add_help=False)
    if list(arguments[:1]) == ["bench"]:  # its options are its own, and cost an import of torch
        return argparse.Namespace(command=bench_command, arguments=list(arguments[1:]))

    options, rest = parser.parse_known_args(list(arguments))
    # argparse stops taking positional arguments at an option; overrides may stand anywhere, and be written --key=value.
    loose = [argument for argument in rest if options.command is run_command and _OVERRIDE.match(argument)]
    if len(loose) < len(rest):
        parser.error(f"unrecognized arguments: {' '.join(argument for argument in rest if argument not in loose)}")
    if options.command is run_command:
        options.overrides = [override.removeprefix("--") for override in [*options.overrides, *loose]]
    return options


def run_command(options: argparse.Namespace) -> None:
    """``run``: lab, stages, evaluation, table, report; each part is skipped where it is already there."""
    config = load_config(options.recipe, options.overrides)
    if options.print_config:
        print(to_yaml(config), end="")
        return
    importable_from_here(config)
    progress = console_progress()
    run_dir = Path(config.output_dir)
    with locked(run_dir):
        claim(run_dir, config)
        prepare(config)
        info = RunInfo(run_dir, config)
        with info.timed("lab"):
            config = with_lab(config, run_dir, progress)
        info.write(base_model=config.model.path)
        from specs_fast.methods import specs

        models = specs.run(config, run_dir, progress)
        with info.timed("evaluation"):
            evaluate_models(config, models, run_dir, progress)
        info.write(finished=_now())
    show(run_dir)


def eval_command(options: argparse.Namespace) -> None:
    """``eval``: one model on some files."""
    from specs_fast.evals.run import evaluate
    from specs_fast.report.run_data import Evaluation, read_jsonl
    from specs_fast.report.table import before_after, console_tables

    splits = {path.stem: path for path in options.data}
    if len(splits) < len(options.data):
        raise ValueError(f"--data: two files have the same name: {', '.join(map(str, options.data))}; rename one")
    for path in options.data:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
    pass_k = options.pass_k or sorted({1, options.samples})
    config = EvalConfig(
        splits={name: str(path) for name, path in splits.items()},
        limit=options.limit,
        samples=options.samples,
        pass_k=tuple(pass_k),
        temperature=options.temperature,
        max_new_tokens=options.max_new_tokens,
        greedy=not options.no_greedy,
        seed=options.seed,
    )
    quiet_libraries()
    out = options.out or Path("eval") / f"{options.model.resolve().name}.json"
    result = evaluate(
        options.model, splits, config, out, device=options.device, dtype=options.dtype, progress=console_progress()
    )
    rows = read_jsonl(out.with_name(f"{out.stem}.completions.jsonl"))
    _print(console_tables(before_after({options.model.resolve().name: Evaluation(result, rows)})))
    print(f"written: {out}")


def report_command(options: argparse.Namespace) -> None:
    """``report``: the page and the table of a run folder, finished or not."""
    show(options.run_dir)


def doctor_command(options: argparse.Namespace) -> None:
    """``doctor``: what is here."""
    from specs_fast.doctor import diagnosis, diagnosis_tables

    data = diagnosis()
    if options.json:
        print(json.dumps(data, indent=2))
    else:
        _print(diagnosis_tables(data))


def bench_command(options: argparse.Namespace) -> None:
    """``bench``: the runner in ``bench/``, which a source checkout has and an installed package has not."""
    root = Path(__file__).resolve().parents[1]
    runner = source_package("bench", root).run
    parser = argparse.ArgumentParser(prog="specs-fast bench", description="Measure an op against its peers.")
    runner.add_arguments(parser)
    try:
        code = runner.exit_code(runner.run(parser.parse_args(options.arguments)))
    except runner.BadOption as error:
        raise UsageError(str(error)) from error
    if code:
        sys.exit(code)


def source_package(name: str, root: Path) -> Any:
    """The package ``name`` of the checkout at ``root`` with its module ``run``; UsageError where ``root`` is no checkout."""
    folder = root / name
    if not (folder / "run.py").is_file():
        raise UsageError(
            f"specs-fast {name} needs a source checkout, with its {name}/ folder and the results in it; there is none at "
            f"{root}. Clone the repository, install it with `pip install -e .`, and call specs-fast {name} again"
        )
    loaded = sys.modules.get(name)
    if loaded is None or getattr(loaded, "__file__", None) != str(folder / "__init__.py"):
        load_package(name, folder)
    importlib.import_module(f"{name}.run")
    return sys.modules[name]


def load_package(name: str, folder: Path) -> None:
    """Import ``folder`` as the package ``name``, wherever Python looks for packages."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    package = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)


def show(run_dir: Path) -> None:
    """Print the before/after tables (in-distribution and the pool of the others, where there is one), write the report and
    print where it is."""
    from specs_fast.report import build
    from specs_fast.report.run_data import read_run
    from specs_fast.report.table import before_after, console_tables, splits_of

    evaluations = read_run(run_dir).evaluations
    rows = before_after(evaluations)
    if rows:
        splits = splits_of(rows)
        parts = [
            part for e in evaluations.values() for pool in (e.summary.get("pooled") or {}).values() for part in pool
        ]
        _print(console_tables(rows, [split for split in splits if split not in parts]))
        if parts:
            print(f"ood pools {', '.join(dict.fromkeys(parts))}; the report has each of them")
    else:
        print("no evaluation is there yet")
    print(f"report: {build(run_dir)}")


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold a run folder alone. ValueError where another process holds it; a killed process holds nothing.

    A POSIX record lock, because it belongs to this process only: a worker that survives its killed parent does not keep it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "?"
            raise ValueError(
                f"{run_dir}: another process (pid {holder}) is working in this run folder; wait for it or stop it, "
                "or give this run another output_dir"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def importable_from_here(config: SpecsConfig) -> None:
    """Let functions that the configuration names by import path lie in the current directory, as ``python -m`` does.

    It comes last, so that no file there hides an installed package.
    """
    names = [*(reward.name for reward in config.rewards), config.pairs.judge]
    if any(":" in name for name in names) and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def claim(run_dir: Path, config: SpecsConfig) -> None:
    """Write ``config.yaml``; where a stage is finished already, check that the folder's own trains the same thing.

    Evaluation settings, name and threads may change between two starts. ValueError naming the keys that may not.
    """
    from specs_fast.report.run_data import STAGES

    path = run_dir / "config.yaml"
    if path.is_file() and any((run_dir / stage).exists() for stage in STAGES):
        try:
            made_with = identity(load_config(path))
        except ConfigError as error:
            raise ValueError(
                f"{run_dir} holds a configuration that cannot be read: {error}. {_way_out(run_dir)}"
            ) from None
        differences = differing_keys(made_with, identity(config))
        if differences:
            listed = "".join(f"\n  {line}" for line in differences)
            raise ValueError(
                f"{run_dir} was made with another configuration (there -> asked for):{listed}\n{_way_out(run_dir)}"
            )
    temporary = path.with_name("config.yaml.tmp")
    temporary.write_text(to_yaml(config), encoding="utf-8")
    os.replace(temporary, path)


def prepare(config: SpecsConfig) -> None:
    """Threads and global seeds; the stages' own randomness comes from explicit seeds."""
    import numpy
    import torch

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    random.seed(config.seed)
    numpy.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    quiet_libraries()


def quiet_libraries() -> None:
    """Errors only from transformers, and no bars of its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def with_lab(config: SpecsConfig, run_dir: Path, progress: Progress) -> SpecsConfig:
    """The configuration with the lab's model and files, which are built where they are not there yet."""
    if config.lab is None:
        return config
    from specs_fast import lab

    if not (run_dir / "lab" / lab.DONE).is_file():
        progress.say("building the lab: questions, images, base model")
    paths = lab.build(config.lab, run_dir)
    splits = {name: str(path) for name, path in paths.eval_splits.items()}
    return config_with_sources(config, model_path=str(paths.base_dir), train=str(paths.train), splits=splits)


def evaluate_models(config: SpecsConfig, models: dict[str, Path], run_dir: Path, progress: Progress) -> None:
    """Evaluate every model that has no evaluation with these settings yet, base first."""
    from specs_fast.evals.run import evaluate
    from specs_fast.report.run_data import read_json
    from specs_fast.train.stage_dir import fingerprint, write_json

    if not config.eval.splits:
        progress.say("eval.splits is empty: no model is evaluated")
        return
    folder = run_dir / "eval"
    folder.mkdir(exist_ok=True)
    splits = {name: Path(path) for name, path in config.eval.splits.items()}
    model_settings = {"device": config.model.device, "dtype": config.model.dtype}
    settings = to_data(replace(config.eval, splits={})) | model_settings
    files = {name: sha256(path.read_bytes()).hexdigest()[:16] for name, path in splits.items()}
    for name, model_dir in models.items():
        out, marker = folder / f"{name}.json", folder / f"{name}.DONE.json"
        wanted = {"model": fingerprint(model_dir), "settings": settings, "files": files}
        if out.is_file() and read_json(marker) == wanted:
            continue
        marker.unlink(missing_ok=True)
        evaluate(model_dir, splits, config.eval, out, **model_settings, progress=progress)
        write_json(marker, wanted)


class RunInfo:
    """``run.json``: when, where and how a run was made, and how long the parts outside the stages took."""

    def __init__(self, run_dir: Path, config: SpecsConfig) -> None:
        from specs_fast.doctor import machine, versions
        from specs_fast.report.run_data import read_json

        self.path = run_dir / "run.json"
        self.data: dict[str, Any] = read_json(self.path)
        self.data.setdefault("started", _now())
        self.data.setdefault("seconds", {})
        self.write(
            name=config.name,
            config_hash=config_hash(config),
            command=["specs-fast", *map(shlex.quote, sys.argv[1:])],
            versions=versions(),
            machine=machine(),
        )

    def write(self, **values: Any) -> None:
        """Add values and write the file."""
        from specs_fast.train.stage_dir import write_json

        self.data.update(values)
        write_json(self.path, self.data)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the block's seconds to those that earlier starts spent on the same part."""
        started = time.perf_counter()
        yield
        self.data["seconds"][part] = self.data["seconds"].get(part, 0.0) + time.perf_counter() - started
        self.write()


def _way_out(run_dir: Path) -> str:
    return f"Give another folder (output_dir=...), or delete {run_dir} to start again"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _print(tables: Any) -> None:
    """Rich output; wide enough for the tables where stdout is not a terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(tables)
