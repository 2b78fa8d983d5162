"""Gates of the embedded model: does it draw what a prompt says, and do its maps tell two objects apart?

`python -m diffusers_concept_maps.shapes.evaluate [--pipeline DIR]` prints a table of gates and of what is measured
beside them, and ends with status 1 when a gate is red. Prompts and seeds are frozen: the head of the contrast gate is
chosen on clips of one seed and scored on clips of another.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path

import numpy as np
import torch
from diffusers import CogVideoXPipeline

from diffusers_concept_maps.backbones import find_backbone
from diffusers_concept_maps.capture import trace
from diffusers_concept_maps.concepts import encode_concepts
from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.shapes.captions import TEXT_LENGTH, full_captions
from diffusers_concept_maps.shapes.judge import both_colors, judge
from diffusers_concept_maps.shapes.model import (
    GUIDANCE_SCALE,
    HEADS,
    LAYERS,
    PATCH,
    STEPS,
    load_shapes_pipeline,
)
from diffusers_concept_maps.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    FRAMES,
    HELD_OUT,
    MOTIONS,
    SHAPES,
    Scenes,
    sample_scenes,
)

DEVELOPMENT_SEED, EVALUATION_SEED = 20_001, 20_002
"""Seeds of the clips on which a head is chosen, and of those on which everything is scored."""

WORDS_OF = {"color": tuple(COLORS), "shape": SHAPES, "motion": MOTIONS}
"""The words of every attribute, in the order in which `Scenes` counts them."""

GUIDANCE_SCALES = (1.5, 2.0, 3.0, 4.0)
"""Guidance scales that were compared on noise of the development seed; `model.GUIDANCE_SCALE` is the best of them."""

_BATCH, _FORWARD_BATCH = 12, 64
_PROMPTS, _PAIR_PROMPTS, _JUDGE_CLIPS, _DEVELOPMENT_CLIPS, _EVALUATION_CLIPS = 120, 24, 350, 128, 256
_NOISE_LEVEL, _NOISE_SEED = 0.6, 20_003
_GATED_METHODS = ("cross_attention", "gramcol")
_ALL_METHODS = (*_GATED_METHODS, "concept_attention")
_GENERATION_GATE, _JUDGE_GATE, _CONTRAST_GATE = 0.90, 0.98, 0.90


@dataclass(frozen=True)
class Prompt:
    """A prompt for one object, and the words that the judge compares the clip with."""

    text: str
    color: str
    shape: str
    motion: str


@dataclass(frozen=True)
class Result:
    """One line of the table: a rate, and the least it may be if it is a gate."""

    name: str
    value: float
    gate: float | None = None
    note: str = ""

    @property
    def red(self) -> bool:
        """Whether a gate is missed."""
        return self.gate is not None and self.value < self.gate

    def __str__(self) -> str:
        verdict = "" if self.gate is None else f">= {self.gate:.2f} {'RED' if self.red else 'ok'}"
        return f"{self.name:<44} {self.value:6.3f}  {verdict:<12} {self.note}".rstrip()


def generation_prompts() -> tuple[Prompt, ...]:
    """The 120 frozen single-object prompts, balanced over colors, shapes, motions and backgrounds.

    Where a `HELD_OUT` pair would stand, the two of them trade their shapes: none is asked for, the balance stays. A
    few texts come twice, with other noise each time.
    """
    (first_color, first_shape), (second_color, second_shape) = HELD_OUT
    traded = {HELD_OUT[0]: (first_color, second_shape), HELD_OUT[1]: (second_color, first_shape)}
    pairs = [traded.get(pair, pair) for pair in product(COLORS, SHAPES)]
    prompts = []
    for i in range(_PROMPTS):
        color, shape = pairs[i % len(pairs)]
        motion, background = MOTIONS[i % len(MOTIONS)], BACKGROUNDS[i // len(pairs) % len(BACKGROUNDS)]
        prompts.append(Prompt(f"a {color} {shape} {motion} on {background} background", color, shape, motion))
    return tuple(prompts)


def contrast_scenes(n: int, seed: int, word: str) -> Scenes:
    """Two-object scenes whose objects differ in one attribute.

    Args:
        n: number of scenes.
        seed: such as `DEVELOPMENT_SEED`.
        word: "color", "shape" or "motion".

    Raises:
        ConceptMapsValueError: an unknown attribute.
    """
    _check_word(word)
    drawn = sample_scenes(4 * n + 16, np.random.default_rng(seed), objects=2)
    first, second = getattr(drawn, word).T
    kept = np.flatnonzero(first != second)[:n]
    return Scenes(**{field.name: getattr(drawn, field.name)[kept] for field in fields(Scenes)})


def score_generation(
    pipe: CogVideoXPipeline,
    prompts: Sequence[Prompt],
    *,
    seed: int = EVALUATION_SEED,
    guidance_scale: float = GUIDANCE_SCALE,
) -> dict[str, float]:
    """Share of single-object prompts that the pipeline follows.

    Args:
        pipe: the embedded model or one like it.
        prompts: such as `generation_prompts()`.
        seed: of the noise.
        guidance_scale: of the pipeline's call.

    Returns:
        Rates by the names of `Verdict`: "present", "coherent", "color", "shape", "motion".
    """
    clips = _generate(pipe, [prompt.text for prompt in prompts], seed, guidance_scale)
    verdict = judge(clips, [p.color for p in prompts], [p.shape for p in prompts], [p.motion for p in prompts])
    return verdict.rates()


def contrast_accuracy(
    pipe: CogVideoXPipeline,
    scenes: Scenes,
    method: str,
    layer: int,
    head: int,
    noise_level: float,
    word: str = "color",
) -> float:
    """How often a pair of maps is on the right one of two objects; what both maps share cancels out.

    Real clips are noised and pass the transformer once with their full captions. A hit is a clip in which the map of
    object A's word minus that of object B's is larger, on average, over A's tokens than over B's. Chance is 0.5.

    Args:
        pipe: the embedded model or one like it.
        scenes: two-object scenes that differ in the attribute, as of `contrast_scenes`.
        method: a map method; its raw scores are compared.
        layer: 0-based.
        head: 0-based.
        noise_level: 0 (clean) to 1 (noise only), as a fraction of the scheduler's time steps.
        word: the attribute whose words are the concepts, each embedded alone: "color", "shape" or "motion".

    Returns:
        The share of hits.

    Raises:
        ConceptMapsValueError: an unknown attribute, noise level, method, layer or head.
    """
    hits = contrast_hits(pipe, scenes, [method], layer, [head], noise_level, word)
    return float(hits[method].mean())


@torch.no_grad()
def contrast_hits(
    pipe: CogVideoXPipeline,
    scenes: Scenes,
    methods: Sequence[str],
    layer: int,
    heads: Sequence[int] | None,
    noise_level: float,
    word: str,
) -> dict[str, np.ndarray]:
    """The hits of `contrast_accuracy`, for several methods in one pass; `heads=None` is the mean over all.

    Returns:
        Bool array `[n]` for every method.
    """
    _check_word(word)
    if not 0 <= noise_level < 1:
        raise ConceptMapsValueError(f"noise_level is {noise_level}; expected 0 (clean) to less than 1 (noise only)")
    timesteps = torch.full((len(scenes),), int(noise_level * pipe.scheduler.config.num_train_timesteps))
    noise = torch.randn(scenes.video.shape, generator=torch.Generator().manual_seed(_NOISE_SEED))
    noisy = pipe.scheduler.add_noise(scenes.video, noise, timesteps)
    prompt, _ = pipe.encode_prompt(
        full_captions(scenes), do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH
    )
    vocabulary = encode_concepts(find_backbone(pipe.transformer), pipe, WORDS_OF[word], "mean")
    embeds = vocabulary[torch.from_numpy(getattr(scenes, word)).to(vocabulary.device)]
    weights = torch.nn.functional.avg_pool2d(scenes.masks.flatten(0, 2)[:, None], PATCH)
    weights = weights.view(len(scenes), 2, -1)
    weights = weights / weights.sum(2, keepdim=True)
    hits: dict[str, list[torch.Tensor]] = {method: [] for method in methods}
    for part in torch.arange(len(scenes)).split(_FORWARD_BATCH):
        with trace(
            pipe.transformer,
            methods=methods,
            layers=[layer],
            heads=heads,
            concept_embeds=embeds[part],
            normalize="none",
        ) as maps:
            pipe.transformer(noisy[part].to(prompt), prompt[part], timesteps[part].to(prompt.device))
        for method in methods:
            contrast = torch.sub(*maps.get(method).flatten(2).unbind(1))
            on_first, on_second = (weights[part] * contrast[:, None]).sum(2).unbind(1)
            hits[method].append(on_first > on_second)
    return {method: torch.cat(found).numpy() for method, found in hits.items()}


def choose_head(pipe: CogVideoXPipeline, method_names: Sequence[str] = _GATED_METHODS) -> dict[str, np.ndarray]:
    """Contrast accuracy for color words of every layer and head, on clips of the development seed.

    Args:
        pipe: the embedded model or one like it.
        method_names: map methods.

    Returns:
        For every method an array `[layer, head]`; layer 0 reads colors off the noisy pixels and is not to be chosen.
    """
    scenes = contrast_scenes(_DEVELOPMENT_CLIPS, DEVELOPMENT_SEED, "color")
    accuracy = {method: np.zeros((LAYERS, HEADS)) for method in method_names}
    for layer, head in product(range(LAYERS), range(HEADS)):
        for method, hits in contrast_hits(pipe, scenes, method_names, layer, [head], _NOISE_LEVEL, "color").items():
            accuracy[method][layer, head] = hits.mean()
    return accuracy


def evaluate(pipe: CogVideoXPipeline) -> Iterator[Result]:
    """Everything that is measured, gates first, one result as soon as it is known."""
    yield from _judge_results()
    rates = score_generation(pipe, generation_prompts())
    for name, rate in rates.items():
        yield Result(f"generation: {name}", rate, _GENERATION_GATE if name in ("present", "color") else None)
    yield Result("generation: both colors of two objects", _score_pairs(pipe))
    yield from _contrast_results(pipe)


def _judge_results() -> Iterator[Result]:
    """The judge on real clips."""
    scenes = sample_scenes(_JUDGE_CLIPS, np.random.default_rng(EVALUATION_SEED), objects=1)
    words = {name: [known[i] for i in getattr(scenes, name)[:, 0]] for name, known in WORDS_OF.items()}
    for name, rate in judge((scenes.video + 1) / 2, *words.values()).rates().items():
        yield Result(f"judge on real clips: {name}", rate, _JUDGE_GATE)


def _score_pairs(pipe: CogVideoXPipeline) -> float:
    """Share of two-object prompts whose clips show both colors."""
    scenes = contrast_scenes(_PAIR_PROMPTS, EVALUATION_SEED, "color")
    first, second = ([WORDS_OF["color"][i] for i in colors] for colors in scenes.color.T)
    clips = _generate(pipe, full_captions(scenes), EVALUATION_SEED, GUIDANCE_SCALE)
    return float(both_colors(clips, first, second).float().mean())


def _contrast_results(pipe: CogVideoXPipeline) -> Iterator[Result]:
    """Contrast of the chosen heads, then of whole layers, then of every head on the clips it was chosen on.

    The gate is on the method, of the two it is open to, that does best on the development seed.
    """
    accuracy = choose_head(pipe)
    gated = max(accuracy, key=lambda method: accuracy[method][1:].max())
    evaluation = {word: contrast_scenes(_EVALUATION_CLIPS, EVALUATION_SEED, word) for word in WORDS_OF}
    for word, (method, table) in product(WORDS_OF, accuracy.items()):
        layer, head = divmod(int(table[1:].argmax()) + HEADS, HEADS)
        hits = contrast_hits(pipe, evaluation[word], [method], layer, [head], _NOISE_LEVEL, word)[method]
        low, high = bootstrap_interval(hits)
        gate = _CONTRAST_GATE if (word, method) == ("color", gated) else None
        note = f"layer {layer} head {head}, 95% interval {low:.3f} to {high:.3f}"
        yield Result(f"contrast of {word} words: {method}", float(hits.mean()), gate, note)
    for layer in range(LAYERS):
        hits_of = contrast_hits(pipe, evaluation["color"], _ALL_METHODS, layer, None, _NOISE_LEVEL, "color")
        for method, hits in hits_of.items():
            yield Result(f"contrast of color words: {method}", float(hits.mean()), note=f"layer {layer}, all heads")
    for method, table in accuracy.items():
        for layer, row in enumerate(table):
            note = f"layer {layer}, development seed, by head: " + " ".join(f"{value:.3f}" for value in row)
            yield Result(f"contrast of color words: {method}", float(row.max()), note=note)


def bootstrap_interval(hits: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95% percentile bootstrap interval of a share of hits `[n]`."""
    rng = np.random.default_rng(0)
    means = hits[rng.integers(len(hits), size=(draws, len(hits)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _generate(pipe: CogVideoXPipeline, texts: Sequence[str], seed: int, guidance_scale: float) -> torch.Tensor:
    """Clips `[n, frame, 3, height, width]` in [0, 1] of prompts."""
    clips = []
    for start in range(0, len(texts), _BATCH):
        output = pipe(
            prompt=list(texts[start : start + _BATCH]),
            num_frames=FRAMES,
            num_inference_steps=STEPS,
            guidance_scale=guidance_scale,
            max_sequence_length=TEXT_LENGTH,
            output_type="pt",
            generator=torch.Generator().manual_seed(seed + start),
        )
        clips.append(output.frames)
    return torch.cat(clips)


def _check_word(word: str) -> None:
    if word not in WORDS_OF:
        raise ConceptMapsValueError(f"word is {word!r}; expected one of {', '.join(WORDS_OF)}")


def main() -> None:
    """Parse the command line, print the table, and exit with status 1 when a gate is red."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, help="a pipeline folder; default the embedded model")
    parser.add_argument("--development", action="store_true", help="compare guidance scales on the development seed")
    arguments = parser.parse_args()
    folder: Path | None = arguments.pipeline
    pipe = CogVideoXPipeline.from_pretrained(folder, dtype=torch.float32) if folder else load_shapes_pipeline()
    pipe.set_progress_bar_config(disable=True)
    if arguments.development:
        for scale in GUIDANCE_SCALES:
            rates = score_generation(pipe, generation_prompts(), seed=DEVELOPMENT_SEED, guidance_scale=scale)
            print(f"guidance {scale}: " + "  ".join(f"{name} {rate:.3f}" for name, rate in rates.items()), flush=True)
        return
    red = []
    for result in evaluate(pipe):
        print(result, flush=True)
        red += [result.name] if result.red else []
    sys.exit(1 if red else 0)


if __name__ == "__main__":
    main()
