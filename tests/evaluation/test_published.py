"""Published scores: complete entries, the names of one's own results, and averages that are those of their parts."""

from __future__ import annotations

from collections import Counter

import pytest

from diffusers_concept_maps import ConceptMapsValueError
from diffusers_concept_maps.evaluation.judge import CRITERIA
from diffusers_concept_maps.evaluation.published import PUBLISHED, TRUST, Published, published

NAMES = {
    "imagenet_segmentation": {"dataset_pixel_accuracy", "dataset_mean_iou"},
    "mevis": {*CRITERIA, "mean"},
    "tap_vid_davis": {"average_within", *(f"within_{2**power}" for power in range(5))},
    "tap_vid_kinetics": {"average_within", *(f"within_{2**power}" for power in range(5))},
}
SOURCES = {
    "imagenet_segmentation": "ConceptAttention",
    "mevis": "IMAP, arXiv 2603.02919",
    "tap_vid_davis": "DiffTrack, arXiv 2506.17220, TAP-Vid table",
    "tap_vid_kinetics": "DiffTrack, arXiv 2506.17220, TAP-Vid table",
}


def value(dataset: str, method: str, backbone: str, name: str) -> list[float]:
    rows = [entry for entry in published(dataset) if (entry.method, entry.backbone) == (method, backbone)]
    return [entry.scores[name] for entry in rows if name in entry.scores]


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: f"{entry.dataset}-{entry.method}-{entry.backbone}")
def test_every_entry_is_complete(entry: Published) -> None:
    assert SOURCES[entry.dataset] in entry.source
    assert entry.trust in TRUST
    assert entry.method
    assert entry.backbone
    assert entry.scores
    assert set(entry.scores) <= NAMES[entry.dataset]
    assert all(0 < score < 1 for score in entry.scores.values())
    assert str(entry).endswith(f"[{entry.trust}: {entry.source}]")


def test_how_many_there_are() -> None:
    counts = Counter(entry.dataset for entry in PUBLISHED)
    assert counts == {"imagenet_segmentation": 2, "mevis": 11, "tap_vid_kinetics": 14, "tap_vid_davis": 14}
    assert set(TRUST) == {entry.trust for entry in PUBLISHED}


def test_averages_are_those_of_their_parts() -> None:
    """A slip of the pen would show: averages were published beside their parts. Two do not agree, and say so."""
    inconsistent = []
    for entry in PUBLISHED:
        for average, half_a_digit in (("mean", 0.005), ("average_within", 0.0005)):
            parts = [score for name, score in entry.scores.items() if name != average]
            if average in entry.scores and parts:
                difference = abs(entry.scores[average] - sum(parts) / len(parts))
                inconsistent += [entry] if difference > 2 * half_a_digit else []
    assert inconsistent == [entry for entry in PUBLISHED if entry.trust == "by eye, inconsistent"]
    rows = [(entry.dataset, entry.method) for entry in inconsistent]
    assert rows == [("tap_vid_davis", "DINO"), ("tap_vid_kinetics", "SVD")]


def test_some_values() -> None:
    assert value("tap_vid_davis", "DiffTrack", "CogVideoX-5B", "average_within") == [0.469]
    assert value("tap_vid_kinetics", "DiffTrack", "CogVideoX-2B", "within_4") == [0.512]
    assert value("tap_vid_kinetics", "ZeroCo", "CroCo", "within_1") == [0.145]
    assert value("mevis", "IMAP", "CogVideoX-5B", "mean") == [0.60, 0.62]
    assert value("mevis", "IMAP", "CogVideoX-2B", "TL") == [0.62]
    assert value("imagenet_segmentation", "ConceptAttention", "not named", "dataset_mean_iou") == [0.71]


def test_what_disagrees_says_so() -> None:
    disputed = [(entry.method, entry.backbone) for entry in PUBLISHED if entry.trust == "disputed"]
    assert disputed == [("IMAP", "CogVideoX-5B")] * 2


def test_data_set_without_published_scores() -> None:
    with pytest.raises(ConceptMapsValueError, match="no published scores on 'vspw'; there are some on imagenet_seg"):
        published("vspw")
