"""What the compile gate reads out of a kernel's source, its IR and its assembly."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_SSA = r"%[\w#]+"
_KEEPS_VALUE = (
    "tt.splat",
    "tt.broadcast",
    "tt.expand_dims",
    "tt.reshape",
    "arith.trunci",
    "arith.extsi",
    "ttg.convert_layout",
)
"""Operations whose result is a stride as much as their operand is."""


def dots_without_precision(path: Path) -> list[str]:
    """Calls of ``tl.dot`` in a file that do not state ``input_precision``; on fp32 the default is TF32."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        f"{path.name}:{node.lineno}: tl.dot without input_precision"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "tl.dot"
        and "input_precision" not in {keyword.arg for keyword in node.keywords}
    ]


def narrow_stride_products(ttir: str) -> list[str]:
    """32-bit multiplications in the IR with a stride as an operand, also through casts, splats and broadcasts."""
    strides = set(re.findall(r"(%\w*stride\w*): i(?:32|64)", ttir))
    found = []
    for line in ttir.splitlines():
        match = re.match(rf"\s*({_SSA}) = ([\w.]+) (.*)", line)
        if match is None:
            continue
        result, operation, rest = match.groups()
        operands = set(re.findall(_SSA, rest))
        if not operands & strides:
            continue
        if operation in _KEEPS_VALUE:
            strides.add(result)
        elif operation == "arith.muli" and re.search(r": (tensor<[^>]*xi32|i32)", rest):
            found.append(f"32-bit product of a stride: {line.strip()}")
    return found


def narrow_strides(kernel: Any) -> list[str]:
    """Parameters of a kernel that are strides and not declared 64 bit."""
    return [
        f"parameter {parameter.name} is not declared tl.int64"
        for parameter in kernel.params
        if "stride" in parameter.name and parameter.annotation_type != "i64"
    ]


def _input_dtype(arguments: dict[str, Any]) -> torch.dtype:
    """Dtype of the first floating operand: hidden states, logits, scores."""
    for value in arguments.values():
        tensor = value.base if isinstance(value, TensorDescriptor) else value
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            return tensor.dtype
    raise ValueError("the launch has no floating tensor")


def problems(kernel: Any, arguments: dict[str, Any], ttir: str, assembly: str, target: str) -> list[str]:
    """Broken rules of one compiled launch, apart from spills and shared memory."""
    found = narrow_strides(kernel) + narrow_stride_products(ttir)
    dtype = _input_dtype(arguments)
    if dtype == torch.float32 and ("tf32" in assembly or "xf32" in assembly):
        found.append("tf32 in the assembly of an fp32 configuration")
    if "tt.dot" in ttir and dtype in (torch.float16, torch.bfloat16):
        instruction = {"sm80": "mma.sync", "sm90": "wgmma.mma_async", "sm100": "tcgen05.mma", "gfx942": "v_mfma"}[
            target
        ]
        if instruction not in assembly:
            found.append(f"tl.dot without {instruction}")
    if arguments.get("DESCRIPTOR") and target in ("sm90", "sm100") and "cp.async.bulk.tensor" not in assembly:
        found.append("tensor descriptors without cp.async.bulk.tensor")
    return found
