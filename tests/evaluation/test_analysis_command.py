"""`concept-maps analyze`: what it writes, from scenes and from a data set on disk, and what it refuses."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_concept_maps.cli import main


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def davis(root: Path) -> Path:
    """Two videos of a green square on black, as DAVIS 2016 has them."""
    for folder in ("JPEGImages/480p", "Annotations/480p"):
        for video in ("bear", "cows"):
            (root / folder / video).mkdir(parents=True)
    for shift, video in enumerate(("bear", "cows")):
        for frame in range(6):
            picture, mask = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)
            picture[8:16, 4 * shift + frame : 4 * shift + frame + 9] = (30, 190, 45)
            mask[8:16, 4 * shift + frame : 4 * shift + frame + 9] = 255
            Image.fromarray(picture).save(root / "JPEGImages/480p" / video / f"{frame:05d}.jpg", quality=95)
            Image.fromarray(mask).save(root / "Annotations/480p" / video / f"{frame:05d}.png")
    (root / "ImageSets/480p").mkdir(parents=True)
    lines = [
        f"/JPEGImages/480p/{video}/{frame:05d}.jpg /Annotations/480p/{video}/{frame:05d}.png"
        for video in ("bear", "cows")
        for frame in range(6)
    ]
    (root / "ImageSets/480p/val.txt").write_text("\n".join(lines) + "\n")
    return root


def test_scenes_are_analyzed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found"
    assert main(["analyze", "heads", "--limit", "2", "--word", "motion", "--out", str(out)]) == 0
    assert sorted(file.name for file in out.iterdir()) == ["heads.csv", "heads.png"]
    assert {row["n"] for row in rows(out / "heads.csv")} == {"2"}
    printed = capsys.readouterr().out
    assert "over 2 clips: score " in printed
    assert f"written to {out}" in printed


def test_the_levels_are_those_that_are_asked_for(tmp_path: Path) -> None:
    arguments = ["analyze", "layers-steps", "--limit", "1", "--noise-level", "0.3", "0.6", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert {row["noise_level"] for row in rows(tmp_path / "layers-steps.csv")} == {"0.3", "0.6"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["spectra"], "there is no analysis 'spectra'; expected one of ablations"),
        (["heads", "--score", "auc"], "unknown score 'auc'"),
        (["heads", "--word", "size"], "unknown word 'size'"),
        (["heads", "--root", "."], "--root is given, but the scenes of shapes are drawn"),
        (["heads", "--dataset", "davis"], "needs the folder it is in; pass --root DIR"),
        (["heads", "--dataset", "cifar", "--root", "."], "there is no data set 'cifar'"),
        (["heads", "--noise-level", "0"], "noise_level"),
        (["heads", "--method", "nothing", "--limit", "1"], "nothing"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not (tmp_path / "out").exists()
