"""Maps as raw material for other programs: sequences of pictures and videos in a folder with a manifest.

`export` reads maps one clip at a time (`source`), brings them to a size (`canvas`), turns them into pixels (`looks`)
and writes them in a file format of the table `formats`: clips and sharpening (`clips`), or all of them on one page
(`grid`). `manifest` says what each file is.
"""

from __future__ import annotations

from diffusers_concept_maps.visualize.export.job import export
from diffusers_concept_maps.visualize.export.settings import ExportSettings

__all__ = ["ExportSettings", "export"]
