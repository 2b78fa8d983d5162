"""The options of an export, checked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffusers_concept_maps.detail import AXES
from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.visualize.export._base import Format
from diffusers_concept_maps.visualize.export.formats import FORMATS
from diffusers_concept_maps.visualize.export.looks import CHANNELS, LOOKS
from diffusers_concept_maps.visualize.export.source import Source

PRODUCTS = ("clips", "grid", "sharpening")
SCALES = ("clip", "file", "frame")


@dataclass(frozen=True)
class ExportSettings:
    """What to export, and how.

    Attributes:
        products: what to make out of `PRODUCTS`: "clips" is a file for every concept and for each layer, step and head
            that `per` asks for; "grid" one video with a row for each concept and a column for each position along
            `columns`; "sharpening" a file for each concept whose frames are the denoising steps.
        per: axes out of "layer", "step" and "head" that become files of their own; the others are averaged.
        columns: the axis of the grid's columns.
        most_columns: of a longer axis so many evenly spaced positions become columns.
        frame: the token frame that a sharpening shows; None is the middle one.
        layers: which layers; None is all that were kept.
        steps: likewise.
        heads: likewise.
        concepts: likewise; the order is that of the maps.
        video_index: which video of the batch.
        file_format: one of `formats.FORMATS`.
        look: one of `looks.LOOKS`.
        scale: what has one scale of its own, from its lowest score to its highest: "clip" every concept, over
            everything that is exported of it as clips or as sharpening; "file" every file; "frame" every frame. A row
            of a grid always has one scale.
        size: "token", "video", or height and width in pixels.
        video: frames, height and width of the video that the maps are of, where they do not say it themselves.
        smooth: bilinear between tokens instead of blocks.
        fps: frames per second.

    Raises:
        ConceptMapsValueError: a value that is none of these, or a look that the format cannot hold.
    """

    products: Sequence[str] = ("clips",)
    per: Sequence[str] = ()
    columns: str = "step"
    most_columns: int = 12
    frame: int | None = None
    layers: Sequence[int] | None = None
    steps: Sequence[int] | None = None
    heads: Sequence[int] | None = None
    concepts: Sequence[str] | None = None
    video_index: int = 0
    file_format: str = "png"
    look: str = "gray"
    scale: str = "clip"
    size: str | tuple[int, int] = "token"
    video: tuple[int, int, int] | None = None
    smooth: bool = True
    fps: int = 8

    def __post_init__(self) -> None:
        """Check what can be checked without the maps."""
        if isinstance(self.per, str) or set(self.per) - set(AXES):
            raise ConceptMapsValueError(f"per is {self.per!r}; expected a list out of {', '.join(AXES)}")
        choices = {"columns": AXES, "file_format": FORMATS, "look": LOOKS, "scale": SCALES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConceptMapsValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}")
        if isinstance(self.products, str) or not self.products or set(self.products) - set(PRODUCTS):
            raise ConceptMapsValueError(f"products is {self.products!r}; expected a list out of {', '.join(PRODUCTS)}")
        if CHANNELS[self.look] == 4 and not self.format.alpha:
            having = ", ".join(name for name, entry in FORMATS.items() if entry.alpha)
            raise ConceptMapsValueError(
                f"look is {self.look!r}, and {self.file_format} has no alpha; use 'gray' or 'color', or {having}"
            )
        if self.fps < 1 or self.most_columns < 1:
            raise ConceptMapsValueError(
                f"fps is {self.fps} and most_columns {self.most_columns}; expected at least 1 of each"
            )

    @property
    def format(self) -> Format:
        """The file format."""
        return FORMATS[self.file_format]

    @property
    def clip_axes(self) -> tuple[str, ...]:
        """The axes of `per` in the order of `detail.AXES`."""
        return tuple(axis for axis in AXES if axis in self.per)

    @property
    def needed_axes(self) -> tuple[str, ...]:
        """The axes that the maps must have kept."""
        needed = set(self.clip_axes) if "clips" in self.products else set()
        needed |= {self.columns} if "grid" in self.products else set()
        needed |= {"step"} if "sharpening" in self.products else set()
        chosen = {"layer": self.layers, "step": self.steps, "head": self.heads}
        needed |= {axis for axis, numbers in chosen.items() if numbers is not None}
        return tuple(axis for axis in AXES if axis in needed)

    def chosen_axes(self, source: Source) -> dict[str, tuple[int, ...]]:
        """The numbers along every kept axis that are exported.

        Raises:
            ConceptMapsValueError: an axis that is needed was not kept, or not with such a number.
        """
        lacking = [axis for axis in self.needed_axes if axis not in source.axes]
        if lacking:
            kept = f"only {', '.join(source.axes)}" if source.axes else "none"
            raise ConceptMapsValueError(
                f"{' and '.join(lacking)} cannot be told apart in these maps, which have kept {kept}; make them with "
                f"detail={list(self.needed_axes)!r} and a detail_path"
            )
        chosen = {"layer": self.layers, "step": self.steps, "head": self.heads}
        return {axis: _some(axis, chosen[axis], numbers) for axis, numbers in source.axes.items()}

    def chosen_concepts(self, source: Source) -> list[int]:
        """The positions of the concepts that are exported.

        Raises:
            ConceptMapsValueError: the maps have no such concept, or not so many videos.
        """
        if not 0 <= self.video_index < source.videos:
            raise ConceptMapsValueError(
                f"video_index is {self.video_index}; there are maps of {source.videos} videos, counted from 0"
            )
        wanted = source.concepts if self.concepts is None else tuple(self.concepts)
        unknown = [concept for concept in wanted if concept not in source.concepts]
        if unknown or not wanted:
            raise ConceptMapsValueError(
                f"there are no maps of {unknown or 'no concept'}; they are of {', '.join(map(repr, source.concepts))}"
            )
        return [index for index, concept in enumerate(source.concepts) if concept in wanted]


def _some(axis: str, chosen: Sequence[int] | None, numbers: tuple[int, ...]) -> tuple[int, ...]:
    if chosen is None:
        return numbers
    unknown = sorted(set(chosen) - set(numbers))
    if unknown or not chosen:
        raise ConceptMapsValueError(f"{axis}s are {list(chosen)}; these maps have {', '.join(map(str, numbers))}")
    return tuple(number for number in numbers if number in set(chosen))
