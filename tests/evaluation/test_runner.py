"""Evaluation on a data set: scores by an independent computation, kills, several processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation.moving_shapes import BACKGROUND, arguments, lines, options, write_davis

import diffusers_concept_maps as dcm
from diffusers_concept_maps import cli
from diffusers_concept_maps.evaluation.datasets import Sample, dataset_names, open_dataset
from diffusers_concept_maps.evaluation.protocol import PROTOCOLS, Settings, concepts_of
from diffusers_concept_maps.evaluation.runner import evaluate, seed_of

SETTINGS = Settings(background=BACKGROUND)
CLIPS = 6

KILLED = """
import os, signal, sys
from diffusers_concept_maps import cli
from diffusers_concept_maps.evaluation import records

add = records.Writer.add

def add_some(self, record):
    if self._file.tell() and len(self._path.read_bytes().splitlines()) == 3:
        self._file.write(b'{"sample": "clip-3", "classes": ["backgr')
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, record)

records.Writer.add = add_some
cli.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def pipe() -> Any:
    return dcm.load_shapes_pipeline()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "DAVIS"
    write_davis(folder, CLIPS)
    return folder


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing has disturbed."""
    out = tmp_path_factory.mktemp("whole")
    assert cli.main(arguments(root, out)) == 0
    return out


def encoded(pipe: Any, sample: Sample) -> tuple[np.ndarray, tuple[int, ...]]:
    """Maps of a sample in pixels, as float64, and the label of each concept."""
    concepts, labels = concepts_of(sample.classes, BACKGROUND)
    maps = dcm.encode(pipe, sample.frames, concepts, prompt=sample.caption, seed=seed_of(sample.name, 0))
    return maps.upsample((32, 32), len(sample.frames))[0].double().numpy(), labels


def test_scores_of_several_classes_are_those_of_an_independent_count(pipe: Any, root: Path, whole: Path) -> None:
    names = ["background", *sorted(("red", "green", "blue", "yellow"))]
    table = np.zeros((5, 5), dtype=int)  # truth, prediction
    for sample in open_dataset("davis-2017", root, **options(root)):
        heat, labels = encoded(pipe, sample)
        predicted = np.array(labels)[heat.argmax(0)]
        for truth in range(len(sample.classes)):
            for guess in range(len(sample.classes)):
                place = names.index(sample.classes[truth]), names.index(sample.classes[guess])
                table[place] += ((sample.labels.numpy() == truth) & (predicted == guess)).sum()
    union = table.sum(0) + table.sum(1) - table.diagonal()
    iou = {name: table[i, i] / union[i] for i, name in enumerate(names) if union[i]}
    found = json.loads((whole / "summary.json").read_text())
    scores = found["methods"]["concept_attention"]["segmentation"]
    assert found["classes"] == list(iou)
    assert scores["dataset_iou"] == pytest.approx(iou)
    assert scores["dataset_mean_iou"] == pytest.approx(np.mean(list(iou.values())))
    assert scores["dataset_pixel_accuracy"] == pytest.approx(table.trace() / table.sum())
    assert scores["per_image_average_precision"] is None


def test_scores_of_one_class_are_those_of_an_independent_count(pipe: Any, root: Path, tmp_path: Path) -> None:
    summary = evaluate(pipe, "davis-2016", root, tmp_path, settings=SETTINGS, dataset_options=options(root), limit=3)
    intersection, union, right = np.zeros(2), np.zeros(2), []
    for sample in list(open_dataset("davis-2016", root, **options(root)))[:3]:
        heat, _ = encoded(pipe, sample)
        guess, truth = heat[0] > heat[0].mean(), sample.labels.numpy() == 1
        for label in (0, 1):
            intersection[label] += ((guess == label) & (truth == label)).sum()
            union[label] += ((guess == label) | (truth == label)).sum()
        right.append((guess == truth).mean())
    assert summary is not None
    scores = summary["methods"]["concept_attention"]
    assert scores["segmentation"]["dataset_iou"] == pytest.approx(
        dict(zip(("background", "target"), intersection / union, strict=True))
    )
    assert scores["segmentation"]["per_image_pixel_accuracy"] == pytest.approx(np.mean(right))
    assert scores["video"]["dataset_iou"] == scores["segmentation"]["dataset_iou"]
    assert scores["localization"]["clips"] == 3


def test_every_sample_has_its_line(whole: Path) -> None:
    first, *others = lines(whole)
    assert [first["sample"], *(line["sample"] for line in others)] == [f"clip-{clip}" for clip in range(CLIPS)]
    assert first["concepts"] == [*first["classes"][1:], *BACKGROUND]
    assert first["seed"] == seed_of("clip-0", 0) != seed_of("clip-1", 0)
    assert set(first["methods"]["concept_attention"]) == {"segmentation", "video", "localization"}
    assert set(first["methods"]["concept_attention"]["localization"]) == set(first["classes"][1:])


def test_a_kill_costs_one_sample_at_most(root: Path, whole: Path, tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments(root, tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    path = tmp_path / "samples" / "rank_0.jsonl"
    before = path.read_bytes()
    assert before.endswith(b"backgr")
    assert not (tmp_path / "summary.json").exists()
    assert cli.main(arguments(root, tmp_path)) == 0
    kept = before[: before.rindex(b"\n") + 1]
    assert kept.count(b"\n") == 3
    assert path.read_bytes().startswith(kept)
    assert path.read_bytes() == (whole / "samples" / "rank_0.jsonl").read_bytes()
    assert (tmp_path / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()


def test_what_is_through_is_not_done_again(root: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a sample is done again")

    monkeypatch.setattr("diffusers_concept_maps.evaluation.runner.encode", refuse)
    before = (whole / "summary.json").read_bytes()
    assert cli.main(arguments(root, whole)) == 0
    assert (whole / "summary.json").read_bytes() == before


def test_two_processes_make_the_same_summary(root: Path, whole: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]
    command = [sys.executable, *launch, "-m", "diffusers_concept_maps.cli", *arguments(root, tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    shares = [[line["sample"] for line in lines(tmp_path, rank)] for rank in (0, 1)]
    assert shares == [["clip-0", "clip-2", "clip-4"], ["clip-1", "clip-3", "clip-5"]]
    assert (tmp_path / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()
    assert result.stdout.count("segmentation ") == 1


def test_more_processes_go_on_with_the_work_of_fewer(root: Path, whole: Path, tmp_path: Path) -> None:
    """Process 0 alone finds what two have left."""
    (tmp_path / "samples").mkdir()
    shutil.copy(whole / "run.json", tmp_path)
    own = (whole / "samples" / "rank_0.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "samples" / "rank_0.jsonl").write_text(own[0])
    (tmp_path / "samples" / "rank_1.jsonl").write_text(own[3] + own[5] + own[1][:50])
    assert cli.main(arguments(root, tmp_path)) == 0
    assert [line["sample"] for line in lines(tmp_path)] == ["clip-0", "clip-1", "clip-2", "clip-4"]
    assert (tmp_path / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()


def test_a_limit_can_be_raised(pipe: Any, root: Path, whole: Path, tmp_path: Path) -> None:
    for limit in (2, 4):
        summary = evaluate(
            pipe, "davis-2017", root, tmp_path, settings=SETTINGS, dataset_options=options(root), limit=limit
        )
        assert summary is not None
        assert summary["samples"] == limit
    assert lines(tmp_path) == lines(whole)[:4]


def test_official_counting_is_at_its_size(pipe: Any, root: Path, tmp_path: Path) -> None:
    given = Settings(background=BACKGROUND, parity="concept_attention", blur=True)
    evaluate(pipe, "davis-2016", root, tmp_path, settings=given, dataset_options=options(root), limit=1)
    record = lines(tmp_path)[0]["methods"]["concept_attention"]["segmentation"]
    assert record["pixels"] == 2 * 6 * 224 * 224
    assert record["parity"] == "concept_attention"


def test_a_class_is_no_background() -> None:
    concepts, labels = concepts_of(("background", "person", "dog"), ("background", "person", "tree", "tree"))
    assert concepts == ("person", "dog", "background", "tree")
    assert labels == (1, 2, 0, 0)


def test_every_data_set_has_a_protocol() -> None:
    assert sorted(PROTOCOLS) == list(dataset_names())


def test_long_clips_are_cut_and_counted(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "DAVIS"
    shutil.copytree(root, data)
    for folder, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
        last = data / folder / "480p" / "clip-1" / f"00005.{suffix}"
        shutil.copy(last, last.with_stem("00006"))
    assert cli.main(arguments(data, tmp_path / "out", "--limit", "2")) == 0
    assert "1 clip is longer than what the model takes: the first frames alone are scored" in capsys.readouterr().out
    sources = [line["source"]["source"][0] for line in lines(tmp_path / "out")]
    assert sources == [6, 7]
    assert lines(tmp_path / "out")[1]["methods"]["concept_attention"]["video"]["frames"] == 6
    assert caplog.records == []


def test_random_state_is_left_alone(pipe: Any, root: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    evaluate(pipe, "davis-2017", root, tmp_path, settings=SETTINGS, dataset_options=options(root), limit=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert "WORLD_SIZE" not in os.environ
