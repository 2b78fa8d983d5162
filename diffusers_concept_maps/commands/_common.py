"""What several sub-commands share: types of arguments, the folder they write to, the pipeline, names and text."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.files import slug as slug


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number of at least 1")
    return int(text)


def seed(text: str) -> int:
    """An argument that a random generator takes as a seed.

    Raises:
        argparse.ArgumentTypeError: it does not.
    """
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number from 0 to 2**63 - 1")
    return int(text)


def check_folder(folder: Path) -> None:
    """Check the folder that a command is to write to, which need not be there.

    Raises:
        ConceptMapsValueError: it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ConceptMapsValueError(f"--out is {str(folder)!r}, which is a file; expected a folder to write to")


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A folder whose files are moved into `folder` once all of them are there; a failure leaves nothing of it.

    Raises:
        ConceptMapsValueError: `folder` is a file.
    """
    check_folder(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as name:
            yield Path(name)
            for file in sorted(Path(name).iterdir()):
                file.replace(folder / file.name)
    finally:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def load_pipeline(
    model: str | None, steps: int | None, guidance_scale: float | None, *, gpu: int = 0, offload: bool = True
) -> tuple[Any, dict[str, Any]]:
    """The pipeline, and the arguments of its call that do not come from the user alone.

    Args:
        model: a folder or a name on the hub; None for the embedded model.
        steps: denoising steps; None for the default, which is the pipeline's or that of the embedded model.
        guidance_scale: of classifier-free guidance; None likewise.
        gpu: the number of the GPU to use, where there is one.
        offload: move the pipeline's parts there as they are needed, instead of keeping all of it there.

    Raises:
        ConceptMapsError: there is no pipeline of that name, or it cannot be loaded.
    """
    import torch
    from diffusers import DiffusionPipeline

    given = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    call = {name: value for name, value in given.items() if value is not None}
    if model is None:
        from diffusers_concept_maps.shapes.model import GUIDANCE_SCALE, STEPS, load_shapes_pipeline

        pipe = load_shapes_pipeline()
        return pipe, {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE_SCALE} | _text_length(pipe) | call
    on_gpu = torch.cuda.is_available()
    try:
        pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.bfloat16 if on_gpu else torch.float32)
    except (OSError, ValueError) as error:
        raise ConceptMapsError(f"cannot load the pipeline {model!r}: {error}") from error
    if on_gpu and offload:
        pipe.enable_model_cpu_offload(gpu)
    elif on_gpu:
        pipe.to(f"cuda:{gpu}")
    return pipe, _text_length(pipe) | call


def _text_length(pipe: Any) -> dict[str, int]:
    """The text length that a CogVideoX transformer was built for: its sin-cos position table takes no other."""
    transformer = getattr(pipe, "transformer", None)
    length = None if transformer is None else transformer.config.get("max_text_seq_length")
    return {} if length is None else {"max_sequence_length": length}


def printable(text: str) -> str:
    """Text that cannot steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
