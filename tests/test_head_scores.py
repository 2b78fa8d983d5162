"""The four head scores against scikit-learn in float64, what degenerate features get, and the official selections."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score, silhouette_score
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_concept_maps import ConceptMapsValueError, HeadSelection, dispatch, ops, reference

ROWS, HEADS, FRAMES, PLACES, WIDTH = 2, 6, 3, 20, 8
TOKENS = FRAMES * PLACES
SCORES = ("calinski_harabasz", "davies_bouldin", "fisher", "silhouette")
# Silhouettes are differences of mean distances over the larger one: near 0 only their absolute error is bounded.
ABSOLUTE = {"silhouette": 1e-7}
OFFICIAL_THRESHOLDS = {"calinski_harabasz": 100.0, "davies_bouldin": 10.0, "fisher": 0.3, "silhouette": 0.1}

GOLDEN = os.environ.get("DCM_GOLDEN")
OFFICIAL = {"calinski_harabasz": "chi", "davies_bouldin": "dbi", "fisher": "fisher", "silhouette": "silhouette"}


def outputs(seed: int = 0, frames: int = FRAMES, places: int = PLACES) -> torch.Tensor:
    """Attention outputs `[R, H, N, D]`, a slice of a joint buffer, whose heads drift more the higher their index."""
    generator = torch.Generator().manual_seed(seed)
    joint = torch.randn(ROWS, 4 + frames * places, HEADS * WIDTH, generator=generator)
    output = joint.view(ROWS, -1, HEADS, WIDTH).transpose(1, 2)[:, :, 4:]
    drift = torch.randn(ROWS, 1, frames, 1, WIDTH, generator=generator)
    output.unflatten(2, (frames, places)).add_(drift * torch.linspace(0.1, 1.5, HEADS)[:, None, None, None])
    return output


def fisher_ratio(feature: torch.Tensor, labels: torch.Tensor) -> float:
    """Trace of the scatter between clusters over that within them, as the official code adds it up."""
    mean, between, within = feature.mean(0), 0.0, 0.0
    for label in labels.unique():
        cluster = feature[labels == label]
        between += len(cluster) * float((cluster.mean(0) - mean).square().sum())
        within += float((cluster - cluster.mean(0)).square().sum())
    return between / (within + 1e-12)


ORACLES: dict[str, Callable[..., float]] = {
    "calinski_harabasz": calinski_harabasz_score,
    "davies_bouldin": davies_bouldin_score,
    "fisher": fisher_ratio,
    "silhouette": silhouette_score,
}


def oracle(output: torch.Tensor, score: str, frames: int = FRAMES, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """The score of every head `[R, H]` in float64, of all tokens or of those named."""
    labels = torch.arange(output.shape[2]) // (output.shape[2] // frames)
    chosen = torch.arange(output.shape[2]) if tokens is None else tokens
    table = [[ORACLES[score](head[chosen].double(), labels[chosen]) for head in row] for row in output]
    return torch.tensor(table, dtype=torch.float64)


def assert_equal_scores(actual: torch.Tensor, expected: torch.Tensor, score: str) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=ABSOLUTE.get(score, 0.0))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_are_those_of_scikit_learn(score: str, dtype: torch.dtype) -> None:
    output = outputs().to(dtype)
    assert_equal_scores(ops.frame_separability(output, FRAMES, score), oracle(output, score), score)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("offset", [1e3, -1e6])
def test_scores_of_features_far_from_zero(score: str, offset: float) -> None:
    output = outputs() + offset * torch.linspace(-1, 1, WIDTH)
    near = output.double() - output[:, :, :1].double()  # far from zero scikit-learn's own distances cancel
    assert_equal_scores(ops.frame_separability(output, FRAMES, score), oracle(near, score), score)


@pytest.mark.parametrize("score", SCORES)
def test_scores_with_a_first_token_far_from_the_others(score: str) -> None:
    output = outputs()
    output[:, :, 0] = 100.0
    assert_equal_scores(ops.frame_separability(output, FRAMES, score), oracle(output, score), score)


@pytest.mark.parametrize("score", SCORES)
def test_scores_from_statistics_at_hand(score: str) -> None:
    output = outputs()
    statistics = ops.frame_statistics(output, FRAMES)
    once = ops.frame_separability(output, FRAMES, score)
    assert torch.equal(ops.frame_separability(output, FRAMES, score, statistics), once)
    wider = replace(statistics, mean=3 * statistics.mean)  # not computed anew
    again = ops.frame_separability(output, FRAMES, score, wider)
    assert torch.equal(again, once) == (score == "silhouette")


def test_silhouette_of_a_long_clip_is_that_of_5000_tokens() -> None:
    output = outputs(frames=4, places=1300)[:1, 2:3]
    drawn = torch.from_numpy(np.random.RandomState(0).permutation(5200)[:5000])
    with Watch() as watch:
        score = ops.frame_separability(output, 4, "silhouette")
    assert watch.largest == 512 * 5000
    assert_equal_scores(score, oracle(output, "silhouette", 4, drawn), "silhouette")


def test_silhouette_of_a_sample_that_misses_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one frame a single token is drawn, which scores 0, and of another none, which is nobody's neighbor."""
    monkeypatch.setattr(reference, "SILHOUETTE_TOKENS", 8)
    output = outputs(frames=6, places=10)
    drawn = torch.from_numpy(np.random.RandomState(0).permutation(60)[:8])
    counts = torch.bincount(drawn // 10, minlength=6)
    assert counts.min() == 0
    assert (counts == 1).any()
    score = ops.frame_separability(output, 6, "silhouette")
    assert_equal_scores(score, oracle(output, "silhouette", 6, drawn), "silhouette")


def test_the_sample_leaves_the_global_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SILHOUETTE_TOKENS", 30)
    scores = []
    with torch.random.fork_rng(devices=[]):
        for seed in (7, 8):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            scores.append(ops.frame_separability(outputs(), FRAMES, "silhouette"))
            assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*scores)


DEGENERATE = ("zero", "constant", "equal frames", "one value per frame")


def degenerate(output: torch.Tensor, head: int, kind: str) -> None:
    """Take the spread within frames, between them, or both from a head of all rows."""
    frame = output[:, head].unflatten(1, (FRAMES, PLACES))
    if kind == "zero":
        frame.zero_()
    elif kind == "constant":
        frame[:] = torch.linspace(0.1, 7, WIDTH)
    elif kind == "equal frames":
        frame[:] = frame[:, :1].clone()
    else:
        frame[:] = frame[:, :, :1].clone()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("zero", {"calinski_harabasz": 1.0, "davies_bouldin": 0.0, "fisher": 0.0, "silhouette": 0.0}),
        ("constant", {"calinski_harabasz": 1.0, "davies_bouldin": 0.0, "fisher": 0.0, "silhouette": 0.0}),
        ("equal frames", {"calinski_harabasz": 0.0, "davies_bouldin": 0.0, "fisher": 0.0}),
        ("one value per frame", {"davies_bouldin": 0.0, "silhouette": 1.0}),
    ],
)
def test_scores_of_features_without_spread(kind: str, expected: dict[str, float]) -> None:
    """As scikit-learn defines them; where it divides rounding errors by one another, no value is stated."""
    output = outputs()
    degenerate(output, 1, kind)
    for score, value in expected.items():
        ours = ops.frame_separability(output, FRAMES, score)
        torch.testing.assert_close(ours[:, 1], torch.full((ROWS,), value), rtol=0, atol=1e-6)
        if kind == "zero":  # the others it gets wrong by rounding
            torch.testing.assert_close(ours.double(), oracle(output, score), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("score", SCORES)
def test_scores_of_nan_are_nan(score: str) -> None:
    output = outputs()
    output[0, 1, 5, 2] = torch.nan
    actual = ops.frame_separability(output, FRAMES, score)
    assert actual.isnan().nonzero().tolist() == [[0, 1]]


def better(score: str, values: torch.Tensor, than: float) -> torch.Tensor:
    return values < than if score == "davies_bouldin" else values > than


def ranked(score: str, output: torch.Tensor) -> torch.Tensor:
    """Heads from best to worst `[R, H]`."""
    return oracle(output, score).argsort(1, descending=score != "davies_bouldin")


def mask(rows: list[list[int]]) -> torch.Tensor:
    chosen = torch.zeros(len(rows), HEADS)
    for row, heads in enumerate(rows):
        chosen[row, heads] = 1.0
    return chosen


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("top_k", [1, 3, HEADS])
def test_the_best_heads_of_every_row(score: str, top_k: int) -> None:
    output = outputs()
    output[1] = output[1].flip(0)
    best = ranked(score, output)[:, :top_k].tolist()
    assert top_k == HEADS or set(best[0]) != set(best[1])
    assert torch.equal(HeadSelection(score, top_k).choose(output, FRAMES), mask(best))


@pytest.mark.parametrize("score", SCORES)
def test_heads_better_than_a_threshold(score: str) -> None:
    output = outputs()
    table = oracle(output, score)
    middle = table.flatten().sort().values[ROWS * HEADS // 2 - 1 :][:2].mean()
    expected = better(score, table, float(middle))
    assert expected.sum() == ROWS * HEADS // 2
    chosen = HeadSelection(score, top_k=1, threshold=float(middle)).choose(output, FRAMES)
    assert torch.equal(chosen, expected.float())


@pytest.mark.parametrize(("score", "threshold"), [("silhouette", 1.0), ("davies_bouldin", 0.0), ("fisher", 1e9)])
def test_the_best_head_where_none_is_better_than_the_threshold(score: str, threshold: float) -> None:
    output = outputs()
    chosen = HeadSelection(score, threshold=threshold).choose(output, FRAMES)
    assert torch.equal(chosen, mask(ranked(score, output)[:, :1].tolist()))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("kind", DEGENERATE)
def test_a_head_that_separates_nothing_is_never_chosen(score: str, kind: str) -> None:
    output = outputs()
    degenerate(output, 4, kind)
    others = [head for head in range(HEADS) if head != 4]
    assert torch.equal(HeadSelection(score, HEADS).choose(output, FRAMES), mask([others, others]))
    everything = 1e9 if score == "davies_bouldin" else -2.0
    assert torch.equal(HeadSelection(score, threshold=everything).choose(output, FRAMES), mask([others, others]))
    best = [[head for head in row if head != 4][:2] for row in ranked(score, output).tolist()]
    assert torch.equal(HeadSelection(score, 2).choose(output, FRAMES), mask(best))


@pytest.mark.parametrize("score", SCORES)
def test_a_head_with_nan_is_never_chosen(score: str) -> None:
    output = outputs()
    output[1, 4, 7, 0] = torch.nan
    others = [head for head in range(HEADS) if head != 4]
    assert torch.equal(HeadSelection(score, HEADS).choose(output, FRAMES), mask([[*range(HEADS)], others]))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("selection", [{"top_k": 2}, {"threshold": 0.5}])
def test_all_heads_where_nothing_can_be_separated(score: str, selection: dict[str, Any]) -> None:
    """Without spread in any head of a row, in a clip of one frame, and in frames of one token."""
    output = outputs()
    expected = HeadSelection(score, **selection).choose(output, FRAMES)
    expected[1] = 1.0
    output[1] = 0.0
    assert torch.equal(HeadSelection(score, **selection).choose(output, FRAMES), expected)
    for frames in (1, TOKENS):
        assert torch.equal(HeadSelection(score, **selection).choose(outputs(), frames), torch.ones(ROWS, HEADS))


class Watch(TorchDispatchMode):
    """What runs: the size of the largest new tensor, and the operators that read a value or size a result by one."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == dispatch.NAMESPACE:  # look inside
            with self:
                return getattr(reference, func._opname)(*args)
        result = func(*args, **(kwargs or {}))
        name = str(func).split(".")[1]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name.startswith(self.WAITING) or (name == "index" and any(leaf.dtype == torch.bool for leaf in given)):
            self.waits.append(str(func))
        known = {leaf.untyped_storage().data_ptr() for leaf in given}
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        new = [leaf.numel() for leaf in made if leaf.untyped_storage().data_ptr() not in known]
        self.largest = max([self.largest, *new])
        return result


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("threshold", [None, 1.0])
def test_nothing_large_and_no_wait_for_the_device(
    score: str, threshold: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = outputs(frames=4, places=100)
    monkeypatch.setattr(reference, "_CHUNK", 16)
    with Watch() as watch:
        HeadSelection(score, 3, threshold).choose(output, 4)
    assert watch.waits == []
    assert watch.largest == ROWS * 400 * (16 if score == "silhouette" else WIDTH)


def test_a_wait_would_be_seen() -> None:
    with Watch() as watch:
        bool(torch.zeros(3)[torch.ones(3) > 0].sum() > 0)
    assert len(watch.waits) >= 2


def test_unknown_scores_are_refused() -> None:
    message = r"unknown head score 'dunn'; expected one of calinski_harabasz, davies_bouldin, fisher, silhouette"
    with pytest.raises(ConceptMapsValueError, match=message):
        HeadSelection("dunn")
    with pytest.raises(ConceptMapsValueError, match=message):
        ops.frame_separability(outputs(), FRAMES, "dunn")


def test_frames_are_checked() -> None:
    for score in SCORES:
        with pytest.raises(ConceptMapsValueError, match="frames is 1; separability compares frames"):
            ops.frame_separability(outputs(), 1, score)
        with pytest.raises(ConceptMapsValueError, match="frames is 7, which does not divide the 60 image tokens"):
            HeadSelection(score).choose(outputs(), 7)


class Case:
    """One case of the golden file: features without the text rows, the official scores and selections."""

    def __init__(self, path: Path, name: str) -> None:
        facts = json.loads(path.read_text(encoding="utf-8"))["cases"][name]
        tensors = load_file(path.with_suffix(".safetensors"))
        self.frames: int = facts["F_"]
        tokens = self.frames * facts["H"] * facts["W"]
        state = tensors[f"{name}.hidden_state"]
        assert state.shape[1] == tokens + facts["text"]
        self.output = (state[:, :tokens] if facts.get("back") else state[:, facts["text"] :])[None]
        suffix = "_f64" if f"{name}.chi_f64" in tensors else ""
        self.scores = {ours: tensors[f"{name}.{theirs}{suffix}"] for ours, theirs in OFFICIAL.items()}
        self.selections: dict[str, list[int]] = facts["sel"]

    def choose(self, score: str, **options: Any) -> list[int]:
        chosen = HeadSelection(score, **options).choose(self.output, self.frames)
        return torch.arange(chosen.shape[1])[chosen[0] > 0].tolist()


def _names() -> list[str]:
    if GOLDEN is None:
        return ["no-golden-file"]
    return list(json.loads(Path(GOLDEN, "heads.json").read_text(encoding="utf-8"))["cases"])


golden = pytest.mark.skipif(GOLDEN is None, reason="DCM_GOLDEN does not name a folder of golden tensors")


@pytest.fixture(scope="module", params=[name for name in _names() if name != "degenerate"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(Path(str(GOLDEN), "heads.json"), request.param)


@golden
@pytest.mark.parametrize("score", SCORES)
def test_golden_scores(case: Case, score: str) -> None:
    actual = ops.frame_separability(case.output, case.frames, score)
    assert_equal_scores(actual[0], case.scores[score], score)


@golden
@pytest.mark.parametrize("score", SCORES)
def test_golden_selections(case: Case, score: str) -> None:
    official = case.selections
    order = official[f"{OFFICIAL[score]}.topk99.except0"]  # more than there are: all, the best first
    assert len(order) == case.output.shape[1]
    for top_k in (1, 2):
        assert case.choose(score, top_k=top_k) == sorted(official[f"{OFFICIAL[score]}.topk{top_k}.except0"])
    ours = ops.frame_separability(case.output, case.frames, score)[0]
    assert ours.argsort(descending=score != "davies_bouldin").tolist() == order
    better_ones = official[f"{OFFICIAL[score]}.topk-1.except0"]  # empty where none is better than the threshold
    assert case.choose(score, threshold=OFFICIAL_THRESHOLDS[score]) == (better_ones or order[:1])


@golden
def test_golden_degenerate_heads() -> None:
    """Ours differs as stated: of zero, one value per frame, equal frames and noise, only noise is ever chosen."""
    case = Case(Path(str(GOLDEN), "heads.json"), "degenerate")
    official = {"calinski_harabasz": [1, 3], "davies_bouldin": [0, 2], "fisher": [1, 3], "silhouette": [1, 0]}
    for score, chosen in official.items():
        assert case.selections[f"{OFFICIAL[score]}.topk2.except0"] == chosen
        for options in ({"top_k": 2}, {"top_k": 4}, {"threshold": OFFICIAL_THRESHOLDS[score]}):
            assert case.choose(score, **options) == [3]
        actual = ops.frame_separability(case.output, case.frames, score)[0].double()
        compared = [0, 2, 3] if score in ("calinski_harabasz", "fisher") else [0, 1, 2, 3]  # head 1 is over rounding
        torch.testing.assert_close(actual[compared], case.scores[score][compared], rtol=1e-5, atol=1e-6)
