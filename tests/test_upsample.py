"""From the token grid to pixels, held to float64 interpolation written out."""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import diffusers_concept_maps as dcm
from diffusers_concept_maps.fitting import Fit, fit_clip
from diffusers_concept_maps.maps import ConceptMaps, StoredMaps
from diffusers_concept_maps.upsample import spread_frames, upsample_map

CAUSAL = [0, 1, 1, 1, 1, 2, 2, 2, 2]
COVERING = [  # of which token frame every video frame is, by what the VAE and the patches do
    (3, 9, {"frames_per_latent": 4}, CAUSAL),
    (3, 9, {}, CAUSAL),
    (1, 1, {"frames_per_latent": 4}, [0]),
    (1, 5, {}, [0] * 5),
    (3, 3, {"frames_per_latent": 1}, [0, 1, 2]),
    (2, 9, {"frames_per_latent": 4, "latents_per_token": 2}, [0, *[1] * 8]),
    (2, 13, {"frames_per_latent": 4, "latents_per_token": 2}, [0] * 5 + [1] * 8),
    (2, 16, {"frames_per_latent": 4, "latents_per_token": 2}, [0] * 8 + [1] * 8),
    (3, 17, {"frames_per_latent": 8}, [0, *[1] * 8, *[2] * 8]),
    (4, 8, {"frames_per_latent": 4}, [0, 0, 1, 1, 2, 2, 3, 3]),
    (3, 2, {}, [0, 1]),
]


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def across(count: int, pixels: int) -> np.ndarray:
    """Weights `[pixels, count]` of linear interpolation between the centers of `count` tokens."""
    at = (np.arange(pixels) + 0.5) * count / pixels - 0.5
    return np.stack([np.interp(at, np.arange(count), row) for row in np.eye(count)], 1)


def along(covering: list[int], tokens: int) -> np.ndarray:
    """Weights `[frame, token]` of linear interpolation between the middles of what the tokens cover."""
    seen = sorted(set(covering))
    middles = [np.mean([frame for frame, token in enumerate(covering) if token == one]) for one in seen]
    rows = [np.interp(np.arange(len(covering)), middles, np.eye(tokens)[seen, token]) for token in range(tokens)]
    return np.stack(rows, 1)


@pytest.mark.parametrize(("count", "frames", "geometry", "covering"), COVERING)
def test_linear_in_time(count: int, frames: int, geometry: dict[str, int], covering: list[int]) -> None:
    maps = tokens(2, count, 3, 4)
    got = spread_frames(maps, frames, temporal="linear", **geometry)
    wanted = np.einsum("ft,btyx->bfyx", along(covering, count), maps.double().numpy())
    torch.testing.assert_close(got.double(), torch.from_numpy(wanted), rtol=0, atol=1e-6)
    assert torch.equal(spread_frames(maps, frames, **geometry), maps[:, covering])


def test_linear_in_time_by_hand() -> None:
    """Middles at 0, 2.5 and 6.5: frame 1 is two fifths of the way, frame 4 three eighths."""
    got = spread_frames(torch.tensor([0.0, 10, 50]).view(3, 1, 1), 9, temporal="linear", frames_per_latent=4)
    assert got.flatten().tolist() == pytest.approx([0, 4, 8, 15, 25, 35, 45, 50, 50])


@pytest.mark.parametrize("temporal", ["nearest", "linear"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("size", [(17, 11), (3, 4), (2, 1), (48, 80)])
def test_pixels(mode: str, temporal: str, size: tuple[int, int]) -> None:
    maps = tokens(2, 2, 3, 3, 4)
    got = upsample_map(maps, size, 9, mode=mode, temporal=temporal, frames_per_latent=4)
    rows, columns = across(3, size[0]), across(4, size[1])
    if mode == "nearest":
        rows, columns = (
            np.eye(count)[[math.floor(Fraction(2 * pixel + 1, 2 * n) * count) for pixel in range(n)]]
            for count, n in zip((3, 4), size, strict=True)
        )
    weights = along(CAUSAL, 3) if temporal == "linear" else np.eye(3)[CAUSAL]
    wanted = np.einsum("yi,xj,ft,bctij->bcfyx", rows, columns, weights, maps.double().numpy())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.from_numpy(wanted), rtol=0, atol=1e-5)


def test_labels_keep_their_dtype() -> None:
    labels = torch.arange(24).view(1, 2, 3, 4)
    got = upsample_map(labels, (6, 8), 5, mode="nearest", frames_per_latent=4)
    wanted = labels[:, [0, 1, 1, 1, 1]].repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("temporal", ["nearest", "linear"])
@pytest.mark.parametrize(("frames", "padding"), [(9, 4), (2, 3), (13, 0)])
def test_padding_is_left_out(frames: int, padding: int, temporal: str) -> None:
    maps = tokens(1 + (frames + padding - 1) // 4, 3, 4)
    options: dict[str, Any] = {"temporal": temporal, "frames_per_latent": 4}
    whole = upsample_map(maps, (6, 5), frames + padding, **options)
    assert torch.equal(upsample_map(maps, (6, 5), frames, padding=padding, **options), whole[:frames])


def stored(fit: Fit | None, **metadata: Any) -> ConceptMaps:
    metadata = {"frames_per_latent": 4} | metadata
    frames = 3 if fit is None else 1 + (fit.model[0] - 1) // metadata["frames_per_latent"]
    tensors = {"imap": tokens(1, 2, frames, 4, 5), "coverage.imap": torch.ones(1, 1, dtype=torch.bool)}
    source = {} if fit is None else {"source": fit.to_json()}
    return ConceptMaps(StoredMaps(("dog", "sky"), tensors, source | metadata), ["imap"])


@pytest.mark.parametrize("temporal", ["nearest", "linear"])
@pytest.mark.parametrize(("frames", "seen", "fitted"), [(7, 7, 9), (9, 9, 9), (30, 9, 9), (1, 1, 1)])
def test_back_to_the_clip(frames: int, seen: int, fitted: int, temporal: str) -> None:
    """Padded frames are gone, frames that were cut off have no map."""
    _, fit = fit_clip(torch.zeros(frames, 3, 37, 53), multiple=16, frame_step=4, max_frames=9)
    maps = stored(fit)
    got = maps.upsample(temporal=temporal)
    whole = upsample_map(maps.get(), (37, 53), fitted, temporal=temporal, frames_per_latent=4)
    assert got.shape == (1, 2, seen, 37, 53)
    assert torch.equal(got, whole[:, :, :seen])
    assert torch.equal(maps.upsample((37, 53), seen, "imap", temporal=temporal), got)
    small = upsample_map(maps.get(), (8, 9), fitted, mode="nearest", temporal=temporal, frames_per_latent=4)
    assert torch.equal(maps.upsample((8, 9), mode="nearest", temporal=temporal), small[:, :, :seen])
    other = upsample_map(maps.get(), (37, 53), 5, temporal=temporal, frames_per_latent=4)
    assert torch.equal(maps.upsample(frames=5, temporal=temporal), other)


@pytest.mark.parametrize(("frames", "seen", "fitted"), [(7, 7, 9), (30, 9, 9)])
def test_laid_over_the_clip(frames: int, seen: int, fitted: int) -> None:
    """The clip as it was handed over: of what was cut off there is no picture, and padding shifts nothing."""
    clip = torch.rand(frames, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    _, fit = fit_clip(clip, multiple=8, frame_step=8, max_frames=9)
    maps = stored(fit, frames_per_latent=8)
    assert maps.fit == fit
    plain = dcm.ConceptMap("dog", maps.get()[:, 0, ([0] + [1] * (fitted - 1))[:seen]])
    wanted = [np.asarray(picture) for picture in plain.overlay(clip[:seen])]
    for source in (clip, clip[:seen]):
        got = [np.asarray(picture) for picture in maps["dog"].overlay(source)]
        assert len(got) == seen
        assert all(np.array_equal(*pair) for pair in zip(got, wanted, strict=True))


def test_the_clip_survives_a_file(tmp_path: Any) -> None:
    maps = stored(Fit((7, 37, 53), (9, 32, 48), 2))
    maps.save(tmp_path / "maps.safetensors")
    assert torch.equal(dcm.load(tmp_path / "maps.safetensors").upsample(), maps.upsample())


@pytest.mark.parametrize("arguments", [(), ((8, 9),), (None, 9)])
def test_no_clip_to_come_back_to(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(dcm.ConceptMapsValueError, match="these maps are of no clip to take them from; expected size="):
        stored(None).upsample(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "cubic"}, "^mode is 'cubic'; expected one of bilinear, nearest, guided"),
        ({"temporal": "cubic"}, "^temporal is 'cubic'; expected one of nearest, linear"),
        ({"mode": "guided"}, "^mode is 'guided' without a guide; expected frames to follow as `guide` with mode="),
        ({"guide": torch.zeros(9, 3, 8, 8)}, "^mode is 'bilinear' with a guide; expected frames to follow as `guide`"),
        ({"padding": -1}, "^-1 frames of padding; expected none or more"),
        (
            {"mode": "guided", "guide": torch.zeros(9, 3, 8, 9)},
            r"^the guide has shape \(9, 3, 8, 9\); expected the frames that the maps are shown on, \(9, 3, 8, 8\)",
        ),
    ],
)
def test_what_cannot_be_upsampled(options: dict[str, Any], message: str) -> None:
    with pytest.raises(dcm.ConceptMapsValueError, match=message):
        upsample_map(tokens(3, 2, 2), (8, 8), 9, **options)


def test_one_guide_for_several_videos() -> None:
    tensors = {"imap": tokens(2, 1, 1, 4, 5), "coverage.imap": torch.ones(1, 1, dtype=torch.bool)}
    maps = ConceptMaps(StoredMaps(("dog",), tensors), ["imap"])
    with pytest.raises(dcm.ConceptMapsValueError, match="^one guide for maps of 2 videos; upsample each with"):
        maps.upsample(mode="guided", guide=torch.zeros(1, 3, 8, 8))


def test_no_kornia(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia", None)
    monkeypatch.setitem(sys.modules, "kornia.filters", None)
    with pytest.raises(
        dcm.ConceptMapsError, match=r'^mode="guided" needs kornia \(.*install "diffusers-concept-maps\[guided'
    ):
        upsample_map(tokens(1, 2, 2), (8, 8), 1, mode="guided", guide=torch.zeros(1, 3, 8, 8))
