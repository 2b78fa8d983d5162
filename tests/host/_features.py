"""Which features of diffusers the stock models of five families have; the tests of this folder assert every cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from host._families import FAMILIES


class Blank(NamedTuple):
    """A feature that stock diffusers does not have for a family.

    Attributes:
        error: what it raises; None where it does nothing.
        match: of the error's message; where it does nothing, why.
    """

    error: type[Exception] | None
    match: str

    def __str__(self) -> str:
        return "stock refuses" if self.error is not None else "stock ignores"


class Feature(NamedTuple):
    """One row of the table.

    Attributes:
        what: the user's code.
        note: what a capture does with it.
        blanks: by family, where stock does not have it.
    """

    what: str
    note: str
    blanks: dict[str, Blank]


_NO_REPEATED = Blank(ValueError, "`_repeated_blocks` attribute is empty")
_NO_CACHE = Blank(AttributeError, "no attribute 'enable_cache'")
_NO_BACKEND = Blank(None, "its processors call PyTorch's attention themselves")
_NO_FUSION = Blank(None, "its attention modules have no such method")
_NO_IP_ADAPTERS = dict.fromkeys(
    ("CogVideoX", "Wan 2.1", "HunyuanVideo"), Blank(AttributeError, "no attribute 'load_ip_adapter'")
)
_NO_PLAN = Blank(ValueError, "`cp_plan` must be provided")
_EXACT = "frames and maps as without"
_LORA = "frames as without, maps of weights with the LoRA in them (within 1e-4); before or while attached"
_SKIPS = "skipped steps and layers are not in `coverage`"

FEATURES = {
    "compile": Feature("`transformer.compile(fullgraph=True)`", "frames of the compiled stock, maps of eager", {}),
    "compile blocks": Feature("`block.compile(fullgraph=True)`", "likewise", {}),
    "compile repeated blocks": Feature(
        "`transformer.compile_repeated_blocks(fullgraph=True)`",
        "likewise",
        {"CogVideoX": _NO_REPEATED, "SD3": _NO_REPEATED},
    ),
    "group offload, blocks": Feature('`enable_group_offload(..., offload_type="block_level")`', _EXACT, {}),
    "group offload, leaves": Feature('`enable_group_offload(..., offload_type="leaf_level")`', _EXACT, {}),
    "group offload, disk": Feature("`enable_group_offload(..., offload_to_disk_path=...)`", _EXACT, {}),
    "model offload": Feature("`pipe.enable_model_cpu_offload()`", _EXACT, {}),
    "sequential offload": Feature(
        "`accelerate.cpu_offload(transformer)`, as `enable_sequential_cpu_offload` does", _EXACT, {}
    ),
    "casting": Feature("`enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, ...)`", _EXACT, {}),
    "torchao": Feature(
        "`from_pretrained(..., quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))`",
        "frames as without, maps of the rounded weights (within 1e-4)",
        {},
    ),
    "quantized": Feature("linear layers in int8 (`torch.ao.quantization.quantize_dynamic`)", "frames as without", {}),
    "lora": Feature("`pipe.load_lora_weights(...)`, `unload_lora_weights()`", _LORA, {}),
    "lora scale": Feature(
        '`attention_kwargs={"scale": ...}`, `joint_attention_kwargs={"scale": ...}`',
        "frames as without, maps of the weights with as much of the LoRA in them (within 1e-4)",
        {},
    ),
    "adapters": Feature(
        "`transformer.add_adapter(LoraConfig(...))`, `disable_adapters()`, `delete_adapters(...)`",
        _LORA,
        {},
    ),
    "fuse lora": Feature("`pipe.fuse_lora()`, `unfuse_lora()`", _LORA, {}),
    "torchao and lora": Feature(
        "`add_adapter(LoraConfig(...))` on weights in int8 by torchao",
        "frames as without, maps of the rounded weights with the LoRA (within 1e-4)",
        {},
    ),
    "backend": Feature(
        "`transformer.set_attention_backend(...)`", _EXACT, {"CogVideoX": _NO_BACKEND, "SD3": _NO_BACKEND}
    ),
    "fuse": Feature(
        "`transformer.fuse_qkv_projections()`", "frames as without, maps within 1e-5", {"HunyuanVideo": _NO_FUSION}
    ),
    "fuse while attached": Feature(
        "the same, while a capture is attached",
        "frames as without; where it replaces processors (CogVideoX, SD3) a warning, and no maps",
        {"HunyuanVideo": _NO_FUSION},
    ),
    "ip adapter": Feature(
        "`pipe.load_ip_adapter(...)`", "frames as without a capture, maps of the adapted model", _NO_IP_ADAPTERS
    ),
    "ip adapter while attached": Feature(
        "the same, while a capture is attached",
        "frames as without a capture, a warning, and no maps of the layers with other processors",
        _NO_IP_ADAPTERS,
    ),
    "sharing": Feature(
        "two pipelines with one transformer",
        "the runs of the other one are left out; within a step of the traced one they are an error",
        {},
    ),
    "router": Feature("`transformer.set_attn_processor(dcm.ConceptAttnProcessor())`", _EXACT, {}),
    "context parallel": Feature(
        "`transformer.enable_parallelism(config=ContextParallelConfig(...))`",
        "frames of the host, and in every process the maps of one (within 1e-5); every process needs the capture",
        dict.fromkeys(("CogVideoX", "HunyuanVideo", "SD3"), _NO_PLAN),
    ),
    "tiling": Feature("`pipe.vae.enable_tiling()`", _EXACT, {}),
    "first block cache": Feature("`enable_cache(FirstBlockCacheConfig(...))`", _SKIPS, {"SD3": _NO_CACHE}),
    "pyramid": Feature("`enable_cache(PyramidAttentionBroadcastConfig(...))`", _SKIPS, {"SD3": _NO_CACHE}),
    "faster cache": Feature("`enable_cache(FasterCacheConfig(...))`", _SKIPS, {"SD3": _NO_CACHE}),
    "taylor": Feature("`enable_cache(TaylorSeerCacheConfig(...))`", _SKIPS, {"SD3": _NO_CACHE}),
}


def cells(feature: str) -> list[Any]:
    """Every family, and why stock has no such feature for it; None if it has."""
    return [pytest.param(case, FEATURES[feature].blanks.get(case.name), id=case.name) for case in FAMILIES]


def refused(blank: Blank | None, apply: Callable[[], object]) -> bool:
    """Apply a feature; where stock does not have it, this asserts that it refuses."""
    if blank is None or blank.error is None:
        apply()
        return False
    with pytest.raises(blank.error, match=blank.match):
        apply()
    return True


def _row(feature: Feature) -> list[str]:
    marks = [str(feature.blanks.get(case.name, "yes")) for case in FAMILIES]
    return [feature.what, *marks, feature.note]


def page() -> str:
    """The documentation page: what `FEATURES` says, which the tests assert cell by cell."""
    header = ["feature", *(case.name for case in FAMILIES), "with a capture"]
    rows = [header, ["---"] * len(header), *(_row(feature) for feature in FEATURES.values())]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return _PAGE.format(table=table)


_PAGE = """# What of diffusers works beside a capture

Written by `python docs/make_host.py` from the table that the tests in `tests/host/` go through, cell by cell:
"yes" is tested with a tiny stock pipeline; "stock refuses" is an error of diffusers itself that a test expects,
"stock ignores" a call that changes nothing there. All of it on the CPU.

{table}

Frames are compared bit for bit with those of the same feature without a capture.

**torch.compile.** Compile before the capture; compiling within its `with` block is an error. Graphs have no break:
the blocks' tensors are handed to ops that call back, and the concepts themselves run eagerly, outside of the
graph. The first capture of a compiled model compiles once more, later ones do not. The ops take a tensor on the
CPU, so that graphs with them are not recorded as CUDA graphs (not tried on a GPU). Under Inductor maps differ from
those of eager by what its own rounding makes of the model. `attention="one_pass"` refuses compiled models. Of
models with cross-attention, a processor has to say how it projects keys (`project_key`).

**Caches.** A step or layer that a cache leaves out has no map: `maps.coverage` says what a map is made of, and the
mean is over that alone. Concepts go past a layer that is left out, so that maps of deeper layers are those of
concepts that have skipped it. Pyramid Attention Broadcast and FasterCache count every forward pass, also where
guidance has two.

**Context parallelism.** Enter the capture in every process, or the others wait for it; the tokens of a layer are
gathered before it is scored. It is refused for other families, whose layers the host splits otherwise.

**IP-Adapter, fused projections.** What replaces processors while a capture is attached is noticed at the next
call. Fuse projections and load an IP-Adapter before the `with` block.

**LoRA, quantization.** LoRA is PEFT's, on every linear layer of the transformer; weights in int8 are torchao's, and
PyTorch's own, whose layers have no tensor for a weight.

**Not tried**: quantization by bitsandbytes, GGUF or Quanto, and ring attention, for want of the packages or of a GPU.
"""
