"""linear_logprob and linear_loss in C++: every mode, option and instruction set, odd shapes, how work is cut, bits, bad rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from specs_kernels import TokenLogprobs, linear_logprob, linear_logprob_partials, linear_loss, merge_partials, native
from specs_kernels.linear_logprob.head import kept_dtype

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
ISAS = ("portable", "avx2", "avx512", "avx512_bf16")
HALVES = [torch.bfloat16, torch.float16]
ALL = 1 << 40
"""A budget that holds every score."""


@pytest.fixture(params=ISAS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs with each instruction set this processor has."""
    wanted = ISAS.index(request.param)
    try:
        if torch.ops.specs_kernels.native_limit_isa(wanted) != wanted:
            pytest.skip(f"this processor has no {request.param}")
        yield request.param
    finally:
        torch.ops.specs_kernels.native_limit_isa(len(ISAS) - 1)


Leaves = dict[str, Tensor]


def make(n: int, d: int, v: int, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Leaves, dict[str, Any]]:
    """Leaves, and the other arguments of a call: options as they are, but for True, which stands for a tensor."""
    generator = torch.Generator().manual_seed(1000 * n + 10 * d + v)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    leaves = {"hidden": normal(n, d), "weight": normal(v, d, size=2 / max(1, d) ** 0.5)}
    arguments = {"target": torch.randint(0, v, (n,), generator=generator), "return_entropy": True, **options}
    if arguments.pop("bias", False):
        leaves["bias"] = normal(v)
        forbidden = torch.ones(v, dtype=torch.bool).index_fill(0, arguments["target"], False)
        if "softcap" not in arguments:  # which refuses forbidden columns
            leaves["bias"][forbidden & (torch.arange(v) % 5 == 0)] = -torch.inf
    if arguments.pop("lora", False):
        leaves |= {"A": normal(4, d, size=0.3), "B": normal(v, 4, size=0.3)}
    if arguments.get("temperature") is True:
        arguments["temperature"] = torch.linspace(0.5, 2.0, n)
    if arguments.get("rows") is True:
        arguments["rows"] = torch.arange(n) // 2
    if arguments.pop("ignored", False):
        arguments["target"][::7] = -100
    return leaves, arguments


def call(leaves: Leaves, arguments: dict[str, Any], **extra: Any) -> TokenLogprobs:
    lora = (leaves["A"], leaves["B"]) if "A" in leaves else None
    given = {"bias": leaves.get("bias"), "lora": lora, "backend": "native", **arguments, **extra}
    return linear_logprob(leaves["hidden"], leaves["weight"], **given)


def upstream(n: int) -> Tensor:
    """``[3, N]``: for log-prob, entropy and log-sum-exp; two of three targets get a gradient."""
    values = torch.randn(3, n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    values[:, 1::3] = 0
    return values


def everything(leaves: Leaves, arguments: dict[str, Any], frozen: bool = False, **extra: Any) -> dict[str, Tensor]:
    """Results and gradients by name."""
    leaves = {k: x.detach().requires_grad_(k == "hidden" or not frozen) for k, x in leaves.items()}
    result = call(leaves, arguments, **extra)
    values = dict(zip(result._fields, result, strict=True))
    weights = upstream(result.logp.shape[0])
    total = sum((w * x.double()).sum() for w, x in zip(weights, result, strict=True) if x.requires_grad)
    wanted = {k: x for k, x in leaves.items() if x.requires_grad}
    found = torch.autograd.grad(total, list(wanted.values()))
    return {k: x.detach() for k, x in values.items()} | {f"d {k}": g for k, g in zip(wanted, found, strict=True)}


def definition(leaves: Leaves, arguments: dict[str, Any], frozen: bool = False) -> dict[str, Tensor]:
    """Plain PyTorch in fp64 from the same numbers."""
    return everything({k: x.double() for k, x in leaves.items()}, arguments, frozen, backend="reference")


def assert_near(ours: dict[str, Tensor], exact: dict[str, Tensor], values: float, gradients: float) -> None:
    """Errors in units of the largest result of that name (a gradient: in norm)."""
    assert ours.keys() == exact.keys()
    for name, truth in exact.items():
        error = ours[name].double() - truth
        if name.startswith("d "):
            assert error.norm() <= gradients * truth.norm(), (name, float(error.norm() / truth.norm()))
        else:
            assert error.abs().max() <= values * (1 + truth.abs().max()), (name, float(error.abs().max()))


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


FORWARD = ("logp", "entropy", "lse")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True, "temperature": 0.7},
    "softcap": {"softcap": 3.0, "temperature": 1.4, "logit_scale": 1.3},
    "per target": {"temperature": True, "logit_scale": 0.8, "ignored": True},
    "lora": {"lora": True, "temperature": 0.6, "rows": True},
    "everything": {"bias": True, "softcap": 3.0, "logit_scale": 0.7, "temperature": True, "rows": True, "lora": True,
                   "ignored": True},
}  # fmt: skip


def modes(v: int, dtype: torch.dtype, softcap: float | None = None) -> dict[str, dict[str, Any]]:
    part = 128 * v * kept_dtype(dtype, softcap).itemsize
    return {
        "recompute": {"mode": "recompute"},
        "cache": {"mode": "cache", "logit_cache_bytes": ALL},
        "cache in part": {"mode": "cache", "logit_cache_bytes": part},
        "kept in full precision": {"mode": "auto"},
        "compact": {"mode": "recompute", "compact": True},
        "compact, cache": {"mode": "cache", "logit_cache_bytes": ALL, "compact": True},
        "compact, cache in part": {"mode": "cache", "logit_cache_bytes": part, "compact": True},
        "frozen": {"mode": "frozen", "frozen": True},
    }


@pytest.mark.parametrize("option", OPTIONS)
def test_every_mode_and_option_in_fp64(instruction_set: str, option: str) -> None:
    leaves, arguments = make(170, 5, 345, **OPTIONS[option])
    exact = {frozen: definition(leaves, arguments, frozen) for frozen in (False, True)}
    first: dict[str, Tensor] = {}
    for validate in (True, False):
        for mode in modes(345, torch.float64).values():
            ours = everything(leaves, arguments, validate=validate, **mode)
            assert_near(ours, exact["frozen" in mode], 1e-13, 1e-12)
            first = first or ours
            assert all(torch.equal(ours[name], first[name]) for name in FORWARD)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("option", ["plain", "bias", "everything"])
def test_lower_precisions(instruction_set: str, option: str, dtype: torch.dtype) -> None:
    """Values as exact as fp32 sums are, every gradient rounded once; the forward has the same bits in every mode."""
    leaves, arguments = make(170, 66, 345, dtype, **OPTIONS[option])
    exact = {frozen: definition(leaves, arguments, frozen) for frozen in (False, True)}
    eps = torch.finfo(dtype).eps
    softcap = arguments.get("softcap")
    first: dict[str, Tensor] = {}
    for mode in modes(345, dtype, softcap).values():
        ours = everything(leaves, arguments, **mode)
        assert ours["logp"].dtype == torch.float32 and all(ours[k].dtype == dtype for k in ours if k[:2] == "d ")
        shifted = mode["mode"] == "cache" and dtype in HALVES and softcap is None
        gradients = 3e-6 if dtype == torch.float32 else (4 if shifted else 1) * eps
        assert_near(ours, exact["frozen" in mode], 3e-6, gradients)
        first = first or ours
        assert all(torch.equal(ours[name], first[name]) for name in FORWARD)


SHAPES = [
    (1, 1, 1), (3, 0, 5), (1, 7, 2), (31, 2, 83), (32, 14, 84), (33, 15, 85), (513, 1, 3), (5, 32, 169), (31, 33, 3000),
    (33, 512, 169), (2, 1030, 84), (65, 64, 170), (1, 512, 2),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=["fp64", "fp32", "bf16", "fp16"])
def test_shapes_around_vectors_panels_and_blocks(instruction_set: str, dtype: torch.dtype) -> None:
    """Width 512 and more has rows that fall on one set of the cache and are copied."""
    eps = torch.finfo(dtype).eps
    for n, d, v in SHAPES:
        leaves, arguments = make(n, d, v, dtype)
        for frozen in (False, True):
            exact = definition(leaves, arguments, frozen)
            ours = everything(leaves, arguments, frozen, mode="frozen" if frozen else "recompute")
            if v == 1:  # nothing but zeros: no scale for an error
                assert all(not ours[name].any() for name in ("logp", "entropy"))
                continue
            values = 1e-13 if dtype == torch.float64 else 1e-5
            assert_near(ours, exact, values, 1.5 * eps if dtype in HALVES else 20 * max(1, d) ** 0.5 * eps)


WORK = {
    "shares of rows, unevenly many panels": (1057, 9, 40),
    "shares of rows in several chunks": (1100, 512, 20),
    "shares beside segments": (300, 17, 700),
    "32 segments": (20, 6, 84 * 33 + 5),
    "several chunks of rows": (513, 1030, 3000),
}


@pytest.mark.parametrize("shape", WORK.values(), ids=WORK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_however_the_work_is_cut(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Against the definition, and the same bits with one thread, with two, and again."""
    leaves, arguments = make(*shape, dtype)
    for frozen, mode in ((False, "recompute"), (True, "frozen"), (True, "recompute")):
        runs = []
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 2):
                torch.set_num_threads(threads)
                runs.append(everything(leaves, arguments, frozen, mode=mode))
        finally:
            torch.set_num_threads(before)
        exact = definition(leaves, arguments, frozen)
        assert_near(runs[0], exact, 1e-5, 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps)
        assert same(runs[0], runs[1]) and same(runs[0], runs[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("option", ["plain", "softcap", "lora"])
def test_a_row_alone_has_the_bits_it_has_in_a_batch(instruction_set: str, option: str, dtype: torch.dtype) -> None:
    leaves, arguments = make(140, 34, 500, dtype, **OPTIONS[option] | {"rows": False})
    arguments.pop("rows")
    whole = call(leaves, arguments)
    for rows in (slice(0, 1), slice(139, 140), slice(30, 71)):
        part = call(leaves | {"hidden": leaves["hidden"][rows]}, arguments | {"target": arguments["target"][rows]})
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, whole, strict=True))


def loss_of(logp: Tensor, entropy: Tensor, lse: Tensor, index: Tensor) -> Tensor:
    weights = upstream(300)[:, index]
    return sum((w * x.double()).sum() for w, x in zip(weights, (logp, entropy, lse), strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rows_that_fit", [128, 300], ids=["three chunks", "one chunk"])
@pytest.mark.parametrize("groups", [None, [100, 60, 140]], ids=["", "a group too large"])
def test_linear_loss(dtype: torch.dtype, rows_that_fit: int, groups: list[int] | None) -> None:
    """Gradients of several chunks add up in fp32 (fp64) and are rounded once."""
    leaves, arguments = make(300, 18, 345, dtype, **OPTIONS["everything"] | {"ignored": False})
    exact = definition(leaves, arguments)
    group_ids = None if groups is None else torch.repeat_interleave(torch.arange(3), torch.tensor(groups))
    bits = call(leaves, arguments)
    eps, kept = torch.finfo(dtype).eps, kept_dtype(dtype, arguments["softcap"])
    for compact in (False, True):
        own = {k: x.detach().requires_grad_() for k, x in leaves.items()}
        loss, scored, metrics = linear_loss(
            own["hidden"], own["weight"], loss_fn=loss_of, group_ids=group_ids, bias=own["bias"], lora=(own["A"], own["B"]),
            backend="native", compact=compact, workspace_bytes=rows_that_fit * 345 * kept.itemsize, **arguments,
        )  # fmt: skip
        assert metrics["recomputed_targets"] == (140 if groups and rows_that_fit == 128 else 0)
        assert all(torch.equal(a, b) for a, b in zip(scored, bits, strict=True))
        found = dict(zip((f"d {k}" for k in own), torch.autograd.grad(loss, list(own.values())), strict=True))
        ours = dict(zip(FORWARD, scored, strict=True)) | found
        gradients = 4 * eps if dtype in HALVES else 30 * eps
        assert_near(ours, exact, 100 * torch.finfo(bits.logp.dtype).eps, gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_strides_of_the_weight_and_of_upstream_gradients_do_not_matter(
    instruction_set: str, dtype: torch.dtype
) -> None:
    leaves, arguments = make(40, 22, 200, dtype)
    weight = leaves["weight"]
    layouts = {
        "padded rows": torch.empty(200, 30, dtype=dtype)[:, 4:26].copy_(weight),
        "transposed": weight.T.contiguous().T,
        "every other column": torch.empty(200, 44, dtype=dtype)[:, ::2].copy_(weight),
    }
    for frozen in (False, True):
        mode = {"mode": "frozen" if frozen else "recompute"}
        expected = everything(leaves, arguments, frozen, **mode)
        for name, view in layouts.items():
            assert same(everything(leaves | {"weight": view}, arguments, frozen, **mode), expected), name
    for one in (weight[:1].expand(200, 22), weight[:, :1].expand(200, 22)):
        flat = leaves | {"weight": one}
        dense = leaves | {"weight": one.contiguous()}
        assert same(everything(flat, arguments, mode="recompute"), everything(dense, arguments, mode="recompute"))
    grads = []
    for given in (torch.tensor(0.5).expand(40), torch.full((40,), 0.5)):
        own = {k: x.detach().requires_grad_() for k, x in leaves.items()}
        result = call(own, arguments, mode="recompute")
        grads.append(torch.autograd.grad(list(result), list(own.values()), [given] * 3))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("mode", ["recompute", "cache", "frozen"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_stays_alone(instruction_set: str, mode: str, bad: float) -> None:
    frozen, extra = mode == "frozen", {"mode": mode} | ({"logit_cache_bytes": ALL} if mode == "cache" else {})
    leaves, arguments = make(40, 10, 400, torch.float32)
    clean = everything(leaves, arguments, frozen, **extra)
    for element in (0, slice(None)):
        dirty = leaves["hidden"].clone()
        dirty[3, element] = bad
        ours = everything(leaves | {"hidden": dirty}, arguments, frozen, **extra)
        keep = torch.arange(40) != 3
        for name in (*FORWARD, "d hidden"):
            assert torch.equal(ours[name][keep], clean[name][keep]), name
            assert not ours[name][3].isfinite().any(), name
        dirty[4] = bad  # one of the targets without an upstream gradient
        ours = everything(leaves | {"hidden": dirty}, arguments, frozen, **extra)
        assert frozen or not ours["d hidden"][4].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_masked_targets_reach_nothing(instruction_set: str, dtype: torch.dtype) -> None:
    """Unchecked: ignored targets give 0, bad ones NaN in their own row, and neither any gradient."""
    leaves, arguments = make(40, 12, 200, dtype)
    skipped, bad = torch.arange(40) % 5 == 1, torch.arange(40) % 5 == 3
    target = torch.where(skipped, -100, torch.where(bad, 999, arguments["target"]))
    dirty = torch.where((skipped | bad)[:, None], torch.nan, leaves["hidden"])
    checked = torch.where(bad, -100, target)
    for mode in modes(200, dtype).values():
        frozen = "frozen" in mode
        clean = everything(leaves, arguments | {"target": checked}, **mode)
        ours = everything(leaves | {"hidden": dirty}, arguments | {"target": target}, validate=False, **mode)
        for name in FORWARD:
            assert ours[name][bad].isnan().all() and torch.equal(ours[name][~bad], clean[name][~bad])
        assert not ours["d hidden"][skipped | bad].any()
        assert (
            frozen or (ours["d weight"] - clean["d weight"]).norm() <= torch.finfo(dtype).eps * clean["d weight"].norm()
        )


def test_slices_of_the_vocabulary_merge(instruction_set: str) -> None:
    leaves, arguments = make(40, 6, 300)
    arguments["target"][3] = -100
    exact = definition(leaves, arguments)
    own = {k: x.detach().requires_grad_() for k, x in leaves.items()}
    parts = [
        linear_logprob_partials(own["hidden"], own["weight"][a:b], first_column=a, backend="native", validate=a > 0, **arguments)
        for a, b in ((0, 90), (90, 91), (91, 300))
    ]  # fmt: skip
    merged = merge_partials(parts, arguments["target"])
    total = sum((w * x).sum() for w, x in zip(upstream(40), merged, strict=True))
    found = torch.autograd.grad(total, list(own.values()))
    ours = dict(zip(exact, (*(x.detach() for x in merged), *found), strict=True))
    assert_near(ours, exact, 1e-13, 1e-12)


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_sharp_rows_far_from_zero(instruction_set: str, shift: float) -> None:
    """Error at most twice that of plain PyTorch in fp32, with p(target) -> 1 in half of the rows."""
    leaves, arguments = make(40, 16, 300, torch.float32)
    leaves |= {"weight": 30 * leaves["weight"], "bias": torch.full((300,), shift)}
    scores = leaves["hidden"] @ leaves["weight"].T
    arguments["target"][:20] = scores[:20].argmax(1)
    exact, plain = definition(leaves, arguments), everything(leaves, arguments, backend="reference")
    ours = everything(leaves, arguments, mode="recompute")
    for name, truth in exact.items():
        allowed = 2 * (plain[name] - truth).norm() + 1e-6 * truth.norm()
        assert (ours[name] - truth).norm() <= allowed, name


def test_the_library_refuses_what_would_read_out_of_bounds() -> None:
    matrix, vector, target = torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    common: dict[str, Any] = {
        "hidden": matrix, "weight": torch.zeros(5, 4), "low": None, "lora": None, "target": target, "factor": 1.0, "bias": None,
        "softcap": 0.0, "inverse_temperature": None, "inverse": 1.0, "maximum": vector, "cache": torch.zeros(32, 5), "cached": 3,
        "offsets": None,
    }  # fmt: skip
    forward = common | {"total": vector, "weighted": None, "target_score": vector, "sums": None, "second": None}
    backward = common | {
        "log_total": vector, "base": vector, "entropy": None, "target_gradient": None, "cache_rows": None, "d_hidden": matrix,
        "d_low": None, "d_weight": torch.zeros(5, 4), "d_lora": None, "d_bias": None, "early": 1.0, "accumulate": False,
    }  # fmt: skip
    shared: list[dict[str, Any]] = [
        {"hidden": torch.zeros(2, 4)}, {"hidden": matrix.double()}, {"hidden": torch.zeros(3, 8)[:, ::2]},
        {"bias": torch.zeros(4)}, {"weight": torch.zeros(5, 3)}, {"weight": torch.zeros(5, 4, dtype=torch.float64)},
        {"low": torch.zeros(3, 2)},
        {"low": torch.zeros(3, 2), "lora": torch.zeros(4, 2)}, {"target": target.int()}, {"softcap": -1.0},
        {"inverse_temperature": torch.zeros(2)}, {"maximum": torch.zeros(2)}, {"cached": 4}, {"cache": torch.zeros(2, 5)},
        {"cache": torch.zeros(32, 5).half()},
    ]  # fmt: skip
    only: dict[str, list[dict[str, Any]]] = {
        "linear_forward": [{"total": torch.zeros(4)}, {"sums": torch.zeros(3, 5)}, {"second": matrix}, {"cached": 1}],
        "linear_backward": [
            {"d_hidden": torch.zeros(3, 5)}, {"d_weight": torch.zeros(4, 4)}, {"d_bias": torch.zeros(4)},
            {"d_low": torch.zeros(3, 2)}, {"cache_rows": torch.tensor([0, 1, 40])}, {"cache_rows": torch.tensor([0, -1, 2])},
            {"cache_rows": target[:2]}, {"d_weight": torch.zeros(5, 4).half(), "accumulate": True},
        ],
    }  # fmt: skip
    for name, good in (("linear_forward", forward), ("linear_backward", backward)):
        op = getattr(torch.ops.specs_kernels, name)
        op(**good)
        for change in (*shared, *only[name]):
            with pytest.raises(RuntimeError, match="native linear_logprob"):
                op(**good | change)
