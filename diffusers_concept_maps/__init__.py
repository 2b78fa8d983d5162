"""Concept saliency maps for unmodified diffusers pipelines.

concept text -> embeddings (`concepts`) -> concept tokens carried through the blocks (`stream`) -> attention processors
that show q, k, v and output (`processors`) -> similarity and head statistics (`ops`, `reference`) -> one map per
layer and step (`methods`) -> running mean (`accumulate`) -> `ConceptMaps` (`maps`, `upsample`) -> beside the frames
(`pipeline`), as a picture (`visualize`) or a file (`commands`, run by `cli`).

`capture` attaches all this to a transformer and undoes it; `recorder` is a capture at work and `progress` tells it
which step and guidance branch a forward pass is; `plan` checks what was asked for; `backbones` say where text enters
a model and how its tokens are laid out. `shapes` is the embedded model and the scenes it was trained on.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "AttentionEdit": "editing.edits",
    "ConceptAttnProcessor": "processors",
    "ConceptMap": "concept_map",
    "ConceptMaps": "maps",
    "ConceptMapsError": "errors",
    "ConceptMapsMixin": "pipeline",
    "ConceptMapsPipelineOutput": "pipeline",
    "ConceptMapsValueError": "errors",
    "HeadSelection": "heads",
    "attach": "capture",
    "backbones": "",
    "concept_attn_processors": "processors",
    "cross_attention_guidance": "correspondence.guidance",
    "edit_attention": "editing.attach",
    "encode": "encoding",
    "load": "maps",
    "load_shapes_pipeline": "shapes.model",
    "parity": "",
    "trace": "capture",
    "trace_correspondence": "correspondence.tracing",
    "track": "correspondence.tracking",
    "with_concept_maps": "pipeline",
}

__all__ = [
    "AttentionEdit",
    "ConceptAttnProcessor",
    "ConceptMap",
    "ConceptMaps",
    "ConceptMapsError",
    "ConceptMapsMixin",
    "ConceptMapsPipelineOutput",
    "ConceptMapsValueError",
    "HeadSelection",
    "attach",
    "backbones",
    "concept_attn_processors",
    "cross_attention_guidance",
    "edit_attention",
    "encode",
    "load",
    "load_shapes_pipeline",
    "parity",
    "trace",
    "trace_correspondence",
    "track",
    "with_concept_maps",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use, so that importing the package stays cheap."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _HOME[name]:  # a module itself
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
