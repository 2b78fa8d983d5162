"""Maps of every layer and head on clips whose objects are known: real clips that are noised, and generated ones.

A reading is one tensor `[layer, clip, concept, token]` per method and set of heads: every head by itself, all of them,
and for GramCol the motion heads that IMAP takes, as many random ones and those that IMAP leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import CogVideoXPipeline

from diffusers_concept_maps.backbones import find_backbone
from diffusers_concept_maps.capture import trace
from diffusers_concept_maps.concepts import encode_concepts
from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.heads import HeadSelection
from diffusers_concept_maps.reference import FrameStatistics
from diffusers_concept_maps.shapes.captions import TEXT_LENGTH, describe, full_captions
from diffusers_concept_maps.shapes.model import GUIDANCE_SCALE, HEADS, PATCH, STEPS
from diffusers_concept_maps.shapes.scenes import FRAMES, Scenes
from diffusers_concept_maps.shapes.suite.frozen import BACKGROUND, GENERATED_NOISE_LEVEL, NOISE_SEED, WORDS_OF

METHODS = ("concept_attention", "cross_attention", "gramcol")
MOTION_HEADS = HEADS // 2
WORDS = ("alone", "in prompt")
"""A concept that is encoded by itself, or the words as the caption has them."""

_REAL_BATCH, _GENERATED_BATCH = 64, 12


class Read(NamedTuple):
    """What a reading was made with.

    Attributes:
        method: of `METHODS`; "imap" is GramCol on chosen heads.
        heads: "all", a head's number, or "motion", "random" or "lowest" of Calinski-Harabasz scores.
    """

    method: str
    heads: str

    @property
    def source_method(self) -> str:
        """The method whose maps per head it is made of."""
        return "gramcol" if self.method == "imap" else self.method


class Place(NamedTuple):
    """Where maps are read.

    Attributes:
        source: "real" clips, noised, or "generated" ones, while they are.
        noise_level: of the real clips; of the generated ones, the least.
        words: "alone", a concept that is encoded by itself, or "in prompt", the words as the caption has them.
    """

    source: str
    noise_level: float
    words: str


class Choice(NamedTuple):
    """A way to read a map: the place, the method and its heads, the 0-based layer."""

    place: Place
    read: Read
    layer: int

    def __str__(self) -> str:
        source, level, words = self.place
        method, heads = self.read
        return f"{source} {level}, {words}, {method}, layer {self.layer}, heads {heads}"


def word_embeds(pipe: CogVideoXPipeline, scenes: Scenes, word: str, words: str) -> torch.Tensor:
    """Embeddings of the words of both objects and of "background" `[clip, 3, width]`, of either kind of `WORDS`."""
    if words == "alone":
        return alone(pipe, word, torch.from_numpy(getattr(scenes, word)))
    return in_prompt(pipe, scenes, word)


def alone(pipe: CogVideoXPipeline, word: str, indices: torch.Tensor) -> torch.Tensor:
    """Embeddings of words that stand alone, and of "background" after them.

    Args:
        pipe: the embedded model or one like it.
        word: "color", "shape" or "motion".
        indices: of the words of every clip `[clip, 2]`, into `WORDS_OF[word]`.

    Returns:
        float `[clip, 3, width]`.
    """
    known = encode_concepts(find_backbone(pipe.transformer), pipe, (*WORDS_OF[word], BACKGROUND), "mean")
    background = torch.full_like(indices[:, :1], len(WORDS_OF[word]))
    return known[torch.cat([indices, background], 1).to(known.device)]


@torch.no_grad()
def in_prompt(pipe: CogVideoXPipeline, scenes: Scenes, word: str) -> torch.Tensor:
    """Embeddings of the words of both objects, and of "background", as they stand in the full captions.

    Args:
        pipe: the embedded model or one like it.
        scenes: two-object scenes.
        word: "color", "shape" or "motion".

    Returns:
        float `[clip, 3, width]`, means over the tokens of a word.
    """
    states = _encode(pipe, full_captions(scenes))
    return torch.stack([_word_states(states[i], scenes, i, word) for i in range(len(scenes))])


def _word_states(states: torch.Tensor, scenes: Scenes, index: int, word: str) -> torch.Tensor:
    """Mean states `[3, width]` of one caption, whose tokens `[token, width]` are its words."""
    found, start = [], 0
    for slot in range(2):
        phrase = describe(scenes, index, slot).split()
        names = WORDS_OF[word][getattr(scenes, word)[index, slot]].split()
        first = start + phrase.index(names[0])
        found.append(states[first : first + len(names)].mean(0))
        start += len(phrase) + 1  # and the "and" or "on" after it
    return torch.stack([*found, states[start + 1]])  # of "on dark background"


def _encode(pipe: CogVideoXPipeline, texts: Sequence[str]) -> torch.Tensor:
    """Text encoder states `[text, token, width]`."""
    states, _ = pipe.encode_prompt(list(texts), do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)
    embeds: torch.Tensor = states
    return embeds


@torch.no_grad()
def read_real(
    pipe: CogVideoXPipeline,
    scenes: Scenes,
    embeds: torch.Tensor,
    noise_level: float,
    seed: int,
    methods: Sequence[str] = METHODS,
) -> dict[Read, torch.Tensor]:
    """Noise real clips, send them through the transformer once with their full captions, and read the maps.

    Args:
        pipe: the embedded model or one like it.
        scenes: the clips.
        embeds: concepts `[clip, concept, width]`.
        noise_level: 0 (clean) to 1 (noise only), as a fraction of the scheduler's time steps.
        seed: of the noise.
        methods: of `METHODS`.

    Returns:
        Raw maps, float32 `[layer, clip, concept, token]`.

    Raises:
        ConceptMapsValueError: a noise level out of range.
    """
    if not 0 <= noise_level < 1:
        raise ConceptMapsValueError(f"noise_level is {noise_level}; expected 0 (clean) to less than 1 (noise only)")
    timesteps = torch.full((len(scenes),), int(noise_level * pipe.scheduler.config.num_train_timesteps))
    noise = torch.randn(scenes.video.shape, generator=torch.Generator().manual_seed(NOISE_SEED + seed))
    noisy = pipe.scheduler.add_noise(scenes.video, noise, timesteps)
    prompt = _encode(pipe, full_captions(scenes))
    parts = []
    for part in torch.arange(len(scenes)).split(_REAL_BATCH):
        heads = _WatchedHeads(top_k=MOTION_HEADS)
        with trace(
            pipe.transformer,
            methods=methods,
            layers=range(len(pipe.transformer.transformer_blocks)),
            heads=heads,
            concept_embeds=embeds[part],
            normalize="none",
            detail=("layer", "head"),
        ) as maps:
            pipe.transformer(noisy[part].to(prompt), prompt[part], timesteps[part].to(prompt.device))
        by_head = {method: maps.detail(method).flatten(4).unsqueeze(1) for method in methods}
        parts.append(_readings(by_head, heads))
    return {read: torch.cat([part[read] for part in parts], 1) for read in parts[0]}


@torch.no_grad()
def read_generated(
    pipe: CogVideoXPipeline, scenes: Scenes, embeds: torch.Tensor, seed: int
) -> tuple[dict[Read, torch.Tensor], torch.Tensor]:
    """Generate a clip for the full caption of every scene, and read the maps of its early steps.

    Args:
        pipe: the embedded model or one like it.
        scenes: what is asked for; their videos are not used.
        embeds: concepts `[clip, concept, width]`.
        seed: of the noise.

    Returns:
        Raw maps, float32 `[layer, clip, concept, token]`, means over the steps at `GENERATED_NOISE_LEVEL` and above;
        and the clips `[clip, frame, 3, height, width]` in [0, 1].
    """
    texts, parts, clips = full_captions(scenes), [], []
    for start in range(0, len(scenes), _GENERATED_BATCH):
        part = slice(start, start + _GENERATED_BATCH)
        heads = _WatchedHeads(top_k=MOTION_HEADS)
        with trace(
            pipe,
            methods=METHODS,
            layers=range(len(pipe.transformer.transformer_blocks)),
            steps=range(int(STEPS * (1 - GENERATED_NOISE_LEVEL)) + 1),
            heads=heads,
            concept_embeds=embeds[part],
            normalize="none",
            detail=("layer", "step", "head"),
        ) as maps:
            clips.append(generate(pipe, texts[part], seed + start))
        by_head = {method: maps.detail(method).flatten(5) for method in METHODS}
        parts.append(_readings(by_head, heads))
    return {read: torch.cat([part[read] for part in parts], 1) for read in parts[0]}, torch.cat(clips)


def generate(
    pipe: CogVideoXPipeline, texts: Sequence[str], seed: int, guidance_scale: float = GUIDANCE_SCALE
) -> torch.Tensor:
    """Clips of one batch of prompts `[clip, frame, 3, height, width]` in [0, 1]."""
    output = pipe(
        prompt=list(texts),
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        max_sequence_length=TEXT_LENGTH,
        output_type="pt",
        generator=torch.Generator().manual_seed(seed),
    )
    clips: torch.Tensor = output.frames
    return clips


def object_weights(masks: torch.Tensor) -> torch.Tensor:
    """Share of every token in an object `[clip, 2, token]`, from its mask `[clip, 2, frame, height, width]`."""
    covered = torch.nn.functional.avg_pool2d(masks.flatten(0, 2)[:, None].float(), PATCH)
    return covered.view(*masks.shape[:2], -1)


class _WatchedHeads(HeadSelection):
    """Motion heads that are remembered in `chosen`: ones and zeros `[row, head]`, in order of steps and layers."""

    def choose(
        self, image_output: torch.Tensor, frames: int, statistics: FrameStatistics | None = None
    ) -> torch.Tensor:
        mask = super().choose(image_output, frames, statistics)
        self.__dict__.setdefault("chosen", []).append(mask)
        return mask


def _readings(by_head: dict[str, torch.Tensor], watched: HeadSelection) -> dict[Read, torch.Tensor]:
    """Means over steps and sets of heads, of maps `[layer, step, head, clip, concept, token]`."""
    readings = {}
    for method, maps in by_head.items():
        readings[Read(method, "all")] = maps.mean((1, 2))
        for head in range(maps.shape[2]):
            readings[Read(method, str(head))] = maps[:, :, head].mean(1)
    if "gramcol" in by_head:
        maps = by_head["gramcol"]
        layers, steps = maps.shape[:2]
        chosen = torch.stack(watched.__dict__["chosen"]).unflatten(0, (steps, layers)).transpose(0, 1)
        order = torch.rand(chosen.shape, generator=torch.Generator().manual_seed(NOISE_SEED)).argsort(-1)
        for name, mask in (("motion", chosen), ("random", order < MOTION_HEADS), ("lowest", 1 - chosen)):
            weight = mask.float().transpose(-1, -2)[..., None, None]  # [layer, step, head, clip, 1, 1]
            readings[Read("imap", name)] = ((maps * weight).sum(2) / weight.sum(2)).mean(1)
    return readings
