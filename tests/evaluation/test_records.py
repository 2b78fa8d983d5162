"""The folder of a run, the processes of a launch, and the table: what they refuse and what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffusers_concept_maps import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.evaluation.processes import Process, meeting, this_process
from diffusers_concept_maps.evaluation.protocol import BACKGROUND_CONCEPTS, by_class_name
from diffusers_concept_maps.evaluation.records import Writer, open_run, read_records
from diffusers_concept_maps.evaluation.summary import summarize, table

GONE = """
import sys
from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.evaluation.processes import meeting, this_process

process = this_process()
with meeting(process) as meet:
    meet()
    if process.rank == 1:
        sys.exit(3)
    try:
        meet()
    except ConceptMapsError as error:
        print(error)
"""


OFFICIAL = {"parity": "concept_attention", "background": BACKGROUND_CONCEPTS}


def run_of(dataset: str, **changes: Any) -> dict[str, Any]:
    settings = {"parity": None, "background": BACKGROUND_CONCEPTS}
    return {"dataset": dataset, "model": "m", "judge": None, "samples": 0, "settings": settings} | changes


def test_records_come_back(tmp_path: Path) -> None:
    open_run(tmp_path, {"a": (1, 2)})
    with Writer(tmp_path, 0) as writer:
        writer.add({"sample": "x", "error": "broken"})
        writer.add({"sample": "y", "score": 0.1})
    with Writer(tmp_path, 1) as writer:
        writer.add({"sample": "x", "score": 0.2})
        writer.add({"sample": "y", "error": "broken"})
    assert read_records(tmp_path) == {"x": {"sample": "x", "score": 0.2}, "y": {"sample": "y", "score": 0.1}}
    open_run(tmp_path, {"a": [1, 2]})


def test_a_line_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    open_run(tmp_path, {})
    path = tmp_path / "samples" / "rank_0.jsonl"
    path.write_bytes(b'{"sample": "x"}\n{"sample": "y"}')
    assert set(read_records(tmp_path)) == {"x"}
    with Writer(tmp_path, 0) as writer:
        writer.add({"sample": "z"})
    assert path.read_bytes() == b'{"sample": "x"}\n{"sample": "z"}\n'


@pytest.mark.parametrize("line", ["[]", "{}", "nothing", '{"sample": "x"'])
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    open_run(tmp_path, {})
    (tmp_path / "samples" / "rank_0.jsonl").write_text(f'{{"sample": "a"}}\n{line}\n')
    with pytest.raises(ConceptMapsError, match=r"line 2 of '.*rank_0.jsonl' is no result of a sample"):
        read_records(tmp_path)


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    open_run(tmp_path, {"a": {"b": 1}, "c": 2})
    with pytest.raises(ConceptMapsError, match=r"a\.b was 1 and is now 3; c was 2 and is now null; d was null and is"):
        open_run(tmp_path, {"a": {"b": 3}, "d": 4})
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ConceptMapsError, match=r"run.json' is no JSON"):
        open_run(tmp_path, {})
    (tmp_path / "run.json").write_text("1")
    with pytest.raises(ConceptMapsError, match="all was 1 and is now {}"):
        open_run(tmp_path, {})
    (tmp_path / "run.json").unlink()
    (tmp_path / "samples" / "rank_0.jsonl").touch()
    with pytest.raises(ConceptMapsError, match="nothing says how they were made"):
        open_run(tmp_path, {})


def test_processes_are_those_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert this_process() == Process(0, 1, 0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConceptMapsValueError, match="do not describe a process"):
        this_process()
    monkeypatch.setenv("RANK", "3")
    assert this_process() == Process(3, 4, 3)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert this_process() == Process(3, 4, 1)
    with (
        pytest.raises(ConceptMapsError, match="4 processes and no MASTER_ADDR and MASTER_PORT"),
        meeting(Process(3, 4)),
    ):
        pass
    with pytest.raises(ConceptMapsValueError, match="process 4 of 4 with local rank 0"):
        Process(4, 4)


def test_names_are_dealt_in_turn() -> None:
    names = tuple("abcdefg")
    assert [Process(rank, 3).deal(names) for rank in range(3)] == [tuple("adg"), tuple("be"), tuple("cf")]


def test_a_process_that_is_gone_is_told(tmp_path: Path) -> None:
    launch = [sys.executable, "-c", GONE]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    other = subprocess.Popen(launch, env=os.environ | place | {"RANK": "1"})
    first = subprocess.run(
        launch, env=os.environ | place | {"RANK": "0"}, capture_output=True, text=True, timeout=200, check=False
    )
    assert other.wait(200) == 3
    assert "another of the 2 processes has ended early" in first.stdout, first.stderr


def _free_port() -> str:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_counts_by_name() -> None:
    record = {"intersection": [5, 1, 0], "union": [6, 2, 0], "classes": 3, "pixels": 7}
    found = by_class_name(record, ("background", "dog"), ("background", "cat", "dog"))
    assert found == {"intersection": [5, 0, 1], "union": [6, 0, 2], "classes": 3, "pixels": 7}


def test_published_scores_say_what_keeps_them_from_being_compared() -> None:
    records = {"x": {"sample": "x", "error": "E: gone"}}
    summary = summarize(run_of("imagenet-segmentation"), ["x"], records)
    assert summary["methods"] == {}
    assert [entry["not_comparable"] for entry in summary["published"]] == [
        ["it was counted as with --parity concept_attention, which this run was not"]
    ] * 2
    text = "\n".join(table(summary))
    assert "ConceptAttention (not named)  dataset_pixel_accuracy 0.830  dataset_mean_iou 0.710" in text
    assert "not comparable: it was counted" in text
    assert "1 sample failed:\n  x: E: gone" in text
    official = run_of("imagenet-segmentation", settings=OFFICIAL)
    assert all(entry["not_comparable"] == [] for entry in summarize(official, ["x"], records)["published"])
    assert _reasons("imagenet-segmentation", settings=OFFICIAL | {"background": ["tree"]}, samples=7) == (
        "it had the concepts of the background background, floor, tree, person, grass, face",
        "it is of all samples, and this run of 0 of 7",
    )
    for judge, reason in ((None, "this run had none"), ("eyes", "its judge was another one than eyes")):
        assert reason in _reasons("mevis", judge=judge)[0]
    assert summarize(run_of("vspw"), ["x"], records)["published"] == []


def _reasons(dataset: str, **changes: Any) -> tuple[str, ...]:
    """What keeps every published row from being compared, the same for all, where the only sample has failed."""
    summary = summarize(run_of(dataset, **changes), ["x"], {"x": {"sample": "x", "error": "E: gone"}})
    (reasons,) = {tuple(entry["not_comparable"]) for entry in summary["published"]}
    return reasons


def test_a_long_list_of_failures_is_cut() -> None:
    records = {f"{number:02}": {"sample": f"{number:02}", "error": "e\n e"} for number in range(25)}
    lines = list(table(summarize(run_of("vspw"), list(records), records)))
    assert lines[-2:] == ["  19: e e", "  and 5 more"]
    assert json.dumps(lines)
