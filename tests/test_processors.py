"""Every attention processor against its stock class, bit for bit: idle, at work on the main call, and answering."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from backbones import tiny_cogvideox as tiny
from diffusers.models.attention_processor import (
    Attention,
    CogVideoXAttnProcessor2_0,
    FusedCogVideoXAttnProcessor2_0,
)
from torch.nn import functional

import diffusers_concept_maps as dcm
from diffusers_concept_maps.processors import ConceptProcessor, concept_processor
from diffusers_concept_maps.processors._base import CONCEPT_PROCESSORS
from diffusers_concept_maps.processors.joint import (
    ConceptCogVideoXAttnProcessor2_0,
    ConceptFusedCogVideoXAttnProcessor2_0,
)

METHODS = ("concept_attention", "cross_attention", "gramcol", "imap")
BATCH, TEXT, IMAGE, HEADS, WIDTH = 2, 5, 12, 4, 16
JOINT = [CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Watcher:
    """Stands in for a recorder: takes what a processor shows of its main call."""

    def __init__(self, records: bool = True) -> None:
        self.shown: list[tuple[torch.Tensor, ...]] = []
        self.answering = False
        self.joined = None
        self.restricts = False
        self._records = records

    def records(self, attention: Any) -> bool:
        return self._records

    def observe(
        self, attention: Any, *tensors: torch.Tensor, text: slice, image: slice, concepts: None, mask: Any
    ) -> None:
        self.shown.append(tuple(torch.cat([tensor[:, :, text], tensor[:, :, image]], dim=2) for tensor in tensors))


class Answerer(Watcher):
    """Answers a nested call with something that depends on query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.answering = True

    def answer(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        self.shown.append((query, key, value))
        return query - 2 * key + 3 * value


def make_attention(
    stock: type, dtype: torch.dtype = torch.float32, norm: str | None = "layer_norm", bias: bool = True
) -> Attention:
    torch.manual_seed(0)
    attention = Attention(
        query_dim=HEADS * WIDTH,
        heads=HEADS,
        dim_head=WIDTH,
        qk_norm=norm,
        eps=1e-6,
        bias=bias,
        out_bias=bias,
        processor=CogVideoXAttnProcessor2_0(),
    )
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    attention = attention.to(dtype).eval()
    if stock is FusedCogVideoXAttnProcessor2_0:
        attention.fuse_projections()
    attention.set_processor(stock())
    return attention


def make_inputs(dtype: torch.dtype, *, contiguous: bool, rope: bool, grad: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    joint = torch.randn(BATCH, TEXT + IMAGE, HEADS * WIDTH, generator=generator).to(dtype)
    image, text = joint[:, TEXT:], joint[:, :TEXT]
    if contiguous:
        image, text = image.contiguous(), text.contiguous()
    angles = torch.rand(IMAGE, WIDTH, generator=generator) * 6
    inputs: dict[str, Any] = {"hidden_states": image, "encoder_hidden_states": text}
    if rope:
        inputs["image_rotary_emb"] = (angles.cos(), angles.sin())
    if grad:
        inputs |= {name: inputs[name].detach().requires_grad_() for name in ("hidden_states", "encoder_hidden_states")}
    return inputs


def use(attention: Attention, watcher: Any, stock: type) -> ConceptProcessor:
    processor = concept_processor(stock())
    assert isinstance(processor, stock)
    if watcher is not None:
        processor.recorder = watcher
    attention.set_processor(processor)
    return processor


def assert_equal(ours: Any, stock: Any) -> None:
    assert type(ours) is type(stock)
    assert len(ours) == len(stock)
    for a, b in zip(ours, stock, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert b.isfinite().all()
        assert torch.equal(a, b)


def test_every_processor_of_the_file_is_tested() -> None:
    module = ConceptCogVideoXAttnProcessor2_0.__module__
    assert [cls.stock for cls in CONCEPT_PROCESSORS if cls.__module__ == module] == JOINT
    assert type(concept_processor(JOINT[0]())) is ConceptCogVideoXAttnProcessor2_0
    assert type(concept_processor(JOINT[1]())) is ConceptFusedCogVideoXAttnProcessor2_0


@pytest.mark.parametrize("own", CONCEPT_PROCESSORS, ids=lambda cls: cls.stock.__name__)
def test_the_parameters_are_those_of_the_stock_class(own: Any) -> None:
    """Attention modules look at the names to decide what they pass on."""

    mine, stock = (inspect.signature(cls.__call__).parameters for cls in (own, own.stock))
    assert list(mine) == list(stock)
    for name, parameter in stock.items():
        assert parameter.default in (inspect.Parameter.empty, mine[name].default)


def test_a_subclass_of_a_stock_class_is_not_replaced() -> None:
    class Own(CogVideoXAttnProcessor2_0):
        pass

    assert concept_processor(Own()) is None


@pytest.mark.parametrize("stock", JOINT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("watcher", [None, Watcher(records=False), Watcher()], ids=["idle", "elsewhere", "active"])
def test_bits_of_a_call(stock: type, dtype: torch.dtype, rope: bool, contiguous: bool, watcher: Any) -> None:
    attention = make_attention(stock, dtype)
    inputs = make_inputs(dtype, contiguous=contiguous, rope=rope)
    with torch.no_grad():
        expected = attention(**inputs)
        use(attention, watcher, stock)
        assert_equal(attention(**inputs), expected)


@pytest.mark.parametrize("stock", JOINT)
@pytest.mark.parametrize("norm", [None, "layer_norm", "rms_norm"])
@pytest.mark.parametrize("bias", [False, True])
def test_bits_with_other_projections(stock: type, norm: str | None, bias: bool) -> None:
    attention = make_attention(stock, norm=norm, bias=bias)
    inputs = make_inputs(torch.float32, contiguous=False, rope=True)
    with torch.no_grad():
        expected = attention(**inputs)
        use(attention, Watcher(), stock)
        assert_equal(attention(**inputs), expected)


def masks(stock: type) -> list[torch.Tensor]:
    """The stock fused class pads a mask by the length of the text, so that it takes one over the image tokens."""
    length = IMAGE if stock is FusedCogVideoXAttnProcessor2_0 else TEXT + IMAGE
    generator = torch.Generator().manual_seed(2)
    bias = torch.randn(BATCH, length, generator=generator)
    return [bias, bias[:, None]]


@pytest.mark.parametrize("stock", JOINT)
@pytest.mark.parametrize("shape", [0, 1])
@pytest.mark.parametrize("watcher", [None, Watcher()], ids=["idle", "active"])
def test_bits_with_a_mask(stock: type, shape: int, watcher: Any) -> None:
    attention = make_attention(stock)
    inputs = make_inputs(torch.float32, contiguous=True, rope=True)
    mask = masks(stock)[shape]
    with torch.no_grad():
        expected = attention(**inputs, attention_mask=mask)
        assert not torch.equal(expected[0], attention(**inputs)[0])
        use(attention, watcher, stock)
        assert_equal(attention(**inputs, attention_mask=mask), expected)


@pytest.mark.parametrize("stock", JOINT)
def test_bits_with_positional_arguments(stock: type) -> None:
    attention = make_attention(stock)
    inputs = make_inputs(torch.float32, contiguous=True, rope=True)
    arguments = (inputs["hidden_states"], inputs["encoder_hidden_states"], None, inputs["image_rotary_emb"])
    with torch.no_grad():
        expected = stock()(attention, *arguments)
        assert_equal(use(attention, Watcher(), stock)(attention, *arguments), expected)
        assert_equal(use(attention, None, stock)(attention, *arguments), expected)


@pytest.mark.parametrize("stock", JOINT)
def test_gradients_through_an_active_processor(stock: type) -> None:
    attention = make_attention(stock)

    def run() -> list[torch.Tensor]:
        attention.zero_grad(set_to_none=True)
        inputs = make_inputs(torch.float32, contiguous=True, rope=True, grad=True)
        image, text = attention(**inputs)
        (image.square().sum() + text.square().sum()).backward()
        leaves = [inputs["hidden_states"], inputs["encoder_hidden_states"], *attention.parameters()]
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    expected = run()
    use(attention, Watcher(), stock)
    assert_equal(run(), expected)
    assert len(expected) >= 10  # two inputs, and weight and bias of what is used


@pytest.mark.parametrize("stock", JOINT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rope", [False, True])
def test_what_is_shown_is_what_the_stock_call_attends_with(
    stock: type, dtype: torch.dtype, rope: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = make_attention(stock, dtype)
    inputs = make_inputs(dtype, contiguous=True, rope=rope)
    seen: list[torch.Tensor] = []
    original = functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        output = original(query, key, value, **options)
        seen.extend(tensor.clone() for tensor in (query, key, value, output))
        return output

    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(functional, "scaled_dot_product_attention", spy)
            attention(**inputs)
        watcher = Watcher()
        use(attention, watcher, stock)
        attention(**inputs)
    (shown,) = watcher.shown
    assert all(tensor.shape == (BATCH, HEADS, TEXT + IMAGE, WIDTH) for tensor in shown)
    assert all(torch.equal(a, b) for a, b in zip(shown, seen, strict=True))


@pytest.mark.parametrize("stock", JOINT)
def test_an_answer_is_projected_like_any_output(stock: type) -> None:
    """The nested call has no image tokens and no rotary embedding; the answer stands for the attention output."""
    attention = make_attention(stock)
    concepts = torch.randn(BATCH, 3, HEADS * WIDTH, generator=torch.Generator().manual_seed(3))
    answerer = Answerer()
    use(attention, answerer, stock)
    with torch.no_grad():
        image, text = attention(concepts[:, :0], encoder_hidden_states=concepts)
        heads = {
            name: getattr(attention, f"to_{name}")(concepts).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
            for name in "qkv"
        }
        query, key = attention.norm_q(heads["q"]), attention.norm_k(heads["k"])
        answer = query - 2 * key + 3 * heads["v"]
        expected = attention.to_out[0](answer.transpose(1, 2).flatten(2))
    assert image.shape == (BATCH, 0, HEADS * WIDTH)
    torch.testing.assert_close(text, expected, rtol=1e-5, atol=1e-5)
    for shown, wanted in zip(answerer.shown[0], (query, key, heads["v"]), strict=True):
        torch.testing.assert_close(shown, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rope", [False, True])
def test_every_block_of_a_traced_transformer(rope: bool, dtype: torch.dtype, fused: bool) -> None:
    transformer = tiny.make_transformer(rope=rope).to(dtype)
    if fused:
        transformer.fuse_qkv_projections()
    outputs: list[torch.Tensor] = []
    for block in transformer.transformer_blocks:
        block.register_forward_hook(lambda module, args, output: outputs.extend(output))
    generator = torch.Generator().manual_seed(1)
    angles = torch.rand(45, 16, generator=generator) * 6
    inputs = {
        "hidden_states": torch.randn(2, 3, 4, 6, 10, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(2, 12, 32, generator=generator).to(dtype),
        "timestep": torch.tensor([500, 20]),
        "image_rotary_emb": (angles.cos(), angles.sin()) if rope else None,
    }
    with torch.no_grad():
        transformer(**inputs)
        expected = list(outputs)
        outputs.clear()
        with dcm.trace(transformer, concept_embeds=torch.randn(3, 32), methods=METHODS) as maps:
            transformer(**inputs)
    assert len(expected) == 6
    assert_equal(outputs, expected)
    assert maps.get().shape == (2, 3, *tiny.GRID)
