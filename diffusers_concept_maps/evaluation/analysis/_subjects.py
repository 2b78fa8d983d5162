"""Clips with the concept that is looked for, concepts that are not, and where it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.evaluation.datasets import Dataset, Sample
from diffusers_concept_maps.shapes.captions import full_captions
from diffusers_concept_maps.shapes.scenes import COLORS, MOTIONS, SHAPES, Scenes, sample_scenes

BACKGROUND = "background"
WORDS: dict[str, tuple[str, ...]] = {"color": tuple(COLORS), "shape": SHAPES, "motion": MOTIONS}
"""By what the objects of the embedded scenes are named."""

_COVERED = 0.5  # share of a pixel that an object has to cover


@dataclass(frozen=True)
class Subject:
    """One clip.

    Attributes:
        name: unique in its data set.
        frames: uint8 `[frame, 3, height, width]`.
        labels: int64 `[frame, height, width]`: 1 is the target, 0 is not, -1 is not scored.
        concepts: the target first; then concepts it is told from, the first of which serves as the wrong one.
        caption: what to tell the model of it.
    """

    name: str
    frames: torch.Tensor
    labels: torch.Tensor
    concepts: tuple[str, ...]
    caption: str


def shapes_subjects(count: int, *, word: str = "color", seed: int = 0) -> list[Subject]:
    """Scenes of the embedded data with two objects, which differ in the word that names them.

    The target is the first object, the wrong concept the second. With `word="motion"` the mask is there only while
    the object is under way.

    Args:
        count: number of scenes.
        word: one of `WORDS`.
        seed: of the scenes.

    Raises:
        ConceptMapsValueError: an unknown word.
    """
    if word not in WORDS:
        raise ConceptMapsValueError(f"unknown word {word!r}; expected one of {', '.join(WORDS)}")
    scenes = sample_scenes(4 * count + 8, np.random.default_rng(seed), objects=2)
    index = getattr(scenes, word)
    differ = index[:, 0] != index[:, 1]
    if word == "motion":
        differ &= scenes.moves[:, 0].any(1).numpy()
    chosen = np.flatnonzero(differ)[:count]
    if len(chosen) < count:
        raise ConceptMapsValueError(f"only {len(chosen)} of {count} scenes have what is asked for; ask for fewer")
    return _of_scenes(scenes.take(chosen), word)


def _of_scenes(scenes: Scenes, word: str) -> list[Subject]:
    masks = scenes.masks[:, 0] > _COVERED
    if word == "motion":
        masks = masks & scenes.moves[:, 0, :, None, None]
    pixels = ((scenes.video + 1) * 127.5).round().to(torch.uint8)
    names, index = WORDS[word], getattr(scenes, word)
    return [
        Subject(
            name=f"shapes-{word}-{i}",
            frames=pixels[i],
            labels=masks[i].long(),
            concepts=(names[index[i, 0]], names[index[i, 1]], BACKGROUND),
            caption=caption,
        )
        for i, caption in enumerate(full_captions(scenes))
    ]


def dataset_subjects(
    dataset: Dataset[object], limit: int | None = None, *, others: Sequence[str] = (BACKGROUND,)
) -> Iterator[Subject]:
    """Samples of a data set with a class of their own in them, read one at a time; the first class is the target.

    Args:
        dataset: from `open_dataset`.
        limit: the most samples to take, from the first; None is all.
        others: concepts that are told from the classes of the sample, after those.

    Yields:
        `Subject`.

    Raises:
        ConceptMapsError: no sample shows a class, or as `Dataset.read`.
    """
    count = 0
    for name in dataset.names():
        if count == limit:
            return
        subject = _of_sample(dataset.read(name), others)
        if subject is not None:
            count += 1
            yield subject
    if not count:
        raise ConceptMapsError(f"no sample of {dataset.name} shows a class but the background; use another part of it")


def _of_sample(sample: Sample, others: Sequence[str]) -> Subject | None:
    present = [label for label in range(1, len(sample.classes)) if bool((sample.labels == label).any())]
    if not present:
        return None
    target = present[0]
    rest = [sample.classes[label] for label in present[1:]]
    concepts = tuple(dict.fromkeys((sample.classes[target], *rest, *others)))
    labels = torch.where(sample.labels < 0, -1, (sample.labels == target).long())
    return Subject(sample.name, sample.frames, labels, concepts, sample.caption)
