"""How a sample of a data set is scored: what the model is told, which concepts compete, and what becomes a mask.

As ConceptAttention (arXiv 2502.04320): the concepts are the sample's classes and some of what backgrounds show; the
caption names the classes. With one class the mask is where its map is above the mean, with several every pixel is of
the concept with the highest score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.evaluation import judge as ratings
from diffusers_concept_maps.evaluation import localization, segmentation, video
from diffusers_concept_maps.evaluation._tensors import check_choice
from diffusers_concept_maps.evaluation.datasets import Sample
from diffusers_concept_maps.fitting import Fit
from diffusers_concept_maps.maps import ConceptMaps
from diffusers_concept_maps.noising import check_levels

BACKGROUND_CONCEPTS = ("background", "floor", "tree", "person", "grass", "face")
"""What ConceptAttention lets compete with the classes."""

_PARITIES = (None, "concept_attention")
_PARITY_SIZES = {"threshold": (224, 224), "argmax": (64, 64)}
"""`(height, width)` at which the published scripts compare."""


@dataclass(frozen=True)
class Protocol:
    """What kind of data set it is.

    Attributes:
        rule: how maps become masks, "threshold" (one class) or "argmax" (several); see `segmentation`.
        is_video: there are clips, of which steadiness and motion are scored, too.
    """

    rule: str
    is_video: bool


PROTOCOLS = {
    "imagenet-segmentation": Protocol("threshold", is_video=False),
    "pascal-voc-single": Protocol("threshold", is_video=False),
    "pascal-voc": Protocol("argmax", is_video=False),
    "mevis": Protocol("threshold", is_video=True),
    "davis-2016": Protocol("threshold", is_video=True),
    "davis-2017": Protocol("argmax", is_video=True),
    "vspw": Protocol("argmax", is_video=True),
}
"""By the name of the data set."""


@dataclass(frozen=True)
class Settings:
    """What the maps and scores of a sample depend on, beside model and data set.

    Attributes:
        methods: as for `encode`; each has scores of its own.
        layers: as for `encode`.
        normalize: as for `encode`.
        map_parity: `parity` of `encode`, the official maps of a model.
        noise_levels: fractions of the training schedule, averaged over.
        num_samples: draws of noise for each.
        seed: every sample draws with a seed made of this one and its name.
        background: concepts that compete with the classes; one that is a class is left out.
        size: `(height, width)` in pixels that the model sees; None as for `encode`.
        num_frames: most frames of a clip that the model sees; None as for `encode`.
        upsampling: from tokens to pixels, as `mode` of `ConceptMaps.upsample`.
        temporal: as for `ConceptMaps.upsample`.
        parity: "concept_attention" compares as the paper's published scripts do, masks made on the grid of tokens and
            brought to 224 x 224 pixels (64 x 64 with several classes) by the nearest value, and counts as they do.
        blur: with that parity, smooth maps first, which those scripts offer.

    Raises:
        ConceptMapsValueError: one of these cannot be used.
    """

    methods: tuple[str, ...] = ("concept_attention",)
    layers: tuple[int, ...] | None = None
    normalize: str | None = None
    map_parity: str | None = None
    noise_levels: tuple[float, ...] = (0.5,)
    num_samples: int = 1
    seed: int = 0
    background: tuple[str, ...] = BACKGROUND_CONCEPTS
    size: tuple[int, int] | None = None
    num_frames: int | None = None
    upsampling: str = "bilinear"
    temporal: str = "nearest"
    parity: str | None = None
    blur: bool = False

    def __post_init__(self) -> None:
        check_levels(self.noise_levels)
        check_choice(self.parity, _PARITIES, "parity")
        if self.num_samples < 1:
            raise ConceptMapsValueError(f"num_samples is {self.num_samples}; expected at least 1")
        if not self.background:
            raise ConceptMapsValueError("there are no background concepts; expected at least one, to compete")
        if self.blur and self.parity is None:
            raise ConceptMapsValueError("blur is what the published scripts offer; expected it with parity")

    def to_json(self) -> dict[str, Any]:
        """By name, JSON-compatible."""
        return asdict(self)

    @property
    def map_options(self) -> dict[str, Any]:
        """Options of a capture."""
        return {
            "methods": self.methods,
            "layers": self.layers,
            "normalize": self.normalize,
            "parity": self.map_parity,
        }


def concepts_of(classes: Sequence[str], background: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The concepts of a sample and the label of each.

    Args:
        classes: of the sample, the background first.
        background: concepts of the background.

    Returns:
        The classes but for the first, then the background's concepts that are none of them; and their labels.
    """
    own = tuple(classes[1:])
    others = tuple(dict.fromkeys(name for name in background if name not in own))
    return own + others, (*range(1, len(own) + 1), *[0] * len(others))


def score_maps(
    maps: ConceptMaps, sample: Sample, protocol: Protocol, settings: Settings, judge: ratings.Judge | None = None
) -> dict[str, dict[str, Any]]:
    """Score the maps of one sample.

    Args:
        maps: of `concepts_of` the sample, made by `encode`.
        sample: with at least one class beside the background.
        protocol: of its data set.
        settings: how to score.
        judge: has the map of every class rated, of videos only; None: none.

    Returns:
        JSON-able, by method: `segmentation` of `segmentation.score_sample`; of videos also `video` of
        `video.score_sample`, and by class `localization` of `localization.score_sample` and `judge` of
        `judge.score_sample`.

    Raises:
        ConceptMapsError: what cannot be scored or rated.
    """
    seen = Fit.from_json(maps.metadata["source"]).covered
    seen_sample = Sample(sample.name, sample.frames[:seen], sample.labels[:seen], sample.classes, sample.caption)
    scorer = _Scorer(maps, seen_sample, protocol, settings)
    return {method: scorer.scores(method, judge) for method in maps.methods}


@dataclass(frozen=True)
class _Scorer:
    """The frames that the model has seen, and what is to be done with their maps."""

    maps: ConceptMaps
    sample: Sample
    protocol: Protocol
    settings: Settings

    def scores(self, method: str, judge: ratings.Judge | None) -> dict[str, Any]:
        """All scores of one method."""
        pixels = self._in_pixels(method)
        scores: dict[str, Any] = {"segmentation": self._segmentation(pixels, method)}
        if not self.protocol.is_video:
            return scores
        classes = self.sample.classes
        predicted = segmentation.segment(pixels, self._concept_labels, rule=self.protocol.rule)
        scores["video"] = video.score_sample(predicted, self.sample.labels, classes=len(classes))
        scores["localization"] = {name: self._localization(pixels, label) for label, name in self._targets}
        if judge is not None:
            scores["judge"] = {
                name: ratings.score_sample(
                    judge, self.sample.frames, pixels[label - 1].float(), name, self.sample.caption
                )
                for label, name in self._targets
            }
        return scores

    @property
    def _concept_labels(self) -> tuple[int, ...]:
        return concepts_of(self.sample.classes, self.settings.background)[1]

    @property
    def _targets(self) -> list[tuple[int, str]]:
        """Label and name of every class."""
        return list(enumerate(self.sample.classes))[1:]

    def _in_pixels(self, method: str) -> torch.Tensor:
        """Maps on the grid of the masks."""
        mode = self.settings.upsampling
        guide = self.sample.frames if mode == "guided" else None
        frames, height, width = self.sample.labels.shape
        return self.maps.upsample(
            (height, width), frames, method, mode=mode, temporal=self.settings.temporal, guide=guide
        )[0]

    def _segmentation(self, pixels: torch.Tensor, method: str) -> dict[str, Any]:
        rule, classes = self.protocol.rule, len(self.sample.classes)
        # What two classes have alone, such as average precision, would be of some samples of such a data set only.
        classes = max(3, classes) if rule == "argmax" else classes
        if self.settings.parity is None:
            return segmentation.score_sample(
                pixels, self.sample.labels, self._concept_labels, classes=classes, rule=rule
            )
        height, width = self.maps.get(method).shape[-2:]
        tokens = self.maps.upsample((height, width), len(self.sample.labels), method, mode="nearest")[0]
        return segmentation.score_sample(
            segmentation.blur(tokens) if self.settings.blur else tokens,
            self.sample.labels,
            self._concept_labels,
            classes=classes,
            rule=rule,
            size=_PARITY_SIZES[rule],
            parity=self.settings.parity,
        )

    def _localization(self, pixels: torch.Tensor, label: int) -> dict[str, Any]:
        """Objects are masked in motion and at rest, so their motion is how their masks change."""
        labels = self.sample.labels
        mask = torch.where(labels < 0, labels, (labels == label).long())
        amount = localization.mask_motion(mask) if len(mask) > 1 else None
        return localization.score_sample(pixels[label - 1], mask, amount=amount)


def by_class_name(record: Mapping[str, Any], classes: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """A record of counts by the labels of one sample, as one by the classes of the data set.

    Args:
        record: with `intersection` and `union` by label, of `segmentation` or `video`.
        classes: of the sample, by label.
        names: of the data set.
    """
    counts = {}
    for key in ("intersection", "union"):
        own = dict(zip(classes, record[key], strict=False))  # labels behind the classes are of none
        counts[key] = [own.get(name, 0) for name in names]
    return {**record, **counts, "classes": len(names)}
