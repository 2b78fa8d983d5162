"""From tokens to pixels and video frames: geometry by hand, parity by PyTorch's own sampling."""

from __future__ import annotations

import pytest
import torch

from diffusers_concept_maps import ConceptMapsValueError
from diffusers_concept_maps.correspondence.readout import (
    READOUTS,
    TokenGrid,
    covering_frames,
    covering_visibility,
    interpolate_matches,
    nearest_token,
    neighbors,
    pixel_to_token,
    token_to_pixel,
    video_positions,
)

GRID = TokenGrid(frames=1, height=3, width=4, stride=(16.0, 10.5))


def cells(grid: TokenGrid) -> torch.Tensor:
    """(x, y) of every token of a frame, `[P, 2]`."""
    index = torch.arange(grid.tokens)
    return torch.stack([index % grid.width, index // grid.width], dim=1).float()


def pixels(grid: TokenGrid, count: int = 500, seed: int = 0) -> torch.Tensor:
    """Places anywhere between the borders of a frame, `[count, 2]`."""
    place = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed))
    return place * torch.tensor([grid.width * grid.stride[0], grid.height * grid.stride[1]]) - 0.5


def test_a_token_is_in_the_middle_of_its_pixels() -> None:
    centers = token_to_pixel(torch.tensor([[0.0, 0.0], [3.0, 2.0]]), GRID)
    torch.testing.assert_close(centers, torch.tensor([[7.5, 4.75], [55.5, 25.75]]))
    covered = torch.arange(16.0)  # the pixels of token 0
    assert covered.mean() == centers[0, 0]
    places = pixels(GRID)
    torch.testing.assert_close(token_to_pixel(pixel_to_token(places, GRID), GRID), places)


def test_the_nearest_token_has_the_pixel() -> None:
    places = torch.tensor([[0.0, 0.0], [15.0, 9.9], [16.0, 10.1], [63.5, 31.0], [-9.0, 99.0]])
    assert nearest_token(places, GRID).tolist() == [0, 0, 5, 11, 8]


def test_neighbors_share_by_distance_and_the_border_has_fewer() -> None:
    found = neighbors(torch.tensor([[11.5, 4.75], [-0.5, -0.5], [63.5, 15.25]]), GRID, "refined")
    dense = torch.zeros(3, GRID.tokens).scatter_add(1, found.tokens, found.shares)
    expected = torch.zeros(3, GRID.tokens)
    expected[0, :2] = torch.tensor([0.75, 0.25])  # 4 of 16 pixels from the first token to the second
    expected[1, 0] = 1.0
    expected[2, 7] = 1.0
    torch.testing.assert_close(dense, expected)


def test_neighbors_of_a_grid_of_one_token() -> None:
    grid = TokenGrid(1, 1, 1, (8.0, 8.0))
    found = neighbors(pixels(grid), grid, "displacement")
    assert found.tokens.unique().tolist() == [0]
    torch.testing.assert_close(found.shares.sum(-1), torch.ones(500))


def test_official_readout_is_grid_sample() -> None:
    grid = TokenGrid(1, 30, 45, (16.0, 16.0))
    matches = torch.rand(grid.tokens, 2, generator=torch.Generator().manual_seed(1)) * 30
    places = pixels(grid)
    margin = 720 / 1024
    sizes = torch.tensor([45 - margin, 30 - margin])
    sample = (2 * places / 16 / sizes - 1).view(1, 1, -1, 2)
    plane = matches.T.view(1, 2, 30, 45)
    expected = torch.nn.functional.grid_sample(
        plane, sample, mode="bilinear", align_corners=True, padding_mode="zeros"
    )
    found = neighbors(places, grid, "difftrack")
    result = interpolate_matches(places, found, matches[found.tokens][..., None, :], grid, "difftrack")
    torch.testing.assert_close(result[:, 0], expected[0, :, 0].T * 16, rtol=0, atol=2e-3)


@pytest.mark.parametrize("readout", READOUTS)
def test_what_a_readout_makes_of_a_shift(readout: str) -> None:
    places = pixels(GRID)
    found = neighbors(places, GRID, readout)
    shift = torch.tensor([0.25, -0.5])
    matches = cells(GRID)[found.tokens] + shift
    result = interpolate_matches(places, found, matches[..., None, :], GRID, readout)[:, 0]
    moved = shift * torch.tensor(GRID.stride)
    if readout in ("refined", "displacement"):
        torch.testing.assert_close(result, places + moved, rtol=0, atol=1e-4)
    elif readout != "difftrack":
        torch.testing.assert_close(result, token_to_pixel(cells(GRID)[nearest_token(places, GRID)], GRID) + moved)
    else:
        assert (result - places - moved).norm(dim=1).max() > 4


def test_a_point_beside_another_thing_moves_with_its_own() -> None:
    """Of two things that part, the mean of all motions around a point puts it between them."""
    places = torch.tensor([[20.0, 10.0]])  # 3.5 of 16 pixels to the left of the center of token 1, above token 5
    moved = torch.tensor([[5.0, 0.0], [0.25, 0.0]]).repeat(2, 1)  # of the tokens to the left, and of the nearest
    results = {}
    for readout in ("refined", "displacement"):
        found = neighbors(places, GRID, readout)
        assert found.tokens.tolist() == [[0, 1, 4, 5]]
        matches = cells(GRID)[found.tokens] + moved
        results[readout] = interpolate_matches(places, found, matches[..., None, :], GRID, readout)[0, 0, 0].item()
    share = 3.5 / 16
    assert results["refined"] == pytest.approx(24.0)
    assert results["displacement"] == pytest.approx(20 + 16 * (share * 5 + (1 - share) * 0.25))


COVER = covering_frames(49, 13, frames_per_latent=4)


def test_frames_of_tokens_cover_what_a_causal_vae_decodes_them_to() -> None:
    assert COVER[:6].tolist() == [0, 1, 1, 1, 1, 2]
    assert COVER.bincount().tolist() == [1] + 12 * [4]
    visible = torch.ones(2, 49, dtype=torch.bool)
    visible[1, 7] = False
    expected = torch.ones(2, 13, dtype=torch.bool)
    expected[1, 2] = False  # video frames 5 to 8
    assert torch.equal(covering_visibility(visible, COVER), expected)
    with pytest.raises(ConceptMapsValueError, match="^3 video frames are too few for 5 frames of tokens$"):
        covering_frames(3, 5)


@pytest.mark.parametrize(("time", "offset"), [("center", 1.5), ("last", 0.0)])
def test_even_motion_is_even_in_the_video(time: str, offset: float) -> None:
    moments = torch.cat([torch.zeros(1), torch.arange(4.0, 49.0, 4) - offset])  # of the frames of tokens
    velocity = torch.tensor([2.0, -3.0])
    positions = (moments[:, None] * velocity).expand(5, -1, -1)
    expected = (torch.arange(49.0)[:, None] * velocity).expand(5, -1, -1)
    torch.testing.assert_close(video_positions(positions, COVER, time=time), expected)
    if time == "center":
        torch.testing.assert_close(video_positions(positions, COVER), expected)


def test_official_time_is_half_a_frame_of_tokens_off() -> None:
    positions = torch.rand(5, 13, 2, generator=torch.Generator().manual_seed(0))
    result = video_positions(positions, COVER, time="difftrack")
    expected = torch.nn.functional.interpolate(positions.mT, size=49, mode="linear", align_corners=False).mT
    torch.testing.assert_close(result, expected)
    assert torch.equal(result[:, 1], positions[:, 0])  # the motion up to frame 1 is lost
    assert not torch.equal(video_positions(positions, COVER)[:, 1], positions[:, 0])
    place = video_positions(torch.arange(13.0)[:, None].expand(13, 2), COVER, time="difftrack")[:, 0]
    assert (place - torch.arange(49) / 4).abs().max() == pytest.approx(0.34, abs=0.04)


def test_one_frame_of_tokens_stands_still() -> None:
    positions = torch.rand(5, 1, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(video_positions(positions, covering_frames(3, 1)), positions.expand(5, 3, 2))


def test_refusals() -> None:
    with pytest.raises(ConceptMapsValueError, match="^unknown time 'first'; expected one of center, last, difftrack$"):
        video_positions(torch.zeros(1, 13, 2), COVER, time="first")
    with pytest.raises(ConceptMapsValueError, match="^positions have 12 frames; expected 13, as their cover$"):
        video_positions(torch.zeros(1, 12, 2), COVER)
    with pytest.raises(ConceptMapsValueError, match=r"^TokenGrid\(.*\) has no tokens; expected positive sizes"):
        TokenGrid(1, 2, 0, (8.0, 8.0))
