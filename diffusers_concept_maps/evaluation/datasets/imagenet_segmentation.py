"""ImageNet-Segmentation: 4276 images of ImageNet, each with a mask of its object.

Guillaumin, Küttel and Ferrari, "ImageNet Auto-Annotation with Segmentation Propagation", IJCV 2014; heat maps are
scored on it since Chefer et al. (https://arxiv.org/abs/2012.09838).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.evaluation.datasets._base import BACKGROUND, Dataset, Sample, caption_of
from diffusers_concept_maps.evaluation.datasets._files import locate, read_json, read_lines, require

FILE = "gtsegs_ijcv.mat"
SHORT_NAMES = "imagenet_class_map.json"

_RESTORE = "fetch it again from http://calvin-vision.net/bigstuff/proj-imagenet/data/gtsegs_ijcv.mat"
_SYNSET = re.compile(r"(n\d{8})[\t ]+(.+)")


class ImageNetSegmentation(Dataset[int]):
    """Reader of `gtsegs_ijcv.mat`, a MATLAB 7.3 (HDF5) file.

    The file gives the synset of an image (as in "n02084071_1234") and no name of it, so the root holds one of
    `words.txt`, `LOC_synset_mapping.txt` (lines "n02084071 dog, domestic dog") and `imagenet_class_index.json`
    (`{"0": ["n01440764", "tench"]}`) as well; the first of them that is there is used. `words.txt` serves best: the
    others name a thousand synsets only. The class is the first name of the synset. The ConceptAttention evaluation
    then replaces names by shorter ones, and with its `imagenet_class_map.json`
    (`{"categories": {"domestic cat": "cat"}}`) in the root, so does this reader.

    Args:
        root: the folder of these files.

    Raises:
        ConceptMapsError: one is missing or broken.
    """

    name = "imagenet-segmentation"
    source = "http://calvin-vision.net/bigstuff/proj-imagenet/data/gtsegs_ijcv.mat"

    def __init__(self, root: str | os.PathLike[str]) -> None:
        folder = locate(root, FILE)
        self._path = folder / FILE
        self._classes = _class_names(folder)
        self._short_names = _short_names(folder / SHORT_NAMES)
        count = _in_file(self._path, lambda file: len(_references(file, "img")))
        self._entries = {f"{index:04d}": index for index in range(count)}

    def _read(self, name: str, entry: int) -> Sample:
        image, mask, identifier = _in_file(self._path, lambda file: _record(file, entry))
        if image.ndim != 3 or image.shape[0] != 3 or image.dtype != np.uint8 or image.shape[1:] != mask.shape:
            raise ConceptMapsError(
                f"image {name} of {str(self._path)!r} is {image.dtype} {list(image.shape)} with a mask "
                f"{list(mask.shape)}; expected uint8 [3, width, height] and [width, height]: {_RESTORE}"
            )
        class_name = self._class_name(identifier)
        return Sample(
            name=name,
            # MATLAB's order of axes is the reverse: [3, width, height] and [width, height].
            frames=torch.from_numpy(image).transpose(1, 2).contiguous().unsqueeze(0),
            labels=torch.from_numpy(mask != 0).long().T.contiguous().unsqueeze(0),
            classes=(BACKGROUND, class_name),
            caption=caption_of([class_name]),
        )

    def _class_name(self, identifier: str) -> str:
        synset = identifier.partition("_")[0]
        if synset not in self._classes:
            raise ConceptMapsError(
                f"no class name for the synset {synset!r} of {str(self._path)!r}; put the complete words.txt of "
                "ImageNet (lines of a synset, a tab and its names) beside it"
            )
        class_name = self._classes[synset]
        if self._short_names is None:
            return class_name
        if not isinstance(self._short_names.get(class_name), str):
            raise ConceptMapsError(
                f'{SHORT_NAMES} has no short name for {class_name!r} ({synset}); expected one under "categories": add '
                "it, or remove the file"
            )
        return str(self._short_names[class_name])


DATASETS = (ImageNetSegmentation,)


def _in_file(path: Path, read: Callable[[Any], Any]) -> Any:
    """Open the file for one reading: an open HDF5 file does not survive a fork."""
    try:
        with require("h5py").File(path, "r") as file:
            return read(file)
    except (OSError, KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ConceptMapsError(
            f"{str(path)!r} cannot be read as MATLAB 7.3 data with references value/img, value/gt and value/id "
            f"({type(error).__name__}: {error}); {_RESTORE}"
        ) from error


def _references(file: Any, field: str) -> Any:
    return file["value"][field][()].reshape(-1)


def _record(file: Any, index: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], str]:
    """Image, mask and identifier; the masks are in a cell, and the first is the one that is scored."""
    image = file[_references(file, "img")[index]][()]
    mask = file[file[_references(file, "gt")[index]][()].reshape(-1)[0]][()]
    codes = file[_references(file, "id")[index]][()].reshape(-1)
    return image, mask, "".join(map(chr, codes))


def _short_names(path: Path) -> Mapping[str, Any] | None:
    """Short names by class name, or None where no file asks for them."""
    if not path.exists():
        return None
    categories = read_json(path).get("categories")
    if not isinstance(categories, dict):
        raise ConceptMapsError(
            f'{str(path)!r} has no "categories"; expected {{"categories": {{"domestic cat": "cat", ...}}}}: mend or '
            "remove the file"
        )
    return categories


def _class_names(folder: Path) -> dict[str, str]:
    """Class names by synset, from the first file there is that has them."""
    for name in ("words.txt", "LOC_synset_mapping.txt"):
        path = folder / name
        if path.exists():
            found = [_SYNSET.fullmatch(line) for line in read_lines(path)]
            if any(found):
                return {match[1]: match[2].split(",")[0].strip() for match in found if match}
            raise ConceptMapsError(f"{str(path)!r} names no synset; expected lines like 'n02084071 dog, domestic dog'")
    path = folder / "imagenet_class_index.json"
    if not path.exists():
        raise ConceptMapsError(
            f"{str(folder)!r} has no class names; put words.txt of ImageNet there (lines of a synset, a tab and its "
            "names), or LOC_synset_mapping.txt, or imagenet_class_index.json, which name fewer classes"
        )
    try:
        return {synset: class_name.replace("_", " ") for synset, class_name in read_json(path).values()}
    except (TypeError, ValueError, AttributeError) as error:
        raise ConceptMapsError(
            f'{str(path)!r} is not what was expected: {{"0": ["n01440764", "tench"], ...}} ({error}); fetch it again'
        ) from error
