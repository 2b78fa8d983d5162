"""Published scores, to stand beside one's own, each with its source and how far it can be trusted.

Only what could be found is here. Not found, and therefore left out: the tables of ConceptAttention but for one rounded
row (its mean average precision, PASCAL VOC, other methods), IMAP's table 3 (VSPW) and its rows of CogVideoX-2B but for
one score, and DiffTrack's tables of guidance. Table 2 of IMAP was found in approximate values only.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffusers_concept_maps.errors import ConceptMapsValueError

TRUST = {
    "by eye": "read off the authors' own picture of the table",
    "by eye, inconsistent": "read off the picture, where the average is not that of its parts: one may be misread",
    "second-hand": "quoted by others; the paper itself was not read",
    "disputed": "quoted by others, with another value elsewhere",
}
"""How a score came here, by the mark that its entry has."""


@dataclass(frozen=True)
class Published:
    """The scores of one method on one data set.

    Attributes:
        dataset: as the readers and the results of this package call it.
        method: what made the maps or tracks.
        backbone: the model it was made with; "not named" where the source does not say.
        scores: fractions from 0 to 1, by the names that the results of this package have.
        source: paper, table, and where the values were found.
        trust: one of `TRUST`.
    """

    dataset: str
    method: str
    backbone: str
    scores: dict[str, float]
    source: str
    trust: str

    def __str__(self) -> str:
        scores = "  ".join(f"{name} {score:.3f}" for name, score in self.scores.items())
        return f"{self.method} ({self.backbone})  {scores}  [{self.trust}: {self.source}]"


_ISSUE = "issue 17 of helblazer811/ConceptAttention"
_CONCEPT_ATTENTION = (
    Published(
        "imagenet_segmentation",
        "ConceptAttention",
        "not named",
        {"dataset_pixel_accuracy": 0.83, "dataset_mean_iou": 0.71},
        f"ConceptAttention, arXiv 2502.04320, as rounded in {_ISSUE}",
        "second-hand",
    ),
    Published(
        "imagenet_segmentation",
        "ConceptAttention, public pipeline, by a user",
        "not named",
        {"dataset_pixel_accuracy": 0.62, "dataset_mean_iou": 0.45},
        f"{_ISSUE}, where a user reports what the public pipeline gives",
        "second-hand",
    ),
)

_NOTES = "en.papernotes.org"
_OTHER_NOTES = "notes on version 1 of the paper"
_TABLE_1 = {  # SL, TL, PR, SS, OBJ, mean
    ("ViCLIP", "ViT-H"): (0.33, 0.17, 0.35, 0.29, 0.28, 0.28),
    ("DAAM", "VideoCrafter2"): (0.36, 0.17, 0.38, 0.32, 0.35, 0.32),
    ("ConceptAttention", "CogVideoX-5B"): (0.50, 0.32, 0.51, 0.47, 0.47, 0.45),
    ("IMAP", "CogVideoX-5B"): (0.58, 0.65, 0.64, 0.52, 0.59, 0.60),
    ("ConceptAttention", "HunyuanVideo"): (0.42, 0.26, 0.44, 0.35, 0.34, 0.36),
    ("IMAP", "HunyuanVideo"): (0.60, 0.41, 0.62, 0.50, 0.62, 0.55),
}
_IN_TEXT = {
    ("cross-attention", "CogVideoX-2B"): {"TL": 0.56},
    ("IMAP", "CogVideoX-2B"): {"TL": 0.62},
}
_VERSION_1 = {
    ("cross-attention", "CogVideoX-5B"): {"mean": 0.36},
    ("ConceptAttention", "CogVideoX-5B"): {"mean": 0.45},
    ("IMAP", "CogVideoX-5B"): {"mean": 0.62},
}


def _imap() -> list[Published]:
    keys = ("SL", "TL", "PR", "SS", "OBJ", "mean")
    parts = [
        (
            {who: dict(zip(keys, values, strict=True)) for who, values in _TABLE_1.items()},
            f"IMAP, arXiv 2603.02919, table 1, as given by {_NOTES}",
        ),
        (_IN_TEXT, f"IMAP, arXiv 2603.02919, text on table 1, as given by {_NOTES}"),
        (_VERSION_1, f"IMAP, arXiv 2603.02919, about the values of table 1 by {_OTHER_NOTES}"),
    ]
    differing = ("IMAP", "CogVideoX-5B")  # a mean of 0.60 or 0.62
    return [
        Published("mevis", *who, scores, source, "disputed" if who == differing else "second-hand")
        for table, source in parts
        for who, scores in table.items()
    ]


_TAP_VID = {  # percent within 1, 2, 4, 8, 16 pixels and their mean: Kinetics, then DAVIS
    ("DINO", "ViT-B/16"): "2.8 10.9 33.9 58.2 74.8 36.1 | 2.9 10.7 34.3 59.8 77.0 37.3",
    ("DINOv2-Reg", "ViT-B/14"): "2.8 10.8 32.8 60.6 78.7 37.1 | 3.0 11.7 36.5 67.5 84.1 40.6",
    ("DINOv2", "ViT-B/14"): "3.0 11.4 34.6 63.0 80.3 38.4 | 3.1 12.1 38.7 70.7 85.8 42.1",
    ("DIFT", "SD1.5"): "3.7 14.6 44.6 69.0 77.5 41.9 | 3.5 13.0 39.3 63.1 72.2 38.2",
    ("DIFT", "SD2.1"): "3.7 14.9 45.4 70.9 79.6 42.9 | 3.6 13.3 40.1 65.8 75.7 39.7",
    ("SMTC", "ViT-S/16"): "4.1 15.5 34.2 54.4 72.1 36.1 | 2.6 12.1 29.4 52.5 73.0 33.9",
    ("CRW", "R18"): "5.2 19.4 42.7 62.9 74.3 40.9 | 3.1 13.9 34.7 57.1 70.5 35.9",
    ("Spa-then-Temp", "R50"): "5.3 19.4 41.6 58.9 69.7 39.0 | 3.2 13.8 33.1 53.4 67.5 34.2",
    ("VFS", "R50"): "5.4 20.1 44.6 65.4 76.6 42.4 | 3.5 15.2 37.2 60.8 75.2 38.4",
    ("SVD", "SVD"): "4.3 16.0 37.9 56.3 69.8 36.6 | 3.6 14.6 34.1 55.7 71.4 35.9",
    ("ZeroCo", "CroCo"): "14.5 22.9 35.9 60.4 79.7 42.6 | 4.6 8.8 19.5 44.9 65.6 28.7",
    ("DiffTrack", "HunyuanVideo"): "5.9 22.0 49.1 70.4 80.3 45.5 | 4.4 18.2 44.8 70.1 82.8 44.1",
    ("DiffTrack", "CogVideoX-2B"): "6.2 23.3 51.2 71.2 79.9 46.3 | 4.8 19.4 49.2 73.6 84.3 46.3",
    ("DiffTrack", "CogVideoX-5B"): "6.8 25.9 55.4 74.9 82.7 49.2 | 5.2 20.5 50.7 73.9 84.3 46.9",
}


def _difftrack() -> list[Published]:
    names = [*(f"within_{pixels}" for pixels in (1, 2, 4, 8, 16)), "average_within"]
    source = "DiffTrack, arXiv 2506.17220, TAP-Vid table on its project page (main_quan.png); queries of frame 0 only"
    entries = []
    for who, row in _TAP_VID.items():
        for dataset, part in zip(("tap_vid_kinetics", "tap_vid_davis"), row.split("|"), strict=True):
            values = [round(float(percent) / 100, 3) for percent in part.split()]
            # Each value is off by half of its last digit at most, and so is the mean of the first five.
            consistent = abs(sum(values[:-1]) / 5 - values[-1]) <= 0.001
            trust = "by eye" if consistent else "by eye, inconsistent"
            entries.append(Published(dataset, *who, dict(zip(names, values, strict=True)), source, trust))
    return entries


PUBLISHED: tuple[Published, ...] = (*_CONCEPT_ATTENTION, *_imap(), *_difftrack())
"""All of them, in the order of the tables."""


def published(dataset: str) -> tuple[Published, ...]:
    """The published scores on a data set.

    Raises:
        ConceptMapsValueError: there are none.
    """
    found = tuple(entry for entry in PUBLISHED if entry.dataset == dataset)
    if not found:
        known = ", ".join(sorted({entry.dataset for entry in PUBLISHED}))
        raise ConceptMapsValueError(f"no published scores on {dataset!r}; there are some on {known}")
    return found
