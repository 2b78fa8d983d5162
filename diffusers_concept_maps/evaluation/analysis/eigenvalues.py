"""The second-largest eigenvalue modulus of attention in every layer, and how it goes with what a map is worth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from diffusers_concept_maps.encoding import fit_to
from diffusers_concept_maps.evaluation.analysis._base import (
    SCORES,
    Analysis,
    Findings,
    Settings,
    Table,
    depth,
    each,
    mean,
    number,
)
from diffusers_concept_maps.evaluation.analysis._correlation import COLUMNS as CORRELATION
from diffusers_concept_maps.evaluation.analysis._correlation import correlate, tell
from diffusers_concept_maps.evaluation.analysis._plots import BLUE, ORANGE, new_figure, scatter
from diffusers_concept_maps.evaluation.analysis._reader import attach_reader
from diffusers_concept_maps.evaluation.analysis._scores import Scored, score_detail, stack
from diffusers_concept_maps.evaluation.analysis._subjects import Subject
from diffusers_concept_maps.evaluation.analysis._transition import (
    ITERATIONS,
    TOLERANCE,
    SecondEigenvalue,
    Transition,
    second_eigenvalue,
)
from diffusers_concept_maps.single_pass import SinglePass

COLUMNS = (
    "matrix",
    "tokens",
    "layer",
    "head",
    "clips",
    "modulus",
    "largest_residual",
    "most_iterations",
    "unconverged",
    "score",
    "shuffled_masks",
    "chance",
)


class _Spectrum(NamedTuple):
    """Modulus, residual, iterations and whether it converged, each float64 `[pass, layer, matrix]`."""

    modulus: torch.Tensor
    residual: torch.Tensor
    iterations: torch.Tensor
    converged: torch.Tensor


def read_eigenvalues(pipe: Any, subject: Subject, settings: Settings) -> _Spectrum:
    """The eigenvalues of every layer, one forward pass for each noise level.

    Args:
        pipe: a pipeline.
        subject: the clip.
        settings: with `matrix` and `tokens`.

    Raises:
        ConceptMapsError: a layer has no transition matrix, or none with the text.
    """
    found: list[SecondEigenvalue] = []

    def consume(layer: int, transition: Transition) -> None:
        found.append(second_eigenvalue(transition, matrix=settings.matrix, seed=settings.seed))

    single = SinglePass(pipe, prompt=subject.caption, call=settings.call)
    clip, _ = fit_to(single, subject.frames, size=settings.size, num_frames=settings.num_frames)
    attached = attach_reader(single.pipe, settings.tokens, consume)
    try:
        latents = single.encode(clip.transpose(0, 1)[None])
        for level in settings.noise_levels:
            single.run(latents, level, clip, seed=settings.seed)
    finally:
        attached.remove()
    columns = (
        torch.stack([one.modulus for one in found]),
        torch.stack([one.residual for one in found]),
        torch.stack([torch.full_like(one.modulus, one.iterations) for one in found]),
        torch.stack([one.converged.double() for one in found]),
    )
    return _Spectrum(*(column.unflatten(0, (-1, depth(pipe))) for column in columns))


def run(pipe: Any, subjects: Iterable[Subject], settings: Settings) -> Findings:
    """Read the eigenvalues, and set them beside the scores of the heads (or of the layers, for their mean)."""
    kept = ("layer", "head") if settings.matrix == "head" else ("layer",)
    spectra, scores = [], []
    for subject in each(subjects):
        spectra.append(read_eigenvalues(pipe, subject, settings))
        scores.append(score_detail(settings.read(pipe, subject, detail=kept), subject, settings))
    spectrum = _Spectrum(*(torch.stack(list(column)) for column in zip(*spectra, strict=True)))
    scored = stack(scores)
    if settings.matrix == "mean":
        scored = Scored(*(column[..., None] for column in scored))
    modulus, score = mean(spectrum.modulus, (0, 1)), mean(scored.target)  # [layer, matrix]
    correlation = correlate(modulus, score)
    unconverged = int((1 - spectrum.converged).sum())
    summary = [
        "mean modulus by layer: " + ", ".join(f"{float(value):.3f}" for value in mean(modulus, 1)),
        f"with the score, {'heads' if settings.matrix == 'head' else 'layers'}: {tell(correlation)}",
        f"{unconverged} of {spectrum.converged.numel()} did not reach a residual of {TOLERANCE:g} in {ITERATIONS} "
        f"iterations; the largest residual is {float(spectrum.residual.max()):.2g}",
    ]
    tables = {
        "eigenvalues": Table(COLUMNS, list(_rows(spectrum, scored, settings))),
        "eigenvalues-score": Table(
            ("matrix", "tokens", *CORRELATION), [[settings.matrix, settings.tokens, *correlation]]
        ),
    }
    return Findings(tables, {"eigenvalues": _picture(modulus, score, settings, len(spectra))}, summary)


def _rows(spectrum: _Spectrum, scored: Scored, settings: Settings) -> Iterator[list[Any]]:
    for layer, head in torch.cartesian_prod(*map(torch.arange, spectrum.modulus.shape[2:])).tolist():
        modulus, residual, iterations, converged = (column[..., layer, head] for column in spectrum)
        yield [
            settings.matrix,
            settings.tokens,
            layer,
            head if settings.matrix == "head" else None,
            len(modulus),
            number(modulus.mean()),
            number(residual.max()),
            int(iterations.max()),
            int((1 - converged).sum()),
            *(number(mean(column[:, layer, head])) for column in (scored.target, scored.shuffled, scored.chance)),
        ]


def _picture(modulus: torch.Tensor, score: torch.Tensor, settings: Settings, clips: int) -> Any:
    figure = new_figure(9.5, 3.9)
    left, right = figure.subplots(1, 2)
    layers = torch.arange(len(modulus))
    each_layer = layers[:, None].expand(modulus.shape).flatten()
    name = "a head" if settings.matrix == "head" else "mean of the heads"
    if settings.matrix == "head":
        left.scatter(each_layer.numpy(), modulus.flatten().numpy(), color=BLUE, s=26, label=name)
    left.plot(layers.numpy(), mean(modulus, 1).numpy(), color=ORANGE, marker="o", label="layer")
    left.set(xlabel="layer", ylabel="second-largest eigenvalue modulus", ylim=(0, 1.02))
    left.set_xticks(layers.tolist() if len(layers) <= 12 else layers[:: len(layers) // 8].tolist())
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    labels = ("second-largest eigenvalue modulus", SCORES[settings.score], "layer")
    scatter(right, modulus.flatten(), score.flatten(), each_layer.tolist(), labels)
    which = "attention of each head" if settings.matrix == "head" else "mean attention of the heads"
    figure.suptitle(f"{which}, {settings.tokens} tokens; {settings.describe()}; {clips} clips", fontsize=9)
    return figure


ANALYSIS = Analysis("eigenvalues", "second-largest eigenvalue modulus of attention, against the score", run)
