"""`concept-maps analyze`: what it writes, from scenes and from a data set on disk, and what it refuses."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_concept_maps.cli import main
from diffusers_concept_maps.evaluation.analysis import analyses


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def davis(root: Path) -> Path:
    """Two videos of a green square on black, as DAVIS 2016 has them."""
    (root / "ImageSets" / "2016").mkdir(parents=True)
    (root / "ImageSets" / "2016" / "val.txt").write_text("bear\ncows\n")
    for first, video in enumerate(("bear", "cows")):
        pictures, masks = root / "JPEGImages" / "480p" / video, root / "Annotations" / "480p" / video
        pictures.mkdir(parents=True)
        masks.mkdir(parents=True)
        for frame in range(6):
            mask = np.zeros((64, 64), np.uint8)
            mask[16:34, 8 * first + 2 * frame : 8 * first + 2 * frame + 18] = 255
            Image.fromarray(mask[..., None] // 255 * np.array([30, 190, 45], np.uint8)).save(
                pictures / f"{frame:05d}.jpg", quality=95
            )
            Image.fromarray(mask).save(masks / f"{frame:05d}.png")
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


def test_a_data_set_on_disk_is_analyzed(tmp_path: Path) -> None:
    root, out = davis(tmp_path / "DAVIS"), tmp_path / "out"
    source = ["--dataset", "davis-2016", "--root", str(root), "--size", "32", "32", "--noise-level", "0.6"]
    assert main(["analyze", "layers-steps", *source, "--others", "background", "red", "--out", str(out)]) == 0
    found = rows(out / "layers-steps.csv")
    assert [row["layer"] for row in found] == list("01234")
    assert {row["n"] for row in found} == {"2"}
    assert all(float(row["chance"]) == pytest.approx(18 * 18 / 64**2, abs=1e-5) for row in found)
    assert max(float(row["score"]) for row in found) > 3 * 18 * 18 / 64**2


def test_help_names_every_analysis(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["analyze", "--help"])
    assert f"one of {', '.join(analyses())}" in " ".join(capsys.readouterr().out.split())


def test_a_file_in_the_way_is_found_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("mine")
    assert main(["analyze", "heads", "--limit", "1", "--out", str(tmp_path / "out")]) == 2
    assert "which is a file; expected a folder" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


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
