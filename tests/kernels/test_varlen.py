"""The libraries behind the cascade: our calls against their signatures, which of them is taken, and what they do not take."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from specs_kernels import PackedLayout, packed_attention, varlen
from specs_kernels.packed_attention.cascade_plan import cascade_plan
from specs_kernels.varlen import Sequences
from specs_kernels.varlen_stand_in import stand_in_backward, stand_in_forward

FOREST = ([9, 4, 7, 0, 5, 3, 1, 8, 6, 2], [-1, 0, 0, 2, 3, 4, 4, 2, -1, 8])
FLAT = ([6, 1, 9, 4], [-1] * 4)


def evaluate(segments: tuple[list[int], list[int]], window: int | None, library: str) -> list[Tensor]:
    """out, lse and gradients in bf16; GQA."""
    layout = PackedLayout.from_segments(*segments)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(layout.num_tokens, heads, 16, generator=generator).bfloat16().requires_grad_()
        for heads in (4, 2, 2)
    ]
    with varlen.use(library):
        query, key, value = inputs
        out, lse = packed_attention(
            query, key, value, layout, scale=0.3, window=window, return_lse=True, backend="cascade"
        )
    return [out, lse, *torch.autograd.grad(out.float().square().sum(), inputs)]


@pytest.fixture
def libraries_run_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "lacks", lambda name, device: None)


def sequences_of(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Sequences:
    """Checked as the kernels check them."""
    for starts, longest in ((cu_q, max_q), (cu_k, max_k)):
        assert starts.dtype == torch.int32 and starts.is_contiguous() and starts.dim() == 1
        assert int(starts.diff().min()) >= 1 and int(starts.diff().max()) == longest
    assert len(cu_q) == len(cu_k) >= 2
    return Sequences(cu_q, cu_k, max_q, max_k)


def window_of(causal: bool, left: int | None, right: int | None) -> int | None:
    """FlashAttention's: -1 for no bound; a causal call has none to the right, whatever it says."""
    assert left is not None and right in ((-1, 0) if causal else (-1,)) and (causal or left == -1)
    assert right == 0 or left == -1
    return None if left == -1 else left + 1


@pytest.fixture
def torch_ops_on_cpu(libraries_run_on_cpu: None) -> Iterator[None]:
    """The stand-in as the CPU kernel of torch's two ops: every call passes PyTorch's own schema and dispatcher."""

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cum_seq_q: Tensor,
        cum_seq_k: Tensor,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        seqused_k: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        block_table: Tensor | None = None,
        num_splits: int | None = None,
    ) -> tuple[Tensor, ...]:
        assert dropout_p == 0 and not return_debug_mask and scale is not None
        assert seqused_k is alibi_slopes is block_table is num_splits is None
        window = window_of(is_causal, window_size_left, window_size_right)
        sequences = sequences_of(cum_seq_q, cum_seq_k, max_q, max_k)
        out, lse = stand_in_forward(query, key, value, sequences, is_causal, scale, window)
        nothing = torch.zeros(2, dtype=torch.uint64)
        return out, lse, nothing, torch.zeros((), dtype=torch.uint64), torch.empty(0)

    def backward(
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        cum_seq_q: Tensor,
        cum_seq_k: Tensor,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        rng_state: Tensor,
        unused: Tensor,
        *,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
    ) -> tuple[Tensor, ...]:
        assert dropout_p == 0 and scale is not None and rng_state.dtype == torch.uint64 and rng_state.shape == (2,)
        assert logsumexp.shape == query.shape[1::-1] and logsumexp.is_contiguous() and logsumexp.dtype == torch.float32
        assert grad_out.dtype == out.dtype == query.dtype
        window = window_of(is_causal, window_size_left, window_size_right)
        sequences = sequences_of(cum_seq_q, cum_seq_k, max_q, max_k)
        return stand_in_backward(grad_out, query, key, value, out, logsumexp, sequences, is_causal, scale, window)

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield


@pytest.mark.parametrize("segments, window", [(FOREST, None), (FLAT, None), (FLAT, 1), (FLAT, 3)])
def test_calls_of_torchs_ops_pass_its_schema_and_give_the_stand_ins_bits(
    torch_ops_on_cpu: None, segments: tuple[list[int], list[int]], window: int | None
) -> None:
    ours = evaluate(segments, window, "torch")
    assert all(map(torch.equal, ours, evaluate(segments, window, "stand-in")))


@pytest.mark.parametrize("segments, window", [(FOREST, None), (FLAT, 3)])
def test_torchs_shape_functions_take_our_calls(
    libraries_run_on_cpu: None, segments: tuple[list[int], list[int]], window: int | None
) -> None:
    """On fake tensors PyTorch's own shape and dtype rules for the two ops run, without a GPU."""
    layout = PackedLayout.from_segments(*segments)
    with FakeTensorMode(allow_non_fake_inputs=True), varlen.use("torch"):
        inputs = [
            torch.empty(layout.num_tokens, heads, 64, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)
        ]
        query, key, value = inputs
        out, lse = packed_attention(query, key, value, layout, window=window, return_lse=True, backend="cascade")
        results = (out, *torch.autograd.grad(out.sum(), inputs))
    for result, like in zip(results, (query, *inputs), strict=True):
        assert (result.shape, result.dtype, result.device) == (like.shape, like.dtype, like.device)
    assert lse.shape == (layout.num_tokens, 4) and lse.dtype == torch.float32


def test_a_plan_of_fake_tensors_is_not_kept() -> None:
    layout = PackedLayout.from_segments(*FOREST)
    with FakeTensorMode(allow_non_fake_inputs=True):
        cascade_plan(layout)
    assert not layout.cache
    cascade_plan(layout)
    assert list(layout.cache) == ["packed_attention.cascade"]


def flash_attn_interface(deterministic: list[bool]) -> ModuleType:
    """The signatures of flash-attn 2.7 and 2.8 (2.7.0 is without zero_tensors), computed by the stand-in."""
    module: Any = ModuleType("flash_attn.flash_attn_interface")

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        return_softmax: bool = False,
        block_table: Tensor | None = None,
        leftpad_k: Tensor | None = None,
        seqused_k: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        assert dropout_p == softcap == 0 and not return_softmax
        assert alibi_slopes is block_table is leftpad_k is seqused_k is None
        window = window_of(causal, window_size_left, window_size_right)
        sequences = sequences_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse = stand_in_forward(q, k, v, sequences, causal, softmax_scale, window)
        return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        rng_state: Tensor | None = None,
    ) -> Tensor:
        assert dropout_p == softcap == 0 and alibi_slopes is rng_state is None
        assert dq is not None and dk is not None and dv is not None
        flags.append(deterministic)
        window = window_of(causal, window_size_left, window_size_right)
        sequences = sequences_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        grads = stand_in_backward(dout, q, k, v, out, softmax_lse, sequences, causal, softmax_scale, window)
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target.copy_(grad)
        return torch.empty(q.shape[1], q.shape[0] + 128 * (len(cu_seqlens_q) - 1))

    flags = deterministic
    module._wrapped_flash_attn_varlen_forward = forward
    module._wrapped_flash_attn_varlen_backward = backward
    return module


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("segments, window", [(FOREST, None), (FLAT, None), (FLAT, 3)])
def test_calls_of_flash_attn_fit_its_signatures_and_hand_on_determinism(
    monkeypatch: pytest.MonkeyPatch,
    libraries_run_on_cpu: None,
    segments: tuple[list[int], list[int]],
    window: int | None,
    deterministic: bool,
) -> None:
    flags: list[bool] = []
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", flash_attn_interface(flags))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    ours = evaluate(segments, window, "flash_attn")
    assert all(map(torch.equal, ours, evaluate(segments, window, "stand-in")))
    assert set(flags) == {deterministic}


def test_torch_comes_first_and_flash_attn_where_torch_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_FLASH_ATTN", "2.8.3")
    monkeypatch.setattr(varlen, "_LACKS", {"torch": None, "flash_attn": None})
    assert varlen.choose("cuda").name == f"varlen attention of torch {torch.__version__}"
    with varlen.use("flash_attn"):
        assert varlen.choose("cuda").name == "varlen attention of flash-attn 2.8.3"
    monkeypatch.setitem(varlen._LACKS, "torch", "no ROCm")
    assert varlen.missing("cuda") is None
    assert varlen.choose("cuda").name == "varlen attention of flash-attn 2.8.3"
    monkeypatch.setitem(varlen._LACKS, "flash_attn", "not installed")
    assert varlen.missing("cuda") == "no ROCm; not installed"
    with pytest.raises(ValueError, match="no varlen attention: no ROCm; not installed"):
        varlen.choose("cuda")
    with varlen.use("torch"):
        assert varlen.missing("cuda") == "no ROCm"


@pytest.mark.parametrize(
    "version, known", [("2.10.1", False), ("2.11.0+cu128", True), ("2.13.0a0", True), ("2.14.0", False)]
)
def test_torch_versions(monkeypatch: pytest.MonkeyPatch, version: str, known: bool) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    reason = varlen._torch_lacks()
    assert reason is None if known else f"torch {version}: the signatures" in str(reason)


def test_builds_of_torch_without_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert "built without flash attention" in str(varlen._torch_lacks())
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "not used on ROCm: pip install flash-attn" in str(varlen._torch_lacks())


@pytest.mark.parametrize(
    "version, reason",
    [
        (None, "flash-attn is not installed"),
        ("2.6.3", "flash-attn 2.6.3: the signatures"),
        ("2.7.4.post1", None),
        ("2.8.3", None),
        ("3.0.0b1", "flash-attn 3.0.0b1: the signatures"),
    ],
)
def test_flash_attn_versions(version: str | None, reason: str | None) -> None:
    found = varlen._flash_attn_lacks(version)
    assert found is None if reason is None else reason in str(found)


def test_flash_attns_other_kernels_for_amd_are_not_taken() -> None:
    assert "unset FLASH_ATTENTION_TRITON_AMD_ENABLE" in str(varlen._flash_attn_lacks("2.8.3", "TRUE"))


def test_only_known_libraries_can_be_asked_for_and_the_question_ends_with_its_block() -> None:
    with pytest.raises(ValueError, match="no varlen library 'fa3'; there are 'torch', 'flash_attn', 'stand-in'"):
        with varlen.use("fa3"):
            pass
    with pytest.raises(KeyError), varlen.use("stand-in"):
        assert varlen.missing("cpu") is None
        raise KeyError
    assert "CUDA and ROCm tensors, not on cpu" in str(varlen.missing("cpu"))
    with varlen.use("torch"):
        assert "not on cpu" in str(varlen.missing("cpu"))


@pytest.mark.parametrize(
    "dtype, head_dim, sequences, words",
    [
        (torch.float32, 64, 3, "takes fp16 and bf16; got torch.float32"),
        (torch.float64, 64, 3, "takes fp16 and bf16; got torch.float64"),
        (torch.bfloat16, 36, 3, "at most 256 in multiples of 8; query has 36"),
        (torch.float16, 264, 3, "at most 256 in multiples of 8; query has 264"),
        (torch.bfloat16, 64, 65536, "at most 65535 sequences a call; the row has 65536"),
    ],
)
def test_limits_of_the_kernels_raise_by_name(dtype: torch.dtype, head_dim: int, sequences: int, words: str) -> None:
    query = torch.zeros(1, 2, head_dim, dtype=dtype)
    with pytest.raises(ValueError, match=words):
        varlen.check_limits(varlen.choose("cuda"), query, sequences)
    with varlen.use("stand-in"):
        varlen.check_limits(varlen.choose("cpu"), query, sequences)


@pytest.mark.parametrize("head_dim", [32, 64, 72, 80, 96, 128, 192, 256])
def test_head_sizes_of_the_models_are_within_the_limits(head_dim: int) -> None:
    varlen.check_limits(varlen.choose("cuda"), torch.zeros(1, 2, head_dim, dtype=torch.bfloat16), 65535)


@pytest.mark.parametrize("wrong", [lambda lse: lse.t(), lambda lse: lse.double(), lambda lse: lse[None]])
def test_a_log_sum_exp_in_another_layout_is_refused(wrong: Callable[[Tensor], Tensor]) -> None:
    query = torch.zeros(5, 2, 8)
    lse = torch.zeros(2, 5)
    assert varlen._checked_lse(lse, query) is lse
    with pytest.raises(RuntimeError, match=r"returned a log-sum-exp .* where float32 \[2, 5\] \[H, Tq\] is known"):
        varlen._checked_lse(wrong(lse), query)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("library", ["torch", "flash_attn"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "segments, window", [(FOREST, None), (([300, 90, 1, 700, 64], [-1, 0, 0, -1, 3]), None), (FLAT, 3)]
)
def test_on_a_gpu_results_are_near_and_repeat_bit_for_bit_when_asked_to(
    library: str, head_dim: int, segments: tuple[list[int], list[int]], window: int | None
) -> None:
    if reason := varlen.lacks(library, "cuda"):
        pytest.skip(reason)
    layout = PackedLayout.from_segments(*segments, device="cuda")
    inputs = [
        torch.randn(layout.num_tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (8, 2, 2)
    ]

    def run(inputs: list[Tensor], backend: str) -> list[Tensor]:
        query, key, value = inputs
        out, lse = packed_attention(query, key, value, layout, window=window, return_lse=True, backend=backend)
        return [out, lse, *torch.autograd.grad(out.double().square().sum(), inputs)]

    exact = run([x.detach().double().requires_grad_() for x in inputs], "reference")
    torch.use_deterministic_algorithms(True)
    try:
        with varlen.use(library):
            ours, again = run(inputs, "cascade"), run(inputs, "cascade")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, ours, again))
    for mine, reference in zip(ours, exact, strict=True):
        assert float((mine - reference).detach().norm() / reference.detach().norm()) < 0.02
