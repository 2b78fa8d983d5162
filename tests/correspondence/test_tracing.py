"""Matches and scores of running pipelines, against float64 over queries and keys that a stock run was caught with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from backbones._oracle import kept_state
from clips import assert_naive
from correspondence.hooked import (
    COVER,
    FAMILIES,
    FRAMES,
    PROMPTS,
    SIZE,
    TOKENS,
    Run,
    conditional,
    hooked_run,
    pipeline,
)

import diffusers_concept_maps as dcm
from diffusers_concept_maps import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.correspondence.matching import MatchOptions
from diffusers_concept_maps.correspondence.readout import TokenGrid
from diffusers_concept_maps.correspondence.tracing import encode_correspondence

TOKEN_GRID = TokenGrid(3, 3, 5, (16.0, 16.0))
POINTS = torch.tensor([[0.0, 20.3, 11.0], [4.0, 70.0, 40.2], [8.0, 5.1, 30.0], [1.0, 79.0, 0.0]])
"""In the first frame, in the middle, in the last, and in the first one of a frame of tokens."""
OWN = torch.tensor([[COVER[int(frame)], x, y] for frame, x, y in POINTS.tolist()])
VISIBLE = torch.ones(4, FRAMES, dtype=torch.bool)
VISIBLE[0, 3] = VISIBLE[2, 0] = False
SHOWN = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 1, 1], [1, 1, 1]]).bool()
"""The frames of tokens all of whose frames show the point."""
ASKED: dict[str, Any] = {"size": SIZE, "num_frames": FRAMES}


@cache
def stock(name: str, count: int = 2, guided: bool = True) -> Run:
    return hooked_run(pipeline(name), lambda: call(name, count, guided))


def call(name: str, count: int = 2, guided: bool = True) -> torch.Tensor:
    options: dict[str, Any] = {} if guided else {"guidance_scale": 1.0}
    return FAMILIES[name].run(pipeline(name), PROMPTS[:count], **options)


def naive_scores(seen: Any, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and confidence of text, own and other frames, of every probability in float64."""
    keys = torch.cat([seen.text_key, seen.key], 2)
    count = seen.text_key.shape[2]
    logits = seen.query[row] @ keys[row].mT / seen.query.shape[-1] ** 0.5
    logits[..., :count].masked_fill_(~seen.text_mask[row], -torch.inf)
    rows = logits.softmax(-1).mean(0)
    shares, maxima = [], []
    for number, (frame, x, y) in enumerate(OWN.tolist()):
        token = int((y + 0.5) // 16) * 5 + int((x + 0.5) // 16)
        weights = rows[int(frame) * 15 + token]
        text, image = weights[:count], weights[count:].view(3, 15)
        others = [other for other in range(3) if other != int(frame)]
        seen_in = [other for other in others if SHOWN[number, other]]
        shares.append([text.sum(), image[int(frame)].sum(), image[others].sum()])
        peaks = sum(image[other].max() for other in seen_in) / len(seen_in)
        maxima.append([text.max() if count else text.sum(), image[int(frame)].max(), peaks])
    kept = [number for number in range(4) if SHOWN[number, int(OWN[number, 0])]]
    first = 0 if count else 1
    return torch.tensor(shares)[kept].mean(0)[first:], torch.tensor(maxima)[kept].mean(0)[first:]


@pytest.mark.parametrize("name", FAMILIES)
class TestEveryFamily:
    def test_frames_are_those_of_the_pipeline_alone(self, name: str) -> None:
        before = stock(name).latents, kept_state(pipeline(name).transformer)
        random = torch.get_rng_state()
        with dcm.trace_correspondence(pipeline(name), POINTS, visibility=VISIBLE, agreement=True, **ASKED) as found:
            assert torch.equal(call(name), before[0])
        assert torch.equal(torch.get_rng_state(), random)
        assert kept_state(pipeline(name).transformer) == before[1]
        assert found.steps == (0, 1, 2)
        assert found.layers == tuple(range(FAMILIES[name].layers))
        assert found.cover.tolist() == COVER
        assert found.stride == (16.0, 16.0)

    @pytest.mark.parametrize("step", [0, 2])
    def test_matches_and_scores_of_every_layer(self, name: str, step: int) -> None:
        options = MatchOptions("both", "refined")
        asked = ASKED | {"steps": [step], "options": options, "visibility": VISIBLE, "agreement": True}
        with dcm.trace_correspondence(pipeline(name), POINTS, **asked) as found:
            call(name)
        for layer in range(FAMILIES[name].layers):
            seen, cell = conditional(FAMILIES[name], stock(name), step, layer, 2), found.cell(step, layer)
            heads, width = seen.query.shape[1], seen.query.shape[-1]
            mean = torch.full((heads,), 1 / heads)
            sides = [(seen.query, seen.key)]
            assert_naive(cell.matches, sides, mean, OWN, TOKEN_GRID, options, width**-0.5, [0, 1, 2], atol=2e-3)
            assert cell.scores is not None
            assert cell.scores.segments == (("text",) if seen.text_key.shape[2] else ()) + ("self", "cross")
            for row in range(2):
                attention, confidence = naive_scores(seen, row)
                torch.testing.assert_close(cell.scores.attention[row].double(), attention, rtol=0, atol=1e-5)
                torch.testing.assert_close(cell.scores.confidence[row].double(), confidence, rtol=0, atol=1e-5)


def test_padding_of_the_text_is_attended_to_by_nobody() -> None:
    """What the hooks have of HunyuanVideo is padded, and would score otherwise with it."""
    seen = conditional(FAMILIES["HunyuanVideo"], stock("HunyuanVideo"), 0, 0, 2)
    assert not seen.text_mask.all()
    masked = naive_scores(seen, 1)[0]
    seen.text_mask = torch.ones_like(seen.text_mask)
    assert (naive_scores(seen, 1)[0] - masked).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["CogVideoX", "Wan 2.1"])
def test_without_guidance(name: str) -> None:
    asked = ASKED | {"layers": [1], "steps": [1], "agreement": True}
    with dcm.trace_correspondence(pipeline(name), POINTS, **asked) as found:
        assert torch.equal(call(name, guided=False), stock(name, guided=False).latents)
    assert len(stock(name, guided=False).passes) == 3
    seen = conditional(FAMILIES[name], stock(name, guided=False), 1, 1, 2)
    mean = torch.full((seen.query.shape[1],), 1 / seen.query.shape[1])
    scale = seen.query.shape[-1] ** -0.5
    sides, options = [(seen.query, seen.key)], MatchOptions()
    matches = found.cell(1, 1).matches
    assert_naive(matches, sides, mean, OWN, TOKEN_GRID, options, scale, [0, 1, 2], atol=2e-3)


def test_one_video() -> None:
    with dcm.trace_correspondence(pipeline("CogVideoX"), POINTS, layers=[2], **ASKED) as found:
        assert torch.equal(call("CogVideoX", 1), stock("CogVideoX", 1).latents)
    assert found.cell(0, 2).matches.positions.shape == (1, 4, 3, 2)


def test_layers_and_steps_are_those_asked_for() -> None:
    with dcm.trace_correspondence(pipeline("HunyuanVideo"), POINTS, layers=[3, 1], steps=[2], **ASKED) as found:
        call("HunyuanVideo")
    assert (found.steps, found.layers) == ((2,), (1, 3))
    with pytest.raises(
        ConceptMapsValueError, match=r"^step 0 of layer 1 was not recorded; recorded were steps \[2\] o"
    ):
        found.cell(0, 1)


@pytest.mark.parametrize("name", ["CogVideoX", "HunyuanVideo", "Wan 2.1"])
def test_each_head_is_what_it_is_alone(name: str) -> None:
    heads = [3, 1]
    asked = ASKED | {"layers": [1], "steps": [0], "visibility": VISIBLE, "agreement": True}
    with dcm.trace_correspondence(pipeline(name), POINTS, heads=heads, per_head=True, **asked) as every:
        call(name)
    cell = every.cell(0, 1)
    assert cell.matches.positions.shape == (2, 2, 4, 3, 2)
    for place, head in enumerate(sorted(heads)):
        with dcm.trace_correspondence(pipeline(name), POINTS, heads=[head], **asked) as alone:
            call(name)
        expected = alone.cell(0, 1)
        assert cell.scores is not None
        assert expected.scores is not None
        for part in ("positions", "tokens", "confidence", "entropy", "agreement"):
            actual = getattr(cell.matches, part)[:, place]
            torch.testing.assert_close(actual, getattr(expected.matches, part), rtol=0, atol=1e-4)
        torch.testing.assert_close(cell.scores.attention[:, place], expected.scores.attention)
        torch.testing.assert_close(cell.scores.confidence[:, place], expected.scores.confidence)


def test_a_run_drops_what_an_earlier_one_left() -> None:
    with dcm.trace_correspondence(pipeline("CogVideoX"), POINTS, layers=[0], **ASKED) as found:
        call("CogVideoX")
        first = found.cell(2, 0)
        FAMILIES["CogVideoX"].run(pipeline("CogVideoX"), PROMPTS, num_inference_steps=2)
    assert found.steps == (0, 1)
    assert first.matches.positions.shape == (2, 4, 3, 2)


def test_parity_reads_and_counts_as_the_official_code() -> None:
    asked = ASKED | {"layers": [0], "steps": [0], "visibility": VISIBLE}
    with dcm.trace_correspondence(pipeline("CogVideoX"), POINTS, parity="difftrack", **asked) as official:
        call("CogVideoX")
    options = MatchOptions("both", "difftrack")
    with dcm.trace_correspondence(pipeline("CogVideoX"), POINTS, options=options, **asked) as own:
        call("CogVideoX")
    assert torch.equal(official.cell(0, 0).matches.positions, own.cell(0, 0).matches.positions)
    seen = conditional(FAMILIES["CogVideoX"], stock("CogVideoX"), 0, 0, 2)
    keys = torch.cat([seen.text_key, seen.key], 2)[0]
    rows = (seen.query[0] @ keys.mT / seen.query.shape[-1] ** 0.5).softmax(-1).mean(0)
    tokens = [int(f) * 15 + min(round(x / 16), 2) * 5 + min(round(y / 16), 4) for f, x, y in OWN.tolist()]
    kept = [number for number in range(4) if SHOWN[number, int(OWN[number, 0])]]
    text = rows[[tokens[number] for number in kept], :-TOKENS].sum(-1).mean()
    scores = official.cell(0, 0).scores
    assert scores is not None
    assert float(scores.attention[0, 0]) == pytest.approx(float(text), abs=1e-5)


def test_everything_is_undone_after_an_exception() -> None:
    before = kept_state(pipeline("Wan 2.1").transformer)
    with pytest.raises(RuntimeError, match="stop"), dcm.trace_correspondence(pipeline("Wan 2.1"), POINTS, **ASKED):
        FAMILIES["Wan 2.1"].run(pipeline("Wan 2.1"), PROMPTS, callback_on_step_end=stop)
    assert kept_state(pipeline("Wan 2.1").transformer) == before
    assert torch.equal(call("Wan 2.1"), stock("Wan 2.1").latents)


def stop(*_: Any) -> dict[str, Any]:
    raise RuntimeError("stop")


@pytest.mark.parametrize(
    ("points", "changed", "message"),
    [
        (torch.zeros(0, 3), {}, r"^points have shape \(0, 3\); expected \[point, 3\]"),
        (torch.zeros(3), {}, r"^points have shape \(3,\)"),
        ([(0, 1.0), (0, 1.0, 2.0)], {}, "^points are no table of numbers"),
        (
            [[0, 80.0, 3.0]],
            {},
            r"^point 0 is \(0.0, 80.0, 3.0\); expected \(frame, x, y\) with a whole frame of 0 to 8",
        ),
        ([[0, 3.0, 3.0], [9, 3.0, 3.0]], {}, "^point 1 is"),
        ([[0.5, 3.0, 3.0]], {}, "^point 0 is"),
        ([[0, float("nan"), 3.0]], {}, "^point 0 is"),
        (POINTS, {"visibility": VISIBLE[:2]}, r"^visibility is torch.bool of shape \(2, 9\); expected .* \(4, 9\)"),
        (POINTS, {"visibility": VISIBLE.float()}, "^visibility is torch.float32 of shape"),
        (POINTS, {"layers": [3]}, "^layer 3 is out of range"),
        (POINTS, {"layers": []}, "^no layers"),
        (POINTS, {"steps": [-1]}, "^step -1 is out of range"),
        (POINTS, {"heads": [4]}, "^head 4 is out of range"),
        (POINTS, {"parity": "imap"}, "^unknown parity 'imap'; expected one of difftrack"),
        (POINTS, {"parity": "difftrack", "options": MatchOptions()}, "^options MatchOptions.*which has its own; drop"),
    ],
)
def test_mistakes_are_refused_before_anything_changes(points: Any, changed: dict[str, Any], message: str) -> None:
    before = kept_state(pipeline("CogVideoX").transformer)
    with pytest.raises(ConceptMapsValueError, match=message):
        dcm.trace_correspondence(pipeline("CogVideoX"), points, **(ASKED | changed)).__enter__()
    assert kept_state(pipeline("CogVideoX").transformer) == before


def test_a_step_that_the_run_does_not_have() -> None:
    before = kept_state(pipeline("CogVideoX").transformer)
    message = "^step 3 is out of range; this run has 3 steps, 0 to 2"
    with (
        pytest.raises(ConceptMapsValueError, match=message),
        dcm.trace_correspondence(pipeline("CogVideoX"), POINTS, steps=[3], **ASKED),
    ):
        call("CogVideoX")
    assert kept_state(pipeline("CogVideoX").transformer) == before


class TestRealVideo:
    video = torch.rand(FRAMES, 3, *SIZE, generator=torch.Generator().manual_seed(0))

    def found(self, name: str = "CogVideoX", **changed: Any) -> Any:
        given: dict[str, Any] = {"noise_level": [0.2, 0.7], "call": {"max_sequence_length": 12}, "visibility": VISIBLE}
        return encode_correspondence(pipeline(name), changed.pop("video", self.video), POINTS, **(given | changed))

    def test_a_level_is_a_pass_over_noised_latents(self) -> None:
        name = "CogVideoX"
        before = kept_state(pipeline(name).transformer)
        found = self.found()
        assert kept_state(pipeline(name).transformer) == before
        assert (found.steps, found.layers, found.cover.tolist()) == ((0, 1), (0, 1, 2), COVER)
        pipe = pipeline(name)
        latents = pipe.vae.encode(self.video.transpose(0, 1)[None] * 2 - 1).latent_dist.mean
        latents = latents * pipe.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        kept = pipe.scheduler.alphas_cumprod[699]
        noised = (kept.sqrt() * latents + (1 - kept).sqrt() * noise).transpose(1, 2)
        text = pipe.encode_prompt("", do_classifier_free_guidance=False, max_sequence_length=12)[0]
        angles = pipe._prepare_rotary_positional_embeddings(*SIZE, 3, torch.device("cpu"))

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return pipe.transformer(noised, text, torch.tensor([699]), image_rotary_emb=angles)[0]

        seen = conditional(FAMILIES[name], hooked_run(pipe, forward), 0, 2, 1)
        mean = torch.full((seen.query.shape[1],), 1 / seen.query.shape[1])
        options, scale = MatchOptions(), seen.query.shape[-1] ** -0.5
        cell = self.found(agreement=True).cell(1, 2)
        assert_naive(cell.matches, [(seen.query, seen.key)], mean, OWN, TOKEN_GRID, options, scale, [0, 1, 2], 5e-3)

    @pytest.mark.parametrize("name", ["Wan 2.1", "HunyuanVideo"])
    def test_other_families(self, name: str) -> None:
        found = self.found(name, call={"max_sequence_length": 8}, layers=[1])
        assert (found.steps, found.layers) == ((0, 1), (1,))
        assert not torch.equal(found.cell(0, 1).matches.confidence, found.cell(1, 1).matches.confidence)

    def test_a_video_of_another_length(self) -> None:
        with pytest.raises(ConceptMapsValueError, match="^the video has 8 frames; expected a multiple of 4 and one"):
            self.found(video=self.video[:8])

    def test_no_noise_level(self) -> None:
        with pytest.raises(ConceptMapsValueError, match="^noise_level is 0; expected a fraction"):
            self.found(noise_level=0)

    def test_no_layers(self) -> None:
        with pytest.raises(ConceptMapsValueError, match="^no layers"):
            self.found(layers=[])


def test_what_listens_twice_is_refused() -> None:
    with dcm.trace_correspondence(pipeline("CogVideoX"), POINTS, **ASKED):
        listens: Callable[..., Any] = dcm.trace_correspondence
        with pytest.raises(ConceptMapsError):
            listens(pipeline("CogVideoX"), POINTS, **ASKED).__enter__()
    assert torch.equal(call("CogVideoX"), stock("CogVideoX").latents)
