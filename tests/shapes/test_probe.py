"""Maps on clips whose objects are known: each reading is what a capture of that layer and those heads says."""

from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXPipeline

import diffusers_concept_maps as dcm
from diffusers_concept_maps.shapes.captions import TEXT_LENGTH, full_captions
from diffusers_concept_maps.shapes.model import HEADS, LAYERS
from diffusers_concept_maps.shapes.scenes import COLORS, MOTIONS, Scenes
from diffusers_concept_maps.shapes.suite import frozen, probe
from diffusers_concept_maps.shapes.suite.probe import Read


@pytest.fixture(scope="module")
def pipe() -> CogVideoXPipeline:
    pipe = dcm.load_shapes_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return frozen.contrast_scenes(6, frozen.EVALUATION_SEED, "color")


def states(pipe: CogVideoXPipeline, texts: list[str]) -> torch.Tensor:
    ids = pipe.tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids
    with torch.no_grad():
        embeds: torch.Tensor = pipe.text_encoder(ids)[0]
    return embeds


def test_words_alone(pipe: CogVideoXPipeline, scenes: Scenes) -> None:
    embeds = probe.alone(pipe, "color", torch.from_numpy(scenes.color))
    for clip, colors in enumerate(scenes.color):
        expected = states(pipe, [*(list(COLORS)[color] for color in colors), "background"])[:, 0]
        torch.testing.assert_close(embeds[clip], expected)


def test_words_in_the_prompt(pipe: CogVideoXPipeline, scenes: Scenes) -> None:
    """Positions are found by reading the caption from its front, and from its end."""
    embeds = {word: probe.in_prompt(pipe, scenes, word) for word in ("color", "motion")}
    for clip, caption in enumerate(full_captions(scenes)):
        words, state = caption.split(), states(pipe, [caption])[0]
        second = words.index("and") + 1
        torch.testing.assert_close(embeds["color"][clip], state[[1, second + 1, len(words) - 1]])
        for slot, (begin, end) in enumerate(((0, second - 1), (second, len(words) - 3))):
            length = len(MOTIONS[scenes.motion[clip, slot]].split())
            assert " ".join(words[end - length : end]) == MOTIONS[scenes.motion[clip, slot]]
            assert end - length > begin
            torch.testing.assert_close(embeds["motion"][clip, slot], state[end - length : end].mean(0))


SEED = 5


def capture(
    pipe: CogVideoXPipeline, scenes: Scenes, embeds: torch.Tensor, level: float, **options: object
) -> dcm.ConceptMaps:
    """One capture of one noised pass, written out."""
    alpha = pipe.scheduler.alphas_cumprod[int(1000 * level)]
    noise = torch.randn(scenes.video.shape, generator=torch.Generator().manual_seed(frozen.NOISE_SEED + SEED))
    noisy = alpha.sqrt() * scenes.video + (1 - alpha).sqrt() * noise
    with torch.no_grad(), dcm.trace(pipe.transformer, concept_embeds=embeds, normalize="none", **options) as maps:
        pipe.transformer(noisy, states(pipe, full_captions(scenes)), torch.full((len(scenes),), int(1000 * level)))
    return maps


@pytest.mark.parametrize("method", probe.METHODS)
def test_readings_of_real_clips(pipe: CogVideoXPipeline, scenes: Scenes, method: str) -> None:
    embeds = probe.alone(pipe, "color", torch.from_numpy(scenes.color))
    readings = probe.read_real(pipe, scenes, embeds, 0.7, SEED)
    kinds = {*map(str, range(HEADS)), "all"}
    assert set(readings) == {Read(m, heads) for m in probe.METHODS for heads in kinds} | {
        Read("imap", heads) for heads in ("motion", "random", "lowest")
    }
    assert readings[Read(method, "all")].shape == (LAYERS, 6, 3, 384)
    for layer, head in ((0, 3), (4, 1)):
        maps = capture(pipe, scenes, embeds, 0.7, methods=[method], layers=[layer], heads=[head])
        expected = maps.get(method).flatten(2)
        torch.testing.assert_close(readings[Read(method, str(head))][layer], expected, rtol=1e-4, atol=1e-4)
    heads = torch.stack([readings[Read(method, str(head))] for head in range(HEADS)])
    torch.testing.assert_close(readings[Read(method, "all")], heads.mean(0))


def test_motion_heads_are_those_of_imap(pipe: CogVideoXPipeline, scenes: Scenes) -> None:
    embeds = probe.alone(pipe, "color", torch.from_numpy(scenes.color))
    readings = probe.read_real(pipe, scenes, embeds, 0.6, SEED)
    selection = dcm.HeadSelection(top_k=2)
    maps = capture(pipe, scenes, embeds, 0.6, methods=["imap"], layers=[3], heads=selection)
    motion, lowest = readings[Read("imap", "motion")], readings[Read("imap", "lowest")]
    torch.testing.assert_close(motion[3], maps.get("imap").flatten(2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((motion + lowest) / 2, readings[Read("gramcol", "all")], rtol=1e-4, atol=1e-4)
    pairs = torch.stack([readings[Read("gramcol", str(head))][3, 0] for head in range(HEADS)])
    random = readings[Read("imap", "random")][3, 0]
    means = [(pairs[i] + pairs[j]) / 2 for i in range(HEADS) for j in range(i)]
    assert sum(bool(torch.allclose(random, mean, rtol=1e-4, atol=1e-4)) for mean in means) == 1


def test_readings_of_generated_clips(pipe: CogVideoXPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over the steps at noise level 0.6 and above, and the very clips that are made without a capture."""
    monkeypatch.setattr(probe, "STEPS", 5)
    scenes = frozen.described_scenes(2, 3)
    embeds = probe.alone(pipe, "motion", torch.from_numpy(scenes.motion))
    readings, clips = probe.read_generated(pipe, scenes, embeds, 11)
    assert torch.equal(clips, probe.generate(pipe, full_captions(scenes), 11))
    seen = []
    for step in range(5):
        with dcm.trace(
            pipe, methods=["gramcol"], layers=[2], heads=[1], steps=[step], concept_embeds=embeds, normalize="none"
        ) as maps:
            probe.generate(pipe, full_captions(scenes), 11)
        seen.append(maps.get("gramcol").flatten(2))
    assert pipe.scheduler.timesteps.tolist() == [999, 799, 599, 399, 199]
    torch.testing.assert_close(readings[Read("gramcol", "1")][2], torch.stack(seen[:3]).mean(0), rtol=1e-4, atol=1e-4)


def test_noise_level_out_of_range(pipe: CogVideoXPipeline, scenes: Scenes) -> None:
    embeds = probe.alone(pipe, "color", torch.from_numpy(scenes.color))
    for level in (-0.1, 1.0):
        with pytest.raises(dcm.ConceptMapsValueError, match=f"noise_level is {level}; expected 0"):
            probe.read_real(pipe, scenes, embeds, level, SEED)
