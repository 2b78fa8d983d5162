"""The page on edits runs from top to bottom, and names the families that can be edited."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones import find_backbone
from diffusers_concept_maps.shapes.captions import TEXT_LENGTH
from diffusers_concept_maps.shapes.judge import segment
from diffusers_concept_maps.shapes.scenes import COLORS

PAGE = (Path(__file__).parents[1] / "docs" / "editing.md").read_text(encoding="utf-8")


def test_the_page_runs_from_top_to_bottom() -> None:
    names: dict[str, Any] = {}
    for source in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(source, names)
    assert len(names["video"]) == 6
    assert names["maps"].get().shape[:2] == (1, 1)


def test_a_word_goes_where_it_is_sent() -> None:
    """In the embedded model, as the page says; on average over four seeds."""
    pipe = dcm.load_shapes_pipeline()
    pipe.set_progress_bar_config(disable=True)
    left = (torch.arange(32) < 16).expand(32, 32)
    shares = []
    for there in (left, ~left):
        edits = [dcm.AttentionEdit("red", scale=8.0, mask=there), dcm.AttentionEdit("red", scale=0.0, mask=~there)]
        with dcm.edit_attention(pipe, edits):
            clips = pipe(
                ["a red circle standing still on dark background"] * 4,
                generator=[torch.Generator().manual_seed(seed) for seed in range(4)],
                max_sequence_length=TEXT_LENGTH,
                num_inference_steps=10,
                output_type="pt",
            ).frames
        red = segment(clips) == list(COLORS).index("red")
        assert red.any((1, 2, 3)).all()
        shares.append((red & left).sum() / red.sum())
    assert shares[0] > 0.8
    assert shares[1] < 0.2


def test_the_families_that_can_be_edited() -> None:
    editable = {name for name in dcm.backbones.supported() if _backbone(name).editable}
    assert editable == {
        "CogVideoXTransformer3DModel",
        "ConsisIDTransformer3DModel",
        "CosmosTransformer3DModel",
        "HunyuanVideoTransformer3DModel",
        "Kandinsky5Transformer3DModel",
        "LTX2VideoTransformer3DModel",
        "LTXVideoTransformer3DModel",
        "MochiTransformer3DModel",
        "SD3Transformer2DModel",
        "SkyReelsV2Transformer3DModel",
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
    }


def _backbone(name: str) -> Any:
    return find_backbone(type(name, (torch.nn.Module,), {})())
