"""Verify and measure everything on this machine's GPU, in one call from the source tree:

    PYTHONPATH=kernels:. python -m bench.gpu

Every op against its fp64 definition, then `bench.update`. Writes bench/results/<gpu name>/{verify,update}.json with versions
and commit. Exits with 1 where an op fails its check, with 2 where there is no GPU.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from bench.machine import provenance


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU that PyTorch sees; nothing was measured", file=sys.stderr)
        return 2
    folder = (
        Path(__file__).parent / "results" / re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    )
    folder.mkdir(parents=True, exist_ok=True)
    check = [sys.executable, "-m", "specs_kernels.verify", "--device", "cuda", "--json"]
    verified = subprocess.run(check, capture_output=True, text=True, check=False)
    print(verified.stdout[-4000:], verified.stderr[-2000:])
    try:
        rows = json.loads(verified.stdout)
    except json.JSONDecodeError:
        rows = {"error": verified.stderr[-4000:]}
    result = {**provenance(), "exit_code": verified.returncode, "verify": rows}
    (folder / "verify.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    update = [sys.executable, "-m", "bench.update", "--device", "cuda", "--out", str(folder / "update.json")]
    measured = subprocess.run(update, check=False)
    return max(verified.returncode, measured.returncode)


if __name__ == "__main__":
    sys.exit(main())
