"""Upsampling that follows the edges of the frames, held to the guided filter written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusers_concept_maps.maps import ConceptMaps, StoredMaps
from diffusers_concept_maps.upsample import upsample_map


def window(values: np.ndarray, y: int, x: int, radii: tuple[int, int]) -> np.ndarray:
    """Values `[pixel, ...]` around a pixel; beyond the border its edge is repeated."""
    rows = np.clip(np.arange(y - radii[0], y + radii[0] + 1), 0, values.shape[0] - 1)
    columns = np.clip(np.arange(x - radii[1], x + radii[1] + 1), 0, values.shape[1] - 1)
    return values[rows[:, None], columns].reshape(-1, *values.shape[2:])


def guided_filter(plane: np.ndarray, colors: np.ndarray, radii: tuple[int, int]) -> np.ndarray:
    """Per window the regression of the map on the colors with a ridge of 1e-3; the mean of those a pixel is in."""
    height, width = plane.shape
    lines = np.zeros((height, width, 4))
    for y in range(height):
        for x in range(width):
            color, value = window(colors, y, x, radii), window(plane, y, x, radii)
            centered = color - color.mean(0)
            slope = np.linalg.solve(
                centered.T @ centered / len(color) + 1e-3 * np.eye(3), centered.T @ value / len(color)
            )
            lines[y, x] = *slope, value.mean() - slope @ color.mean(0)
    mean = np.stack([[window(lines, y, x, radii).mean(0) for x in range(width)] for y in range(height)])
    return (mean[..., :3] * colors).sum(-1) + mean[..., 3]


@pytest.mark.parametrize(("grid", "size"), [((3, 4), (13, 17)), ((1, 2), (9, 10)), ((5, 1), (10, 3))])
def test_guided_filter(grid: tuple[int, int], size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(1, 2, 2, *grid, generator=generator)
    guide = torch.rand(5, 3, *size, generator=generator)
    smooth = upsample_map(maps, size, 5, temporal="linear", frames_per_latent=4).double().numpy()
    got = upsample_map(maps, size, 5, temporal="linear", frames_per_latent=4, mode="guided", guide=guide)
    radii = tuple(int(np.ceil(pixels / tokens)) for pixels, tokens in zip(size, grid, strict=True))
    colors = guide.double().permute(0, 2, 3, 1).numpy()
    wanted = [[guided_filter(smooth[0, c, f], colors[f], radii) for f in range(5)] for c in range(2)]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[0].double(), torch.from_numpy(np.array(wanted)), rtol=0, atol=2e-4)


def test_a_mask_falls_on_the_edges_of_its_object() -> None:
    """A disk known on 8 x 8 tokens only: guided by the frame its outline is found again."""
    y, x = np.mgrid[:96, :96]
    disk = torch.from_numpy((y - 43.0) ** 2 + (x - 50.0) ** 2 < 27**2)
    frame = torch.where(disk[None], torch.tensor([0.8, 0.3, 0.2])[:, None, None], torch.tensor(0.4))[None]
    coarse = torch.nn.functional.adaptive_avg_pool2d(disk.float()[None, None], 8)

    def overlap(pixels: torch.Tensor) -> float:
        found = pixels[0, 0, 0] > 0.5
        return float((found & disk).sum() / (found | disk).sum())

    tensors = {"imap": coarse[:, :, None], "coverage.imap": torch.ones(1, 1, dtype=torch.bool)}
    maps = ConceptMaps(StoredMaps(("disk",), tensors), ["imap"])
    assert overlap(maps.upsample((96, 96), 1)) < 0.97
    assert overlap(maps.upsample(mode="guided", guide=frame)) > 0.995
