"""Evaluation on a data set: what is refused, what fails, and the judge."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation.moving_shapes import BACKGROUND, arguments, lines, options, write_davis
from PIL import Image

import diffusers_concept_maps as dcm
from diffusers_concept_maps import ConceptMapsError, ConceptMapsValueError, cli
from diffusers_concept_maps.evaluation.protocol import PROTOCOLS, Settings
from diffusers_concept_maps.evaluation.runner import evaluate

SETTINGS = Settings(background=BACKGROUND)
RATINGS = {"SL": 4, "TL": 2, "PR": 5, "SS": 3, "OBJ": 1}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return dcm.load_shapes_pipeline()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "DAVIS"
    write_davis(folder, 6)
    return folder


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing has disturbed."""
    out = tmp_path_factory.mktemp("whole")
    assert cli.main(arguments(root, out)) == 0
    return out


def test_other_settings_are_no_resumption(root: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = ["--noise-level", "0.3", "--seed", "1"]
    assert cli.main(arguments(root, whole, *changed)) == 2
    error = capsys.readouterr().err
    assert "settings.noise_levels was [0.5] and is now [0.3]; settings.seed was 0 and is now 1" in error
    assert "resume it with its own, or choose another folder" in error
    assert cli.main(arguments(root, whole, dataset="davis-2016")) == 2
    assert 'dataset was "davis-2017" and is now "davis-2016"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--dataset", "davis-2017", "--root", ".", "--mode", "strided"], "--mode would not be read with --dataset"),
        (["--tap-vid", "davis", "--root", ".", "--methods", "imap"], "--methods would not be read with --tap-vid"),
        (
            ["--suite", "shapes", "--limit", "3", "--steps", "2"],
            "--limit, --steps would not be read with --suite shapes",
        ),
        (["--suite", "correspondence", "--seed", "3"], "--seed would not be read with --suite correspondence"),
    ],
)
def test_arguments_that_would_not_be_read_are_refused(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", *given]) == 2
    assert message in capsys.readouterr().err


def test_other_names_of_the_objects_are_another_run(
    root: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file of categories counts by what is in it, wherever it is."""
    data, out = tmp_path / "DAVIS", tmp_path / "out"
    shutil.copytree(root, data)
    shutil.copytree(whole, out)
    assert cli.main(arguments(data, out)) == 0
    named = data / "categories.json"
    named.write_text(named.read_text().replace("red", "blue"))
    assert cli.main(arguments(data, out)) == 2
    assert "dataset_options.categories was" in capsys.readouterr().err


def test_a_broken_sample_is_reported_and_tried_again(
    root: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "DAVIS", tmp_path / "out"
    shutil.copytree(root, data)
    shutil.copy(data / "categories.json", tmp_path)
    frame = data / "JPEGImages" / "480p" / "clip-2" / "00003.jpg"
    content = frame.read_bytes()
    frame.write_bytes(b"no picture")
    assert cli.main(arguments(data, out)) == 1
    captured = capsys.readouterr()
    assert "davis-2017: 5 of 6 samples scored" in captured.out
    assert re.search(r"1 sample failed:\n  clip-2: ConceptMapsError: .*00003\.jpg", captured.out)
    assert "the same command tries what failed again" in captured.err
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["failed"]) == ["clip-2"]
    assert summary["methods"]["concept_attention"]["segmentation"]["samples"] == 5
    frame.write_bytes(content)
    assert cli.main(arguments(data, out)) == 0
    found, expected = (json.loads((folder / "summary.json").read_text()) for folder in (out, whole))
    assert found == expected
    assert [line["sample"] for line in lines(out)].count("clip-2") == 2


def test_a_sample_without_a_class_is_skipped(pipe: Any, root: Path, tmp_path: Path) -> None:
    data = tmp_path / "DAVIS"
    shutil.copytree(root, data)
    for path in (data / "Annotations" / "480p" / "clip-0").iterdir():
        shutil.copy(_empty(tmp_path), path)
    summary = evaluate(
        pipe, "davis-2017", data, tmp_path / "out", settings=SETTINGS, dataset_options=options(root), limit=2
    )
    assert summary is not None
    assert summary["skipped"] == {"clip-0": "it shows no class but the background"}
    assert (summary["samples"], summary["scored"], summary["failed"]) == (2, 1, {})


def _empty(folder: Path) -> Path:
    path = folder / "empty.png"
    Image.fromarray(np.zeros((32, 32), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": Settings(("nothing",))}, "nothing"),
        ({"settings": Settings(layers=(99,))}, "99"),
        (
            {"settings": Settings(background=BACKGROUND, upsampling="cubic")},
            "mode is 'cubic'; expected one of bilinear",
        ),
        (
            {"settings": Settings(background=BACKGROUND, temporal="cubic")},
            "temporal is 'cubic'; expected one of nearest",
        ),
        ({"limit": 0}, "limit is 0; expected at least 1"),
        ({"dataset": "imagenet"}, "there is no data set 'imagenet'; expected one of davis-2016"),
        ({"dataset_options": {"short_names": True}}, "davis-2017 has no option short_names"),
    ],
)
def test_mistakes_are_found_before_the_first_sample(
    change: dict[str, Any], message: str, pipe: Any, root: Path, tmp_path: Path
) -> None:
    given = {"dataset": "davis-2017", "root": root, "out": tmp_path / "out"} | change
    with pytest.raises(ConceptMapsValueError, match=message):
        evaluate(pipe, **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_levels": (1.5,)}, "noise_level is 1.5"),
        ({"num_samples": 0}, "num_samples is 0; expected at least 1"),
        ({"background": ()}, "there are no background concepts"),
        ({"blur": True}, "expected it with parity"),
        ({"parity": "imap"}, "parity 'imap' is unknown"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConceptMapsValueError, match=message):
        Settings(**change)


def test_suite_and_dataset_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--suite", "shapes", "--dataset", "mevis"], []):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["evaluate", *given])
    assert "not allowed with argument --suite" in capsys.readouterr().err


def test_options_of_the_suite_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "--dataset", "mevis", "--root", ".", "--guidance"]) == 2
    assert "--guidance is there with --dataset; expected it with --suite shapes" in capsys.readouterr().err


def test_a_dataset_needs_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "--dataset", "mevis"]) == 2
    assert "--dataset mevis is there without --root" in capsys.readouterr().err
    assert cli.main(["evaluate", "--dataset", "mevis", "--root", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


class JudgeHandler(BaseHTTPRequestHandler):
    """Rates everything alike, and counts."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked += 1  # type: ignore[attr-defined]
        body = json.dumps({"choices": [{"message": {"role": "assistant", "content": json.dumps(RATINGS)}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("no_proxy", "*")
    with HTTPServer(("127.0.0.1", 0), JudgeHandler) as server:
        server.asked = 0  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_a_judge_is_asked_where_one_is_named(
    root: Path, whole: Path, tmp_path: Path, server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{server.server_port}/v1"
    given = arguments(root, tmp_path, "--judge-url", url, "--judge-model", "eyes", "--limit", "2")
    assert cli.main(given) == 0
    objects = sum(len(line["classes"]) - 1 for line in lines(tmp_path))
    assert server.asked == objects > 0
    rated = json.loads((tmp_path / "summary.json").read_text())
    scores = rated["methods"]["concept_attention"]["judge"]
    assert scores["samples"] == objects
    assert {key: scores[key] for key in RATINGS} == {key: (value - 1) / 4 for key, value in RATINGS.items()}
    assert "eyes" in rated["run"]["judge"]
    assert "judge " in capsys.readouterr().out
    assert "judge" not in lines(whole)[0]["methods"]["concept_attention"]


def test_a_judge_rates_no_images(pipe: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = PROTOCOLS["davis-2017"].__class__("argmax", is_video=False)
    monkeypatch.setitem(PROTOCOLS, "davis-2017", images)
    with pytest.raises(ConceptMapsValueError, match="a judge rates maps of videos, and davis-2017 has images"):
        evaluate(pipe, "davis-2017", root, tmp_path, judge=object())  # type: ignore[arg-type]


def test_samples_that_no_process_has_written_are_an_error(
    pipe: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers_concept_maps.evaluation.runner._do", lambda *arguments: None)
    with pytest.raises(ConceptMapsError, match=r"6 of 6 samples have no result in .*, such as 'clip-0'"):
        evaluate(pipe, "davis-2017", root, tmp_path, dataset_options=options(root), settings=SETTINGS)
