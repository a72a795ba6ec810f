"""What this machine is and which backend every op uses on it, and why: ``specs-fast doctor`` and a run's ``run.json``."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table

from specs_kernels import dispatch, native

# Distribution name -> what it is to us. Absent ones are optional unless the installation is broken.
PACKAGES = {
    "specs-fast": "this program",
    "torch": "tensors, autograd, FSDP2",
    "triton": "GPU kernels",
    "transformers": "models and processors",
    "safetensors": "weights",
    "math-verify": "accuracy rewards",
    "numpy": "",
    "pillow": "images",
    "flash-attn": "attention on GPUs (extra: flash-attn)",
    "liger-kernel": "RMSNorm, SwiGLU, RoPE on GPUs (extra: gpu)",
    "bitsandbytes": "8-bit optimizer on GPUs (extra: gpu)",
    "trl": "host for the pair files and the kernels (extra: trl)",
}


def versions() -> dict[str, str | None]:
    """Distribution name to installed version, None where it is not installed; ``python`` first."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict[str, Any]:
    """Processor, threads, memory and GPUs as PyTorch sees them. Memory in GiB."""
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
                "processors": properties.multi_processor_count,
            }
        )
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": _usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "gpu": gpus[0]["name"] if gpus else None,
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def ops() -> list[dict[str, Any]]:
    """For every op the backend that ``backend="auto"`` runs here, why, and which other ones can be named."""
    return [
        {
            "op": choice.op,
            "backend": choice.backend,
            "reason": choice.reason,
            "available": list(dispatch.backends(choice.op)),
        }
        for choice in dispatch.describe()
    ]


def native_library() -> dict[str, Any]:
    """Whether the C++ library of the CPU kernels is there, and which instructions it uses."""
    return {"built": native.missing() is None, "instruction_set": native.instruction_set(), "missing": native.missing()}


def diagnosis() -> dict[str, Any]:
    """Everything that ``doctor`` prints, as plain data."""
    return {"machine": machine(), "versions": versions(), "native": native_library(), "ops": ops()}


def diagnosis_tables(data: dict[str, Any]) -> Group:
    """The same for a terminal."""
    hardware = _table("machine", "", "")
    about = data["machine"]
    hardware.add_row("processor", f"{about['cpu']}, {about['cores']} usable cores, {about['memory_gib']} GiB memory")
    hardware.add_row("threads", f"{about['threads']} (PyTorch; a run's own number is its key threads)")
    for gpu in about["gpus"]:
        detail = f"{gpu['memory_gib']} GiB, compute capability {gpu['capability']}, {gpu['processors']} processors"
        hardware.add_row("GPU", f"{gpu['name']}, {detail}")
    if not about["gpus"]:
        built = about["cuda"] or about["hip"]
        reason = f"this PyTorch is built for {built}, but sees no device" if built else "this PyTorch is built for CPU"
        hardware.add_row("GPU", f"none: {reason}")
    library = data["native"]
    hardware.add_row("CPU kernels", f"C++, {library['instruction_set']}" if library["built"] else library["missing"])
    installed = _table("versions", "", "", "for")
    for name, number in data["versions"].items():
        installed.add_row(name, number or "not installed", PACKAGES.get(name, ""))
    backends = _table("ops", "", "backend", "why", "can be named")
    for row in data["ops"]:
        backends.add_row(row["op"], row["backend"], row["reason"], ", ".join(row["available"]))
    return Group(hardware, "", installed, "", backends)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.show_header = any(columns)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None
