"""Analyses of the embedded model on a few scenes: their numbers against computations of their own, and their files."""

from __future__ import annotations

import csv
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline
from sklearn.metrics import average_precision_score, calinski_harabasz_score, jaccard_score

from diffusers_concept_maps import ConceptMapsError, ConceptMapsValueError, load_shapes_pipeline
from diffusers_concept_maps.evaluation.analysis import (
    Settings,
    Subject,
    Table,
    _reader,
    ablations,
    analyses,
    dataset_subjects,
    eigenvalues,
    find_analysis,
    separability,
    shapes_subjects,
)
from diffusers_concept_maps.evaluation.analysis._scores import score_map
from diffusers_concept_maps.evaluation.datasets import Sample

CALL = {"max_sequence_length": 20}
LEVELS = (0.4, 0.7)


@pytest.fixture(scope="module")
def pipe() -> CogVideoXPipeline:
    return load_shapes_pipeline()


@pytest.fixture(scope="module")
def subjects() -> list[Subject]:
    return shapes_subjects(3, seed=4)


def settings(**options: Any) -> Settings:
    return Settings(**({"noise_levels": (0.7,), "call": CALL} | options))


def by_name(table: Table) -> list[dict[str, Any]]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def pixels(maps: torch.Tensor) -> np.ndarray:
    """Maps `[..., 8, 8]` at 32 x 32 pixels: every token is 4 x 4 of them."""
    return maps.double().numpy().repeat(4, -2).repeat(4, -1)


def test_every_analysis_is_found() -> None:
    assert list(analyses()) == ["ablations", "eigenvalues", "heads", "layers-steps", "separability"]
    with pytest.raises(ConceptMapsValueError, match="no analysis 'spectra'; expected one of ablations, eigenvalues"):
        find_analysis("spectra")


def test_two_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers_concept_maps.evaluation.analysis import heads

    monkeypatch.setattr(heads, "ANALYSIS", ablations.ANALYSIS)
    with pytest.raises(ConceptMapsError, match="two analyses are named 'ablations'"):
        analyses()


@pytest.mark.parametrize("score", ["average_precision", "mean_iou", "temporal_concordance"])
def test_scores_are_scikit_learns(score: str) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 2, size=(6, 8, 8))
    labels[4:][labels[4:] == 1] = 0
    heat = rng.normal(size=labels.shape) + labels
    kept, truth = labels >= 0, labels == 1
    found, chance = score_map(torch.from_numpy(heat), torch.from_numpy(labels), score)
    if score == "average_precision":
        assert found == pytest.approx(average_precision_score(truth[kept], heat[kept]), abs=1e-12)
        assert chance == pytest.approx(truth[kept].mean(), abs=1e-12)
    elif score == "mean_iou":
        guess = (heat > heat.mean())[kept]
        expected = jaccard_score(truth[kept], guess, average=None).mean()
        assert found == pytest.approx(expected, abs=1e-12)
        drawn = [jaccard_score(truth[kept], rng.permutation(guess), average=None).mean() for _ in range(200)]
        assert chance == pytest.approx(np.mean(drawn), abs=0.01)
    else:
        loud = np.array([frame[own].mean() for frame, own in zip(heat, kept, strict=True)])
        assert found == np.mean([loud[a] > loud[b] for a in range(4) for b in (4, 5)])
        assert chance == 0.5


def test_what_is_not_there_has_no_score() -> None:
    heat, labels = torch.rand(2, 4, 4, dtype=torch.float64), torch.zeros(2, 4, 4, dtype=torch.int64)
    assert np.isnan(score_map(heat, labels, "average_precision")).all()
    assert np.isnan(score_map(heat * torch.nan, labels + 1, "average_precision")).all()


def test_layers_and_levels_are_those_of_the_maps(pipe: CogVideoXPipeline, subjects: list[Subject]) -> None:
    asked = settings(noise_levels=LEVELS)
    findings = find_analysis("layers-steps").run(pipe, subjects, asked)
    rows = by_name(findings.tables["layers-steps"])
    maps = [pixels(asked.read(pipe, subject, detail=("layer", "step")).detail()) for subject in subjects]
    assert len(rows) == 5 * 2
    for row, (layer, level) in zip(rows, np.ndindex(5, 2), strict=True):
        assert (row["layer"], row["noise_level"], row["n"]) == (layer, LEVELS[level], 3)
        for column, concept in (("score", 0), ("wrong_concept", 1)):
            expected = np.mean(
                [
                    average_precision_score(subject.labels.numpy().ravel(), own[layer, level, 0, concept].ravel())
                    for subject, own in zip(subjects, maps, strict=True)
                ]
            )
            assert row[column] == pytest.approx(expected, abs=1e-12)
        assert row["low"] <= row["score"] <= row["high"]
        assert row["chance"] == pytest.approx(np.mean([float(s.labels.double().mean()) for s in subjects]), abs=1e-12)


def test_shuffled_masks_are_at_chance(pipe: CogVideoXPipeline, subjects: list[Subject]) -> None:
    rows = by_name(find_analysis("heads").run(pipe, subjects, settings()).tables["heads"])
    assert [(row["layer"], row["head"]) for row in rows] == list(np.ndindex(5, 4))
    assert all(abs(row["shuffled_masks"] - row["chance"]) < 0.02 for row in rows)
    assert max(row["score"] for row in rows) > 3 * rows[0]["chance"]


class _Outputs:
    """Keeps the attention outputs of the video tokens `[H, N, D]` of every layer."""

    def __init__(self, pipe: CogVideoXPipeline) -> None:
        self.seen: list[torch.Tensor] = []
        self._hooks = [
            block.attn1.to_out[0].register_forward_pre_hook(self._keep)
            for block in pipe.transformer.transformer_blocks
        ]

    def _keep(self, module: Any, args: tuple[torch.Tensor]) -> None:
        if args[0].shape[1] > 20 + 384 - 1:  # not the concepts
            self.seen.append(args[0][0, 20:].unflatten(-1, (4, -1)).transpose(0, 1).double())

    def __enter__(self) -> list[torch.Tensor]:
        return self.seen

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()


def test_separability_is_scikit_learns(pipe: CogVideoXPipeline, subjects: list[Subject]) -> None:
    with _Outputs(pipe) as seen:
        findings = separability.run(pipe, subjects, settings())
    points = by_name(findings.tables["separability-heads"])
    frames = np.arange(384) // 64
    expected = np.array([[calinski_harabasz_score(head, frames) for head in layer.numpy()] for layer in seen])
    expected = expected.reshape(3, 5, 4).mean(0)
    found = np.array([row["calinski_harabasz"] for row in points]).reshape(5, 4)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    rows = by_name(findings.tables["separability"])
    scores = np.array([row["score"] for row in points])
    assert rows[0]["n"] == 20
    assert rows[0]["pearson"] == pytest.approx(np.corrcoef(found.ravel(), scores)[0, 1], abs=1e-9)
    assert [row["n"] for row in rows[1:6]] == [4] * 5
    assert [(row["layer"], row["head"], row["n"]) for row in rows[6:]] == [(*p, 3) for p in np.ndindex(5, 4)]


def test_separability_needs_frames(pipe: CogVideoXPipeline, subjects: list[Subject]) -> None:
    with pytest.raises(ConceptMapsError, match="one latent frame"):
        separability.run(pipe, subjects[:1], settings(num_frames=1))


@pytest.mark.parametrize("tokens", ["image", "joint"])
@pytest.mark.parametrize("matrix", ["head", "mean"])
def test_eigenvalues_are_those_of_the_models_attention(
    pipe: CogVideoXPipeline, subjects: list[Subject], matrix: str, tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []

    def keep(transition: Any, **options: Any) -> Any:
        query, key = transition.query.double(), transition.key.double()
        kept.append((query @ key.mT / query.shape[-1] ** 0.5).softmax(-1))
        return original(transition, **options)

    original = eigenvalues.second_eigenvalue
    monkeypatch.setattr(eigenvalues, "second_eigenvalue", keep)
    found = eigenvalues.read_eigenvalues(pipe, subjects[0], settings(matrix=matrix, tokens=tokens))
    assert {len(each[0]) for each in kept} == {384 + 20 * (tokens == "joint")}
    matrices = torch.stack(kept)  # [layer, head, N, N]
    matrices = matrices if matrix == "head" else matrices.mean(1, keepdim=True)
    expected = torch.linalg.eigvals(matrices).abs().sort(descending=True).values[..., 1]
    assert bool(found.converged.all())
    torch.testing.assert_close(found.modulus[0], expected, rtol=0, atol=5e-3)


def test_eigenvalues_leave_the_pipeline_as_it_was(pipe: CogVideoXPipeline, subjects: list[Subject]) -> None:
    before = dict(pipe.transformer.attn_processors)
    findings = eigenvalues.run(pipe, subjects[:2], settings())
    assert all(pipe.transformer.attn_processors[name] is processor for name, processor in before.items())
    rows = by_name(findings.tables["eigenvalues"])
    assert [(row["layer"], row["head"]) for row in rows] == list(np.ndindex(5, 4))
    assert all(0 <= row["modulus"] <= 1.001 and row["unconverged"] == 0 for row in rows)


def test_another_attention_than_softmax_is_refused() -> None:
    query, key, value = torch.randn(3, 2, 10, 8, generator=torch.Generator().manual_seed(0))
    linear = query.relu() @ (key.relu().mT @ value)
    with pytest.raises(ConceptMapsError, match="layer 7 does not attend by a softmax"):
        _reader.check_softmax(query, key, value, linear, None, 7)
    right = (query @ key.mT / 8**0.5).softmax(-1) @ value
    _reader.check_softmax(query, key, value, right, None, 7)


def test_ablations_are_the_arguments_of_encode(pipe: CogVideoXPipeline, subjects: list[Subject]) -> None:
    asked = settings()
    rows = by_name(ablations.run(pipe, subjects, asked).tables["ablations"])
    named = {(row["ablation"], row["setting"], row["concept"], row["score"]): row for row in rows}
    assert len(named) == (4 + 3) * 2 * 4
    for ablation, setting, options in (
        ("reads", "image", {"reads": "image"}),
        ("reads", "none", {"reads": "none"}),
        ("space", "query_key", {"space": "query_key"}),
        ("space", "output", {}),
    ):
        ious, precisions = [], []
        for subject in subjects:
            heat = pixels(asked.read(pipe, subject, **options).get())[0]
            truth = subject.labels.numpy().ravel()
            ious.append(jaccard_score(truth, (heat[0] > heat[0].mean()).ravel(), average=None).mean())
            precisions.append(average_precision_score(truth, heat[0].ravel()))
        assert named[ablation, setting, "target", "mean_iou"]["mean"] == pytest.approx(np.mean(ious), abs=1e-9)
        found = named[ablation, setting, "target", "foreground_average_precision"]
        assert found["mean"] == pytest.approx(np.mean(precisions), abs=1e-9)
        assert found["n"] == 3
    both = [named[name]["mean"] for name in named if name[:2] == ("reads", "both")]
    assert both == [named[name]["mean"] for name in named if name[:2] == ("space", "output")]


def test_ablations_are_of_one_method(pipe: CogVideoXPipeline, subjects: list[Subject]) -> None:
    with pytest.raises(ConceptMapsValueError, match="method is 'gramcol'; expected 'concept_attention'"):
        ablations.run(pipe, subjects, settings(method="gramcol"))


@pytest.mark.parametrize("name", ["heads", "ablations", "separability", "eigenvalues", "layers-steps"])
def test_files_are_tables_and_pictures(
    name: str, pipe: CogVideoXPipeline, subjects: list[Subject], tmp_path: Path
) -> None:
    findings = find_analysis(name).run(pipe, subjects, settings())
    findings.write(tmp_path)
    with (tmp_path / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(findings.tables[name].rows)
    picture = (tmp_path / f"{name}.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", picture[16:24])) > 300
    assert findings.summary
    assert (tmp_path / "ablations.md").exists() == (name == "ablations")
    assert not list(tmp_path.glob(".*"))


def test_the_same_seed_gives_the_same_numbers(pipe: CogVideoXPipeline) -> None:
    first, second = (
        find_analysis("heads").run(pipe, shapes_subjects(2, seed=9), settings()).tables["heads"].rows for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("word", ["color", "shape", "motion"])
def test_scenes_differ_in_the_word_that_names_the_target(word: str) -> None:
    found = shapes_subjects(5, word=word, seed=2)
    for subject in found:
        target, wrong, background = subject.concepts
        assert target != wrong
        assert background == "background"
        assert subject.caption.index(target) < subject.caption.rindex(wrong)
        assert bool((subject.labels == 1).any())
    assert [subject.name for subject in found] == [f"shapes-{word}-{i}" for i in range(5)]


class _Samples:
    name = "samples"

    def __init__(self, *samples: Sample) -> None:
        self._samples = {sample.name: sample for sample in samples}

    def names(self) -> tuple[str, ...]:
        return tuple(self._samples)

    def read(self, name: str) -> Sample:
        return self._samples[name]


def sample(name: str, values: list[int]) -> Sample:
    labels = torch.tensor(values).view(1, 2, 2)
    return Sample(name, torch.zeros(1, 3, 2, 2, dtype=torch.uint8), labels, ("background", "cat", "dog"), "a dog")


def test_the_first_class_of_a_sample_is_the_target() -> None:
    data: Any = _Samples(sample("a", [0, 0, -1, 0]), sample("b", [0, 2, -1, 2]), sample("c", [1, 2, 0, 0]))
    first, second = dataset_subjects(data, others=("background",))
    assert first.concepts == ("dog", "background")
    assert first.labels.flatten().tolist() == [0, 1, -1, 1]
    assert second.concepts == ("cat", "dog", "background")
    assert second.labels.flatten().tolist() == [1, 0, 0, 0]
    assert [one.name for one in dataset_subjects(data, 1)] == ["b"]
    with pytest.raises(ConceptMapsError, match="no sample of samples shows a class"):
        list(dataset_subjects(_Samples(sample("a", [0, 0, 0, 0]))))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "auc"}, "unknown score 'auc'; expected one of average_precision"),
        ({"matrix": "sum"}, "unknown matrix 'sum'"),
        ({"tokens": "text"}, "unknown tokens 'text'; expected one of image, joint"),
        ({"noise_levels": (1.5,)}, "1.5"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConceptMapsValueError, match=message):
        settings(**options)


def test_no_clips_are_an_error(pipe: CogVideoXPipeline) -> None:
    with pytest.raises(ConceptMapsValueError, match="no clips to analyze"):
        find_analysis("heads").run(pipe, [], settings())
    with pytest.raises(ConceptMapsValueError, match="unknown word 'size'"):
        shapes_subjects(1, word="size")


def test_a_table_is_written_as_it_is(tmp_path: Path) -> None:
    table = Table(("a", "b", "c"), [[1, 0.123456789, None], ["x,y", 2.0, True]])
    table.write(tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == 'a,b,c\n1,0.123457,\n"x,y",2,True\n'
    assert table.markdown() == "| a | b | c |\n| --- | --- | --- |\n| 1 | 0.123 |  |\n| x,y | 2.000 | True |\n"
