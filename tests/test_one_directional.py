"""Attention over `[text | image | concept]`: in two calls, in one, and what tells a backend who reads whom."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, attention_backend
from markers import needs_xformers
from torch.nn.attention import varlen

from diffusers_concept_maps import one_directional
from diffusers_concept_maps.one_directional import (
    Layout,
    gappy_keys_mask,
    one_directional_attention,
    varlen_arguments,
)

LAYOUTS = [Layout(5, 12, 3), Layout(1, 1, 1), Layout(12, 45, 1), Layout(2, 7, 9), Layout(226, 90, 8)]
CPU = torch.device("cpu")


def who_reads_whom(layout: Layout, reads: str = "both") -> torch.Tensor:
    """Bool `[S, S]`, query by key, token by token from what kind of token each is."""
    kinds = ["text"] * layout.text + ["image"] * layout.image + ["concept"] * layout.concepts
    by_concepts = {"both": ("image", "concept"), "image": ("image",), "concepts": ("concept",)}[reads]
    allowed = {"text": ("text", "image"), "image": ("text", "image"), "concept": by_concepts}
    return torch.tensor([[key in allowed[query] for key in kinds] for query in kinds])


def block_diagonal(layout: Layout, batch: int) -> torch.Tensor:
    """The same for a packed batch, whose rows do not see each other."""
    return torch.block_diag(*[who_reads_whom(layout)] * batch).bool()


def naive(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor,
    bias: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """Softmax attention in float64 with the whole matrix."""
    logits = query.double() @ key.double().mT / math.sqrt(query.shape[-1]) + bias
    return logits.masked_fill(~allowed, -math.inf).softmax(-1) @ value.double()


def tensors(layout: Layout, batch: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Query, key, value `[B, H, S, D]`; the value token-major in memory, as the model makes it."""
    generator = torch.Generator().manual_seed(sum(layout))
    query, key = (torch.randn(batch, 3, sum(layout), 16, generator=generator).to(dtype) for _ in range(2))
    value = torch.randn(batch, sum(layout), 3, 16, generator=generator).to(dtype).transpose(1, 2)
    return [query, key, value]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing is remembered of backends that could not do it, or of where they live."""

    def forget() -> None:
        one_directional._unable.clear()
        for function in (one_directional._fmha, one_directional._varlen_attn, gappy_keys_mask, varlen_arguments):
            function.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def warnings_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(one_directional.logger, "warning", messages.append)
    return messages


@pytest.mark.parametrize("reads", ["both", "image", "concepts"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_two_calls(layout: Layout, reads: str) -> None:
    query, key, value = tensors(layout)
    output = one_directional_attention(query, key, value, layout, reads=reads)
    assert output.dtype == torch.float32
    torch.testing.assert_close(
        output.double(), naive(query, key, value, who_reads_whom(layout, reads)), rtol=1e-5, atol=1e-6
    )


def test_reading_nothing_keeps_the_own_value() -> None:
    layout = LAYOUTS[0]
    query, key, value = tensors(layout)
    output = one_directional_attention(query, key, value, layout, reads="none")
    assert torch.equal(output[:, :, layout.main :], value[:, :, layout.main :])
    both = one_directional_attention(query, key, value, layout)
    assert torch.equal(output[:, :, : layout.main], both[:, :, : layout.main])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_main_call_is_that_without_concepts(layout: Layout, dtype: torch.dtype) -> None:
    query, key, value = tensors(layout, dtype=dtype)
    output = one_directional_attention(query, key, value, layout)
    alone = [tensor[:, :, : layout.main].contiguous() for tensor in (query, key, value)]
    assert torch.equal(output[:, :, : layout.main], torch.nn.functional.scaled_dot_product_attention(*alone))


@pytest.mark.parametrize("reads", ["both", "image", "concepts"])
def test_a_key_that_stands_for_equal_ones(reads: str) -> None:
    layout = Layout(4, 10, 2)
    query, key, value = tensors(layout)
    output = one_directional_attention(query, key, value, layout, reads=reads, multiplicity=torch.tensor([1.0, 4.0]))
    index = torch.tensor([*range(layout.main + 1), *[layout.main + 1] * 4])  # the last concept, four times
    repeated = [tensor[:, :, index] for tensor in (query, key, value)]
    expected = naive(*repeated, who_reads_whom(Layout(4, 10, 5), reads))
    torch.testing.assert_close(output.double(), expected[:, :, : sum(layout)], rtol=1e-5, atol=1e-6)


def test_a_mask_of_the_main_attention() -> None:
    layout = Layout(4, 10, 3)
    query, key, value = tensors(layout)
    mask = torch.randn(2, 3, 1, layout.main, generator=torch.Generator().manual_seed(0))
    output = one_directional_attention(query, key, value, layout, mask=mask)
    bias = torch.zeros(2, 3, sum(layout), sum(layout), dtype=torch.float64)
    bias[:, :, : layout.main, : layout.main] = mask
    expected = naive(query, key, value, who_reads_whom(layout), bias)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)


@needs_xformers
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_mask_for_xformers(layout: Layout, batch: int) -> None:
    size = batch * sum(layout)
    materialized = gappy_keys_mask(layout, batch, CPU).materialize((size, size))
    expected = torch.zeros(size, size).masked_fill(~block_diagonal(layout, batch), -math.inf)
    assert torch.equal(materialized, expected)


def evaluate_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    seqused_k: torch.Tensor,
) -> torch.Tensor:
    """What `varlen_attn` says of its arguments, sequence by sequence in float64; `[S, H, D]` in and out."""
    output = torch.full(query.shape, math.nan, dtype=torch.float64)
    for sequence in range(len(seqused_k)):
        start, stop = cu_seq_q[sequence : sequence + 2].tolist()
        first, used = int(cu_seq_k[sequence]), int(seqused_k[sequence])
        assert 0 < stop - start <= max_q
        assert 0 < used <= max_k
        assert first + used <= len(key)
        keys = slice(first, first + used)
        parts = (query[start:stop], key[keys], value[keys])
        output[start:stop] = naive(*(part.transpose(0, 1) for part in parts), torch.tensor(True)).transpose(0, 1)
    return output


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_arguments_of_varlen_attn(layout: Layout, batch: int) -> None:
    packed = [tensor.transpose(1, 2).flatten(0, 1) for tensor in tensors(layout, batch)]
    arguments = varlen_arguments(layout, batch, CPU)
    assert all(arguments[name].dtype == torch.int32 for name in ("cu_seq_q", "cu_seq_k", "seqused_k"))
    assert arguments["max_q"] == max(layout.text + layout.image, layout.concepts)
    assert arguments["max_k"] == layout.image + max(layout.text, layout.concepts)
    assert int(arguments["cu_seq_q"][-1]) == int(arguments["cu_seq_k"][-1]) == batch * sum(layout)
    output = evaluate_varlen(*packed, **arguments)
    expected = naive(*(tensor.transpose(0, 1) for tensor in packed), block_diagonal(layout, batch))
    torch.testing.assert_close(output, expected.transpose(0, 1), rtol=1e-12, atol=1e-12)


class Fmha(ModuleType):
    """A stand-in for xformers' attention that runs on any device, with the mask of the installed one."""

    def __init__(self, bias: Any) -> None:
        super().__init__("fmha")
        self.attn_bias, self.calls = bias, 0

    def memory_efficient_attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_bias: Any
    ) -> torch.Tensor:
        """Of `[1, S, H, D]`."""
        self.calls += 1
        allowed = attn_bias.materialize((query.shape[1], key.shape[1])) == 0
        heads = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return naive(*heads, allowed).transpose(1, 2).to(query.dtype)


class OwnBias:
    """`BlockDiagonalGappyKeysMask` from its description: query block i reads `length[i]` keys from `start[i]`."""

    @classmethod
    def from_seqlens(cls, q_seqlen: Any, kv_seqstarts: Any, kv_seqlen: Any, *, device: torch.device) -> OwnBias:
        made = cls()
        made.ranges = list(zip(q_seqlen, kv_seqstarts[:-1], kv_seqlen, strict=True))
        return made

    def materialize(self, shape: tuple[int, int]) -> torch.Tensor:
        rows = []
        for queries, start, length in self.ranges:
            row = torch.full((1, shape[1]), -math.inf)
            row[:, start : start + length] = 0
            rows.append(row.expand(queries, -1))
        return torch.cat(rows)


def put(patch: pytest.MonkeyPatch, home: str, module: ModuleType | None) -> None:
    """Make a module importable under that name; None makes it impossible to import."""
    parts = home.split(".")
    for depth in range(1, len(parts)):
        patch.setitem(sys.modules, ".".join(parts[:depth]), ModuleType(parts[depth - 1]))
    patch.setitem(sys.modules, home, module)


@pytest.fixture
def xformers_backend() -> Iterator[None]:
    """As if the user had set it, whether the package is there or not."""
    active = _AttentionBackendRegistry._active_backend
    _AttentionBackendRegistry.set_active_backend(type(active)("xformers"))
    yield
    _AttentionBackendRegistry.set_active_backend(active)


@pytest.mark.parametrize("home", one_directional._HOMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_call_of_xformers_from_either_home(
    home: str, dtype: torch.dtype, xformers_backend: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmha = Fmha(SimpleNamespace(BlockDiagonalGappyKeysMask=OwnBias))
    for name in one_directional._HOMES:
        put(monkeypatch, name, fmha if name == home else None)
    layout = LAYOUTS[0]
    query, key, value = tensors(layout, dtype=dtype)
    output = one_directional_attention(query, key, value, layout)
    assert fmha.calls == 1
    assert torch.equal(output, naive(query, key, value, who_reads_whom(layout)).to(dtype))


def use_flash(patch: pytest.MonkeyPatch, backend: str) -> list[tuple[torch.dtype, int]]:
    """Choose a backend and stand in for `varlen_attn`; returns the dtype and the head width of its calls."""
    calls: list[tuple[torch.dtype, int]] = []

    def stand_in(query: torch.Tensor, *args: Any, seqused_k: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append((query.dtype, query.shape[-1]))
        return evaluate_varlen(query, *args, seqused_k=seqused_k, **options).to(query.dtype)

    patch.setattr(varlen, "varlen_attn", stand_in)
    active = _AttentionBackendRegistry._active_backend
    patch.setattr(_AttentionBackendRegistry, "_active_backend", type(active)(backend))
    return calls


@pytest.mark.parametrize("backend", one_directional._FLASH)
def test_one_call_of_varlen_attn(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = use_flash(monkeypatch, backend)
    query, key, value = tensors(LAYOUT, dtype=torch.bfloat16)
    output = one_directional_attention(query, key, value, LAYOUT)
    assert calls == [(torch.bfloat16, 16)]
    assert torch.equal(output, naive(query, key, value, who_reads_whom(LAYOUT)).to(torch.bfloat16))


LAYOUT = LAYOUTS[0]
INEXPRESSIBLE: dict[str, dict[str, Any]] = {
    "mask": {"mask": torch.zeros(2, 3, 1, LAYOUT.main)},
    "multiplicity": {"multiplicity": torch.tensor([1.0, 1.0, 3.0])},
    "image only": {"reads": "image"},
}


@pytest.mark.parametrize("options", INEXPRESSIBLE.values(), ids=INEXPRESSIBLE)
def test_what_one_call_cannot_express(
    options: dict[str, Any], xformers_backend: None, monkeypatch: pytest.MonkeyPatch, warnings_of: list[str]
) -> None:
    fmha = Fmha(SimpleNamespace(BlockDiagonalGappyKeysMask=OwnBias))
    put(monkeypatch, one_directional._HOMES[0], fmha)
    by_backend = one_directional_attention(*tensors(LAYOUT), LAYOUT, **options)
    with attention_backend("native"):
        by_torch = one_directional_attention(*tensors(LAYOUT), LAYOUT, **options)
    assert fmha.calls == 0
    assert torch.equal(by_backend, by_torch)
    assert warnings_of == []


def test_gradients_flow_through_two_calls(xformers_backend: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fmha = Fmha(SimpleNamespace(BlockDiagonalGappyKeysMask=OwnBias))
    put(monkeypatch, one_directional._HOMES[0], fmha)
    query, key, value = tensors(LAYOUT)
    query.requires_grad_()
    one_directional_attention(query, key, value, LAYOUT)[:, :, : LAYOUT.main].sum().backward()
    assert fmha.calls == 0
    assert query.grad is not None
    assert not query.grad[:, :, LAYOUT.main :].any()  # nothing reads the concepts
    with torch.no_grad():
        one_directional_attention(query, key, value, LAYOUT)
    assert fmha.calls == 1


def without_xformers(patch: pytest.MonkeyPatch) -> None:
    for home in one_directional._HOMES:
        put(patch, home, None)


def without_operator(patch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`")

    fmha = Fmha(SimpleNamespace(BlockDiagonalGappyKeysMask=OwnBias))
    fmha.memory_efficient_attention = refuse  # type: ignore[method-assign]
    put(patch, one_directional._HOMES[0], fmha)


def without_varlen(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "torch.nn.attention.varlen", None)


def with_old_varlen(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(varlen, "varlen_attn", lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k: query)


@pytest.mark.parametrize(
    ("backend", "dtype", "hinder", "reason"),
    [
        (
            "xformers",
            torch.float32,
            without_xformers,
            "none of xformers.ops.fmha, mslk.attention.fmha can be imported",
        ),
        ("xformers", torch.float32, without_operator, "No operator found"),
        ("_native_flash", torch.float32, lambda patch: None, "FlashAttention takes float16 and bfloat16"),
        ("_native_flash", torch.bfloat16, lambda patch: None, "CPU"),
        ("_native_flash", torch.bfloat16, without_varlen, "has no varlen_attn"),
        ("_native_flash", torch.bfloat16, with_old_varlen, "has no seqused_k"),
    ],
)
def test_a_backend_that_cannot_is_said_once(
    backend: str,
    dtype: torch.dtype,
    hinder: Callable[[pytest.MonkeyPatch], None],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    warnings_of: list[str],
) -> None:
    expected = one_directional_attention(*tensors(LAYOUT, dtype=dtype), LAYOUT)
    active = _AttentionBackendRegistry._active_backend
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", type(active)(backend))
    hinder(monkeypatch)
    for _ in range(3):
        assert torch.equal(one_directional_attention(*tensors(LAYOUT, dtype=dtype), LAYOUT), expected)
    (message,) = warnings_of
    assert repr(backend) in message
    assert reason in message


def test_a_width_that_flash_refuses_does_not_bar_others(
    monkeypatch: pytest.MonkeyPatch, warnings_of: list[str]
) -> None:
    narrow = [tensor[..., :12] for tensor in tensors(LAYOUT, dtype=torch.bfloat16)]
    expected = one_directional_attention(*narrow, LAYOUT)
    calls = use_flash(monkeypatch, "_native_flash")
    assert torch.equal(one_directional_attention(*narrow, LAYOUT), expected)
    one_directional_attention(*tensors(LAYOUT, dtype=torch.bfloat16), LAYOUT)
    assert calls == [(torch.bfloat16, 16)]
    (message,) = warnings_of
    assert message.endswith("FlashAttention takes heads of a width up to 256 that 8 divides")


def test_flash_needs_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(NotImplementedError, match="compute capability 8.0"):
        one_directional._expect_flash(torch.device("cuda"), torch.float16, 64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["native", "_native_flash", pytest.param("xformers", marks=needs_xformers)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_backends_on_a_gpu(
    layout: Layout, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch, warnings_of: list[str]
) -> None:
    active = _AttentionBackendRegistry._active_backend
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", type(active)(backend))
    query, key, value = (tensor.cuda() for tensor in tensors(layout, dtype=dtype))
    output = one_directional_attention(query, key, value, layout)
    expected = naive(query, key, value, who_reads_whom(layout).cuda())
    unit = torch.finfo(dtype).eps  # of a mean of values of size 1, with probabilities rounded to the same type
    torch.testing.assert_close(output.double(), expected, rtol=4 * unit, atol=4 * unit)
    assert warnings_of == []
