"""Analyses of tiny models of other families: attention of images alone, padded text, and what has no text in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backbones import tiny_hunyuan_video, tiny_wan

from diffusers_concept_maps import ConceptMapsError
from diffusers_concept_maps.evaluation.analysis import Settings, Subject, eigenvalues, find_analysis
from diffusers_concept_maps.evaluation.analysis._transition import Transition

SETTINGS = {"size": (48, 80), "noise_levels": (0.5,)}


def subject(frames: int = 9) -> Subject:
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(frames, 48, 80, dtype=torch.int64)
    labels[:, :20, :30] = 1
    pixels = torch.randint(0, 256, (frames, 3, 48, 80), generator=generator, dtype=torch.uint8)
    return Subject("noise", pixels, labels, ("dog", "beach"), "a dog running on the beach")


def formed(transition: Transition) -> torch.Tensor:
    query, key = transition.query.double(), transition.key.double()
    logits = query @ key.mT / query.shape[-1] ** 0.5
    if transition.mask is not None:
        hidden = ~transition.mask if transition.mask.dtype == torch.bool else transition.mask < -1
        logits = logits.masked_fill(hidden, -torch.inf)
    return logits.softmax(-1)


@pytest.mark.parametrize("tokens", ["image", "joint"])
@pytest.mark.parametrize("make", [tiny_wan.make_pipeline, tiny_hunyuan_video.make_pipeline])
def test_eigenvalues_are_those_of_the_formed_matrices(
    make: Callable[[], Any], tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, kept, original = make(), [], eigenvalues.second_eigenvalue

    def keep(transition: Transition, **options: Any) -> Any:
        kept.append(formed(transition))
        return original(transition, **options)

    monkeypatch.setattr(eigenvalues, "second_eigenvalue", keep)
    before = dict(pipe.transformer.attn_processors)
    asked = Settings(tokens=tokens, **SETTINGS)  # type: ignore[arg-type]
    if make is tiny_wan.make_pipeline and tokens == "joint":
        with pytest.raises(ConceptMapsError, match="image tokens of this model attend to themselves alone"):
            eigenvalues.read_eigenvalues(pipe, subject(), asked)
    else:
        found = eigenvalues.read_eigenvalues(pipe, subject(), asked)
        expected = torch.linalg.eigvals(torch.stack(kept)).abs().sort(descending=True).values[..., 1]
        torch.testing.assert_close(found.modulus[0], expected, rtol=0, atol=1e-3)
        assert bool(found.converged.all())
    after = pipe.transformer.attn_processors
    assert all(after[name] is processor for name, processor in before.items())


def test_cross_attention_is_analyzed() -> None:
    pipe = tiny_wan.make_pipeline()
    asked = Settings(method="cross_attention", **SETTINGS)  # type: ignore[arg-type]
    for name in ("layers-steps", "heads", "separability", "eigenvalues"):
        findings = find_analysis(name).run(pipe, [subject()], asked)
        rows = findings.tables[name].rows
        assert len(rows) == {"layers-steps": 3, "heads": 12, "separability": 1 + 3 + 12, "eigenvalues": 12}[name]
