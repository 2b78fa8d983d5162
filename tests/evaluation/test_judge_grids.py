"""The pictures for a judge against an arrangement of their own, pixel by pixel in float64."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import torch

from diffusers_concept_maps import ConceptMapsValueError
from diffusers_concept_maps.evaluation.judge_grids import Grids, make_grids

HEIGHT, WIDTH = 18, 26


def clip(frames: int, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=generator)


def concept_map(tokens: int) -> torch.Tensor:
    scores = torch.rand(tokens, 3, 4, generator=torch.Generator().manual_seed(tokens))
    return 5 * scores * torch.linspace(0.1, 1, tokens)[:, None, None] - 2


def bilinear(values: np.ndarray, row: int, column: int) -> float:
    """The value in the middle of a pixel of a `HEIGHT x WIDTH` picture; outside it is that of the border."""
    position = [(row + 0.5) * values.shape[0] / HEIGHT - 0.5, (column + 0.5) * values.shape[1] / WIDTH - 0.5]
    total = 0.0
    for down in (0, 1):
        for right in (0, 1):
            y, x = int(np.floor(position[0])) + down, int(np.floor(position[1])) + right
            weight = (1 - abs(position[0] - y)) * (1 - abs(position[1] - x))
            total += weight * values[np.clip(y, 0, values.shape[0] - 1), np.clip(x, 0, values.shape[1] - 1)]
    return total


def arranged(
    frames: torch.Tensor, scores: torch.Tensor, tokens: list[int], shown: list[int], per_frame: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The three pictures `[height, width, 3]`, and how far each pixel is from the threshold of the mask."""
    values, pictures = scores.double().numpy(), frames.numpy()
    heat = np.zeros((12, HEIGHT, WIDTH))
    for cell, token in enumerate(tokens):
        of = values[token] if per_frame else values
        scaled = (values[token] - of.min()) / (of.max() - of.min())
        heat[cell] = [[bilinear(scaled, row, column) for column in range(WIDTH)] for row in range(HEIGHT)]
    raw, overlay, colors = (np.zeros((3 * HEIGHT, 4 * WIDTH, 3)) for _ in range(3))
    distance = np.zeros((3 * HEIGHT, 4 * WIDTH))
    for cell in range(12):
        mean = heat[cell].mean() if per_frame else heat.mean()
        for row in range(HEIGHT):
            for column in range(WIDTH):
                y, x = cell // 4 * HEIGHT + row, cell % 4 * WIDTH + column
                pixel = pictures[shown[cell], :, row, column]
                raw[y, x] = pixel
                distance[y, x] = heat[cell, row, column] - mean
                overlay[y, x] = pixel if distance[y, x] > 0 else np.floor(pixel / 2)
                colors[y, x] = np.round(np.array(matplotlib.colormaps["inferno"](heat[cell, row, column])[:3]) * 255)
    return raw, overlay, colors, distance


def compare(grids: Grids, expected: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]) -> None:
    raw, overlay, colors, distance = expected
    for picture in (grids.raw, grids.overlay, grids.heat_map):
        assert picture.dtype == torch.uint8
        assert picture.shape == (3, 3 * HEIGHT, 4 * WIDTH)
    assert np.array_equal(grids.raw.permute(1, 2, 0).numpy(), raw)
    clear = abs(distance) > 1e-6
    assert clear.mean() > 0.99
    assert np.array_equal(grids.overlay.permute(1, 2, 0).numpy()[clear], overlay[clear])
    assert 0.1 < (overlay[clear] == raw[clear]).mean() < 0.9
    # A score on the edge of one of the 256 colors may fall to either side; neighbors differ by few steps.
    assert abs(grids.heat_map.permute(1, 2, 0).numpy() - colors).max() <= 6
    assert (grids.heat_map.permute(1, 2, 0).numpy() == colors).mean() > 0.99


def test_scale_of_the_clip() -> None:
    """A clip of 49 frames whose 13 token frames cover 1, 4, 4, ... of them."""
    frames, scores = clip(49), concept_map(13)
    shown = [0, 4, 9, 13, 17, 22, 26, 31, 35, 39, 44, 48]
    grids = make_grids(frames, scores, frames_per_latent=4)
    assert grids.shown == tuple(shown)
    assert grids.frames == 49
    assert not grids.per_frame
    compare(grids, arranged(frames, scores, [-(-frame // 4) for frame in shown], shown, per_frame=False))


def test_scale_of_each_frame() -> None:
    frames, scores = clip(24), concept_map(6)
    shown = [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]
    grids = make_grids(frames, scores, parity="imap")
    assert grids.shown == tuple(shown)
    assert grids.per_frame
    compare(grids, arranged(frames, scores, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5], shown, per_frame=True))


def test_time_is_seen_on_the_scale_of_the_clip_only() -> None:
    """A concept of one frame is dark in the others; scaled by themselves these are as bright."""
    scores = torch.linspace(0, 1, 12).view(1, 3, 4).repeat(12, 1, 1) * 0.01
    scores[5] *= 100
    brightness = {}
    for parity in (None, "imap"):
        heat = make_grids(clip(12), scores, parity=parity).heat_map.double().mean(0)
        cells = heat.view(3, HEIGHT, 4, WIDTH).mean((1, 3)).flatten()
        brightness[parity] = cells / cells[5]
    others = [cell for cell in range(12) if cell != 5]
    assert brightness[None][others].max() < 0.1
    # A score on the edge of a color may fall to either side.
    assert brightness["imap"].numpy() == pytest.approx(1, abs=1e-3)


def test_short_clips_and_images_are_shown_repeatedly() -> None:
    grids = make_grids(clip(6), concept_map(6))
    assert grids.shown == (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5)
    assert make_grids(clip(1), concept_map(1)).shown == (0,) * 12


def test_constant_map_is_dark() -> None:
    for parity in (None, "imap"):
        grids = make_grids(clip(12), torch.full((12, 3, 4), 7.0), parity=parity)
        black = torch.tensor(matplotlib.colormaps["inferno"](0.0)[:3]).mul(255).round().to(torch.uint8)
        assert torch.equal(grids.heat_map, black[:, None, None].expand_as(grids.heat_map))
        assert torch.equal(grids.overlay, grids.raw // 2)


def test_large_frames_are_shrunk() -> None:
    # Equal colors stay what they are, and edges stay where they are, at whatever size.
    frames = torch.zeros(12, 3, 600, 1024, dtype=torch.uint8)
    frames[:, :, :, 512:] = 200
    raw = make_grids(frames, concept_map(12)).raw
    assert raw.shape == (3, 3 * 300, 4 * 512)
    first = raw[:, :300, :512]
    assert torch.equal(first[:, :, :254], torch.zeros(3, 300, 254, dtype=torch.uint8))
    assert torch.equal(first[:, :, 258:], torch.full((3, 300, 254), 200, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("frames", "scores", "parity", "message"),
    [
        (clip(12).float(), concept_map(12), None, r"frames of shape \[12, 3, 18, 26\] and torch.float32"),
        (clip(12)[:, :1], concept_map(12), None, r"frames of shape \[12, 1, 18, 26\]"),
        (clip(12)[:0], concept_map(12), None, r"frames of shape \[0, 3, 18, 26\]"),
        (clip(12), concept_map(12)[None], None, r"scores of shape \[1, 12, 3, 4\]"),
        (clip(12), concept_map(12).long(), None, "scores of shape .* and torch.int64"),
        (clip(12), concept_map(12)[:0], None, r"scores of shape \[0, 3, 4\]"),
        (clip(12), concept_map(12).log(), None, "not finite"),
        (clip(12), concept_map(12), "official", "unknown parity 'official'; expected None or 'imap'"),
    ],
)
def test_mistakes(frames: torch.Tensor, scores: torch.Tensor, parity: str | None, message: str) -> None:
    with pytest.raises(ConceptMapsValueError, match=message):
        make_grids(frames, scores, parity=parity)
