"""How tracking goes about a video: its passes, a model that knows every place, and what it refuses."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backbones import tiny_cogvideox, tiny_flux
from backbones._case import Case, find_cases

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones import Grid, find_backbone
from diffusers_concept_maps.backbones._real import transformer_of
from diffusers_concept_maps.correspondence import tracking
from diffusers_concept_maps.correspondence.probe import LayerTokens
from diffusers_concept_maps.single_pass import SinglePass

HEIGHT, WIDTH = 6, 10  # tokens
SHIFTS = ((0, 0), (1, 0), (2, -1), (2, 1), (-1, 1), (0, 2), (3, 0))
"""By how many tokens (x, y) the world has moved in each frame."""


def settings(chunk: int, stride: int | None = None, *, interleave: bool = True) -> Any:
    return SimpleNamespace(chunk=chunk, stride=stride, interleave=interleave)


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("chunk", [2, 3, 6])
def test_every_frame_is_in_one_pass(chunk: int, interleave: bool) -> None:
    for count in range(1, 15):
        for anchor in range(count):
            parts = list(tracking.passes(anchor, count, settings(chunk, interleave=interleave)))
            assert sorted(sum(parts, [])) == [frame for frame in range(count) if frame != anchor]
            for part in parts:
                assert 0 < len(part) < chunk
                away = [abs(frame - anchor) for frame in part]
                assert away == sorted(away)
                assert len({frame > anchor for frame in part}) == 1
                gaps = {b - a for a, b in zip(away, away[1:], strict=False)}
                assert len(gaps) <= 1
                assert interleave or gaps <= {1}


@pytest.mark.parametrize(
    ("anchor", "count", "how", "expected"),
    [
        (0, 1, settings(4), []),
        (0, 2, settings(4), [[1]]),
        (1, 2, settings(4), [[0]]),
        (0, 4, settings(4), [[1, 2, 3]]),
        (0, 8, settings(4), [[1, 4, 7], [2, 5], [3, 6]]),
        (3, 8, settings(4), [[4, 6], [5, 7], [2, 1, 0]]),
        (0, 8, settings(4, interleave=False), [[1, 2, 3], [4, 5, 6], [7]]),
        (5, 8, settings(4, interleave=False), [[6, 7], [4, 3, 2], [1, 0]]),
        (0, 7, settings(4, 1, interleave=False), [[1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6]]),
        (0, 7, settings(4, 2, interleave=False), [[1, 2, 3], [3, 4, 5], [5, 6]]),
        (6, 7, settings(4, 2, interleave=False), [[5, 4, 3], [3, 2, 1], [1, 0]]),
    ],
)
def test_passes(anchor: int, count: int, how: Any, expected: list[list[int]]) -> None:
    assert list(tracking.passes(anchor, count, how)) == expected


class World:
    """Stands in for a model whose queries and keys say which place of the world a token shows.

    Attributes:
        passes: the frames of every pass.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, still: bool = False) -> None:
        self.passes: list[list[int]] = []
        self._still = still
        self._consume: Any = None
        monkeypatch.setattr(SinglePass, "encode", lambda single, clip: clip[:, :1, :, :1, :1])
        monkeypatch.setattr(SinglePass, "run", lambda single, *given, **options: self._run(*given))
        monkeypatch.setattr(tracking, "attach_probe", self._attach)

    def video(self, height: int, width: int, frames: int = len(SHIFTS)) -> torch.Tensor:
        """Frames that are as bright as their number says."""
        return (torch.arange(frames) / 10)[:, None, None, None].expand(-1, 3, height, width)

    def _attach(self, pipe: Any, consume: Any, *, layers: Any, single_passes: bool) -> Any:
        assert single_passes
        self._consume = consume
        return SimpleNamespace(remove=lambda: None)

    def _run(self, latents: torch.Tensor, level: float, clip: torch.Tensor) -> None:
        frames = (latents[0, 0, :, 0, 0] * 10).round().long().tolist()
        self.passes.append(frames)
        side = torch.cat([self._places(frame) for frame in frames])[None, None]
        grid = Grid(len(frames), HEIGHT, WIDTH)
        self._consume(LayerTokens(0, 0, grid, side, side, side[:, :, :0], None))

    def _places(self, frame: int) -> torch.Tensor:
        """Features `[token, place]`, each like none but that of its place."""
        x, y = (0, 0) if self._still else SHIFTS[frame]
        rows, columns = torch.meshgrid(torch.arange(HEIGHT) - y + 4, torch.arange(WIDTH) - x + 4, indexing="ij")
        place = rows * (WIDTH + 8) + columns
        return 90 * torch.nn.functional.one_hot(place.flatten(), (HEIGHT + 8) * (WIDTH + 8)).float()


@pytest.fixture
def pipe() -> Any:
    return tiny_cogvideox.shaken_pipeline()


def edges(height: int, width: int) -> torch.Tensor:
    """Places at the borders and within, in several frames."""
    x, y = torch.tensor([-0.5, 0, 7.3, width - 1, width - 0.5]), torch.tensor([-0.5, 11.1, height / 2, height - 0.5])
    return torch.cartesian_prod(torch.tensor([0.0, 2, 6]), x, y)


@pytest.mark.parametrize("readout", ["refined", "displacement"])
@pytest.mark.parametrize("size", [(48, 80), (51, 83), (97, 33)])
def test_still_world_stays_to_the_last_digit(
    size: tuple[int, int], readout: str, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, points = World(monkeypatch, still=True), edges(*size)
    out = dcm.track(pipe, world.video(*size), points, layers=1, readout=readout)
    assert torch.equal(out.tracks, points[:, None, 1:].expand(-1, len(SHIFTS), -1))
    assert out.visibility.all()
    torch.testing.assert_close(out.confidence, torch.ones(len(points), len(SHIFTS)))


@pytest.mark.parametrize("layers", [(1,), (0, 2)])
@pytest.mark.parametrize(
    "options", [{}, {"interleave": False}, {"interleave": False, "stride": 1}, {"chunk": 4}], ids=str
)
def test_moving_world_is_followed_from_any_frame(
    options: dict[str, Any], layers: tuple[int, ...], pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the size of the model, in pixels of the video; a place that leaves the frame is not visible."""
    world, (height, width) = World(monkeypatch), (57, 95)
    stride = torch.tensor([width / WIDTH, height / HEIGHT])
    points = torch.tensor([[0, 45.0, 30.0], [3, 47.9, 28.1], [6, 60.3, 20.0], [0, 90.0, 30.0]])
    out = dcm.track(pipe, world.video(height, width), points, layers=layers, size=(32, 64), **options)
    moved = torch.tensor(SHIFTS)[None] - torch.tensor(SHIFTS)[points[:, 0].long()][:, None]
    expected = points[:, None, 1:] + moved * stride
    inside = ((expected > 1.5 * stride) & (expected < torch.tensor([width, height]) - 1 - 1.5 * stride)).all(-1)
    torch.testing.assert_close(out.tracks[inside], expected[inside], rtol=0, atol=1e-4)
    assert out.visibility[inside].all()
    assert inside.float().mean() > 0.6
    assert out.visibility[3].tolist() == [moved <= 0 for moved, _ in SHIFTS]
    assert all(part[0] in (0, 3, 6) for part in world.passes)
    assert out.metadata["size"] == [32, 64]
    fused = 2 if len(layers) > 1 else 1
    seen = Counter((part[0], frame) for part in world.passes[::fused] for frame in part[1:])
    least = {(anchor, frame): 1 for anchor in (0, 3, 6) for frame in range(7) if frame != anchor}
    assert seen.keys() == least.keys()
    assert "stride" in options or seen == least


def test_one_frame_and_two(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, still=True)
    out = dcm.track(pipe, world.video(48, 80, 1), [(0, 3.0, 4.0)], layers=1)
    assert out.tracks.tolist() == [[[3.0, 4.0]]]
    assert out.visibility.all()
    assert world.passes == []
    out = dcm.track(pipe, world.video(48, 80, 2), [(1, 3.0, 4.0)], layers=1)
    assert out.tracks.tolist() == [[[3.0, 4.0], [3.0, 4.0]]]
    assert world.passes == [[1, 0]]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], r"points have shape \(0,\); expected \[point, 3\]"),
        ([(0, 1.0)], r"points have shape \(1, 2\); expected \[point, 3\]"),
        ([(0, 1.0), (0, 1.0, 2.0)], "points are no table of numbers"),
        (
            [(0, 1.0, 1.0), (0.5, 1.0, 1.0)],
            r"point 1 is \(0.5, 1.0, 1.0\); expected \(frame, x, y\) with a whole frame",
        ),
        ([(7, 1.0, 1.0)], "whole frame of 0 to 6, x of 0 to 79 and y of 0 to 47"),
        ([(0, 79.6, 1.0)], "point 0 is"),
        ([(0, 1.0, float("nan"))], "point 0 is"),
    ],
)
def test_wrong_points(points: Any, message: str, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(dcm.ConceptMapsValueError, match=message):
        dcm.track(pipe, World(monkeypatch).video(48, 80), points, layers=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": None}, "no layer is known to be good for matching in this checkpoint; name one of the middle"),
        ({"layers": 3}, "layer 3 is out of range; expected an integer of 0 to 2"),
        ({"heads": [4]}, "head 4 is out of range"),
        ({"noise_level": 0}, "noise_level is 0; expected a fraction"),
        ({"readout": "mean"}, "unknown readout 'mean'"),
        ({"direction": "up"}, "unknown direction 'up'"),
        ({"radius": -1}, "radius is -1"),
        ({"parity": "official"}, "unknown parity 'official'; expected one of difftrack"),
        ({"parity": "difftrack", "readout": "argmax"}, "^readout 'argmax' and direction 'both' are there with parity"),
        ({"parity": "difftrack", "direction": "forward"}, "direction 'forward' are there with parity 'difftrack'"),
        ({"noise_level": [0.1, 0.5]}, r"^noise_level is \[0.1, 0.5\]; expected one number"),
        ({"chunk": 2.5}, "^chunk is 2.5; expected at least 2 frames"),
        ({"chunk": "3"}, "^chunk is '3'; expected at least 2 frames"),
        ({"stride": 1.5, "interleave": False}, "^stride is 1.5; expected 1 to 2 frames"),
        ({"visibility_tokens": "1"}, "^visibility_tokens is '1'; expected 0 or more"),
        ({"chunk": 1}, "chunk is 1; expected at least 2 frames"),
        ({"stride": 1}, "stride is 1; expected 1 to 2 frames, and interleave=False"),
        ({"stride": 3, "interleave": False}, "stride is 3; expected 1 to 2 frames"),
        ({"visibility_tokens": -0.1}, "visibility_tokens is -0.1; expected 0 or more"),
        ({"visibility_tokens": float("nan")}, "visibility_tokens is nan"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(dcm.ConceptMapsValueError, match=message):
        dcm.track(pipe, World(monkeypatch).video(48, 80), [(0, 1.0, 1.0)], **({"layers": 1} | options))


def test_image_models_follow_nothing() -> None:
    pipe = next(case for case in tiny_flux.CASES if case.pipeline).pipeline()  # type: ignore[misc]
    with pytest.raises(dcm.ConceptMapsError, match="makes images; expected a pipeline of a video model"):
        dcm.track(pipe, torch.rand(3, 3, 16, 16), [(0, 1.0, 1.0)], layers=1)


def video_cases() -> list[Case]:
    found = [case for case in find_cases() if case.pipeline is not None]
    return [case for case in found if case.grid[0] > 1]


@pytest.mark.parametrize("case", video_cases(), ids=str)
def test_every_video_model_follows_points(case: Case) -> None:
    assert case.pipeline is not None
    pipe = case.pipeline()
    shape = find_backbone(transformer_of(pipe)).clip_shape(pipe)
    height, width = 3 * shape.multiple, 5 * shape.multiple
    video = torch.rand(4, 3, height, width, generator=torch.Generator().manual_seed(0))
    points = torch.tensor([[0, 0.0, 0.0], [2, width / 2, height / 3], [3, width - 0.5, height - 0.5]])
    out = dcm.track(pipe, video, points, layers=0, size=(height, width), call=case.real_call)
    assert out.tracks.shape == (3, 4, 2)
    assert out.tracks.isfinite().all()
    margin = torch.tensor([width / 5, height / 3])
    assert (out.tracks >= -0.5 - margin).all()
    assert (out.tracks <= torch.tensor([width, height]) + margin).all()
    for point, track, visible in zip(points, out.tracks, out.visibility, strict=True):
        frame = int(point[0])
        assert torch.equal(track[frame], point[1:])
        assert visible[frame]
