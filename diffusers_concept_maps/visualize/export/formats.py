"""The table of file formats by name."""

from __future__ import annotations

from diffusers_concept_maps.visualize.export import exr, ffmpeg, png
from diffusers_concept_maps.visualize.export._base import Format

FORMATS: dict[str, Format] = {entry.name: entry for family in (png, exr, ffmpeg) for entry in family.FORMATS}
