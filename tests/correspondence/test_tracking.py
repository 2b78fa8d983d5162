"""Tracks of real pipelines, against bare calls of the transformer and a softmax over all tokens in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import tiny_cogvideox
from backbones._oracle import kept_state
from PIL import Image
from torch.nn import functional

import diffusers_concept_maps as dcm
from diffusers_concept_maps import ops_matching
from diffusers_concept_maps.correspondence.output import TrackOutput

FRAMES, SOURCE, SIZE, GRID = 5, (51, 83), (48, 80), (3, 5)
STRIDE = torch.tensor([83 / 5, 51 / 3], dtype=torch.float64)
POINTS = torch.tensor([[0, 12.5, 40], [0, 82.5, -0.5], [3, 41, 25], [0, 30.25, 9], [4, -0.5, 50.5]])
PASSES = {0: [[1, 3], [2, 4]], 3: [[4], [2, 0], [1]], 4: [[3, 1], [2, 0]]}
"""Frames that go with each query frame, three at a time with that: later ones first, spread over the video."""


def video(frames: int = FRAMES) -> torch.Tensor:
    """Noise in steps of 1/255, as files have it."""
    return torch.randint(0, 256, (frames, 3, *SOURCE), generator=torch.Generator().manual_seed(2)) / 255


class Reference:
    """What `track` does, by bare calls of the transformer and all weights of all tokens."""

    def __init__(self, pipe: Any, layers: Sequence[int], *, level: float = 0.02, noised: bool = False) -> None:
        self.pipe, self.layers, self.level, self.noised = pipe, layers, level, noised
        frames = functional.interpolate(video(), SIZE, mode="bilinear", antialias=True) * 2 - 1
        with torch.no_grad():
            self.latents = [
                pipe.vae.encode(frame[None, :, None].to(pipe.dtype)).latent_dist.mode().float()
                * pipe.vae.config.scaling_factor
                for frame in frames
            ]
            text, _ = pipe.encode_prompt("", do_classifier_free_guidance=False, max_sequence_length=12)
        self.text = torch.cat([text, text])  # guidance makes a batch of two

    def sides(self, frames: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Query and key `[head, frame, token, width]` of every layer, in float64, by hooks behind the norms."""
        clip = torch.cat([self.latents[frame] for frame in frames], dim=2)
        step = round(self.level * 1000) - 1
        if self.noised:
            noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
            kept = self.pipe.scheduler.alphas_cumprod[step]
            clip = kept.sqrt() * clip + (1 - kept).sqrt() * noise
        rotary = None
        if self.pipe.transformer.config.use_rotary_positional_embeddings:
            rotary = self.pipe._prepare_rotary_positional_embeddings(*SIZE, len(frames), "cpu")
        found: dict[str, torch.Tensor] = {}
        with outputs_of(self.norms(), found), torch.no_grad():
            self.pipe.transformer(
                hidden_states=clip.transpose(1, 2).repeat(2, 1, 1, 1, 1).to(self.pipe.dtype),
                encoder_hidden_states=self.text,
                timestep=torch.full((2,), step),
                image_rotary_emb=rotary,
            )
        return [
            tuple(rotated(found[f"{kind}{layer}"], rotary).unflatten(1, (len(frames), -1)) for kind in "qk")
            for layer in self.layers
        ]  # type: ignore[misc]

    def norms(self) -> dict[str, torch.nn.Module]:
        attentions = {layer: self.pipe.transformer.transformer_blocks[layer].attn1 for layer in self.layers}
        return {f"{kind}{layer}": getattr(a, f"norm_{kind}") for layer, a in attentions.items() for kind in "qk"}

    def weights(self, sides: Any, source: int, target: int, heads: list[int], scale: float | None) -> torch.Tensor:
        """`[token of the source, token of the target]`, the mean of both directions, heads and layers."""
        parts = []
        for query, key in sides:
            factor = query.shape[-1] ** -0.5 if scale is None else scale
            there = (query[heads, source] @ key[heads, target].mT * factor).softmax(-1)
            back = (query[heads, target] @ key[heads, source].mT * factor).softmax(-1)
            parts.append((there + back.mT).mean(0) / 2)
        return torch.stack(parts).mean(0)

    def follow(
        self, passes: dict[int, list[list[int]]], heads: Sequence[int] = range(4), scale: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tracks, confidence, and how far the way back misses; of frames in several passes, by confidence."""
        found: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
        for anchor, parts in passes.items():
            for part in parts:
                sides = self.sides([anchor, *part])
                for place, frame in enumerate(part, 1):
                    there = self.weights(sides, 0, place, list(heads), scale)
                    for number in (POINTS[:, 0] == anchor).nonzero()[:, 0].tolist():
                        point = POINTS[number, 1:].double()
                        match = displaced(there, point)
                        miss = (displaced(self.weights(sides, place, 0, list(heads), scale), match) - point).norm()
                        found.setdefault((number, frame), []).append((match, there[nearest(point)].max(), miss))
        tracks = POINTS[:, None, 1:].double().repeat(1, FRAMES, 1)
        confidence, misses = torch.ones(2, len(POINTS), FRAMES, dtype=torch.float64)
        misses = misses * 0
        for place, several in found.items():
            matches, sure, miss = (torch.stack(side) for side in zip(*several, strict=True))
            share = sure / sure.sum()
            tracks[place] = (matches * share[:, None]).sum(0)
            confidence[place], misses[place] = sure.mean(), (miss * share).sum()
        return tracks, confidence, misses


@contextmanager
def outputs_of(modules: dict[str, torch.nn.Module], found: dict[str, torch.Tensor]) -> Iterator[None]:
    """The last row of what modules return, in float64."""

    def keep(name: str) -> Any:
        return lambda module, args, output: found.update({name: output[-1].double()})

    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def rotated(side: torch.Tensor, rotary: Any) -> torch.Tensor:
    """The image tokens of `[head, text + image, width]`, whose pairs of channels are turned by their angles."""
    image = side[:, tiny_cogvideox.TEXT_LENGTH :]
    if rotary is None:
        return image
    cos, sin = (table.double() for table in rotary)
    turned = torch.stack([-image[..., 1::2], image[..., ::2]], dim=-1).flatten(-2)
    return image * cos + turned * sin


def cell(point: torch.Tensor) -> torch.Tensor:
    """In tokens, (x, y), where the center of a token is a whole number."""
    return ((point + 0.5) / STRIDE - 0.5).clamp(torch.zeros(2), torch.tensor([GRID[1] - 1, GRID[0] - 1]))


def nearest(point: torch.Tensor) -> int:
    x, y = cell(point).round().long().tolist()
    return int(y * GRID[1] + x)


def displaced(weights: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    """The point, moved by the bilinear mean of how its four tokens move."""
    x, y = cell(point).tolist()
    moved = torch.zeros(2, dtype=torch.float64)
    for column in range(int(x), min(int(x) + 2, GRID[1])):
        for row in range(int(y), min(int(y) + 2, GRID[0])):
            match = int(weights[row * GRID[1] + column].argmax())
            share = (1 - abs(x - column)) * (1 - abs(y - row))
            moved += share * torch.tensor([match % GRID[1] - column, match // GRID[1] - row])
    return point + moved * STRIDE


def official(weights: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    """The official read-out: a map of absolute matches, sampled with a margin of a 64th of the width on both axes."""
    height, width = GRID
    match = weights.argmax(-1)
    places = torch.stack([match % width, match // width]).double().view(1, 2, height, width)
    size = torch.tensor([width, height]) - width / 64
    at = 2 * point / STRIDE / size - 1
    return functional.grid_sample(places, at.view(1, 1, 1, 2), align_corners=True).flatten() * STRIDE


@pytest.fixture(scope="module", params=[True, False], ids=["rotary", "sin-cos"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return tiny_cogvideox.shaken_pipeline(request.param)


def followed(pipe: Any, **options: Any) -> TrackOutput:
    return dcm.track(pipe, video(), POINTS, **({"readout": "displacement", "size": SIZE} | options))


def assert_follows(
    out: Any, expected: tuple[torch.Tensor, torch.Tensor, torch.Tensor], tokens: float = 1.0, atol: float = 1e-4
) -> None:
    tracks, confidence, misses = expected
    torch.testing.assert_close(out.tracks, tracks.float(), rtol=0, atol=atol)
    torch.testing.assert_close(out.confidence, confidence.float(), rtol=0, atol=atol)
    assert torch.equal(out.visibility, misses <= tokens * STRIDE.mean())
    assert out.tracks.dtype == out.confidence.dtype == torch.float32


@pytest.mark.parametrize(("layers", "heads"), [((1,), None), ((0, 2), None), ((2,), (1, 3)), ((0, 1), (2,))], ids=str)
def test_tracks_are_those_of_bare_calls(pipe: Any, layers: tuple[int, ...], heads: tuple[int, ...] | None) -> None:
    out = followed(pipe, layers=layers, heads=heads)
    expected = Reference(pipe, layers).follow(PASSES, heads or range(4))
    assert_follows(out, expected)
    assert 0 < float(out.visibility.float().mean()) < 1
    assert out.metadata["layers"] == list(layers)
    assert out.metadata["size"] == list(SIZE)


def test_noise_level_and_noise(pipe: Any) -> None:
    for noised in (False, True):
        out = followed(pipe, layers=1, noise_level=0.4, add_noise=noised, visibility_tokens=2.0)
        assert_follows(out, Reference(pipe, [1], level=0.4, noised=noised).follow(PASSES), tokens=2.0)


def test_overlapping_passes_are_averaged_by_confidence(pipe: Any) -> None:
    out = followed(pipe, layers=1, interleave=False, stride=1)
    passes = {0: [[1, 2], [2, 3], [3, 4]], 3: [[4], [2, 1], [1, 0]], 4: [[3, 2], [2, 1], [1, 0]]}
    assert_follows(out, Reference(pipe, [1]).follow(passes))


def test_parity_reads_like_the_official_code(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temperature by the number of heads, the read-out that shrinks and cuts frames, both directions."""
    out = followed(pipe, layers=1, parity="difftrack", readout="refined")
    monkeypatch.setitem(globals(), "displaced", official)
    tracks, _, _ = Reference(pipe, [1]).follow(PASSES, scale=4**-0.5)
    torch.testing.assert_close(out.tracks, tracks.float(), rtol=0, atol=1e-3)
    assert not torch.allclose(out.tracks, followed(pipe, layers=1).tracks)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    pipe = tiny_cogvideox.make_pipeline(dtype=dtype)
    assert_follows(followed(pipe, layers=1), Reference(pipe, [1]).follow(PASSES), atol=1e-3)


def test_every_frame_is_encoded_once_and_nothing_more_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_cogvideox.make_pipeline()
    ran: list[Any] = []
    blocks = pipe.transformer.transformer_blocks
    hooks = [block.register_forward_pre_hook(lambda *_, n=n: ran.append(n)) for n, block in enumerate(blocks)]
    hooks.append(pipe.text_encoder.register_forward_pre_hook(lambda *_: ran.append("text")))
    hooks.append(pipe.vae.encoder.register_forward_pre_hook(lambda _, args: ran.append(("frames", *args[0].shape))))
    monkeypatch.setattr(pipe.vae, "decode", lambda *_, **__: pytest.fail("the VAE decodes"))
    followed(pipe, layers=1)
    passes = sum(map(len, PASSES.values()))
    assert ran.count(0) == ran.count(1) == passes
    assert ran.count(2) == 0
    assert ran.count("text") <= 2  # the prompt, and the empty one of guidance
    encoded = [entry[1] for entry in ran if isinstance(entry, tuple)]
    assert sum(encoded) == FRAMES
    assert all(entry[3] == 1 for entry in ran if isinstance(entry, tuple))
    del ran[:]
    followed(pipe, layers=[0, 1])
    assert ran.count(1) == 2 * passes  # there, and back
    assert ran.count(2) == 0
    for hook in hooks:
        hook.remove()


def test_videos_of_every_kind(tmp_path: Path) -> None:
    pipe = tiny_cogvideox.shaken_pipeline()
    array = (video() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(frame) for frame in array]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    expected = followed(pipe, layers=1)
    kinds: list[Any] = [pictures, array, array.astype(np.float32) / 255, video().double(), tmp_path, str(tmp_path)]
    for kind in kinds:
        out = dcm.track(pipe, kind, POINTS.tolist(), layers=[1], readout="displacement", size=SIZE)
        torch.testing.assert_close(out.tracks, expected.tracks, rtol=0, atol=1e-4)
        assert torch.equal(out.visibility, expected.visibility)
    assert torch.equal(out.points, POINTS)


def test_nothing_is_left_behind(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own, state, random = dict(pipe.__dict__), kept_state(pipe.transformer), torch.get_rng_state()

    def unchanged() -> bool:
        same = all(pipe.__dict__[name] is value for name, value in own.items())
        return same and pipe.__dict__.keys() == own.keys() and kept_state(pipe.transformer) == state

    followed(pipe, layers=1)
    assert unchanged()
    assert torch.equal(torch.get_rng_state(), random)

    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ops_matching, "temporal_matching", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        followed(pipe, layers=1)
    assert unchanged()
