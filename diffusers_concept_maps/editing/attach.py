"""Attention that is written to: words of the prompt are given more or less of it, or a map of one's own.

As AttentionBender (arXiv 2604.20936) does, for artists and for whoever wants to know what a map does: what a
map is a picture of is changed while the video is generated, where and when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers_concept_maps.attachment import Attachment, check_alike, check_free, check_without
from diffusers_concept_maps.backbones import Backbone, Site, find_backbone, find_transformers
from diffusers_concept_maps.compiled import is_compiled
from diffusers_concept_maps.editing.editor import Editor
from diffusers_concept_maps.editing.edits import AttentionEdit
from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.indices import check_indices
from diffusers_concept_maps.prompt import PromptTokens, check_words


@contextmanager
def edit_attention(
    pipe_or_transformer: Any,
    edits: AttentionEdit | Sequence[AttentionEdit],
    *,
    layers: Iterable[int] | None = None,
    steps: Iterable[int] | None = None,
    prompt_tokens: Mapping[str, Sequence[int]] | None = None,
) -> Iterator[None]:
    """Edit the attention to words of the prompt during generation (after AttentionBender, arXiv 2604.20936).

    Edits apply one after the other, each to what the one before it has left, at all heads of the chosen layers, to the
    conditional rows alone; the attention of all other tokens, rows, layers and steps is that of the model, to the bit.
    Edits that change nothing (`scale=1`, an empty mask) leave the model as it is. It goes with `trace`, which records
    what the model computes: the edited outputs, and queries and keys as they come out of edited layers before.

    Args:
        pipe_or_transformer: a pipeline whose transformer's family can be edited (`Backbone.editable`), or a
            transformer alone, where every forward pass counts as a step and every row of its batch as a video.
        edits: what to do; several apply in their order.
        layers: 0-based layers; None is all.
        steps: 0-based denoising steps; None is all.
        prompt_tokens: positions of each word in the prompt, where its text is not known.

    Raises:
        ConceptMapsError: the model cannot be edited, a word is not in the prompt, or an argument is wrong (then it is
            also a ValueError). Nothing is left behind in the model then.

    Example:
        >>> left = torch.zeros(480, 832); left[:, :416] = 1
        >>> with dcm.edit_attention(pipe, dcm.AttentionEdit("red", scale=8.0, mask=left)):
        ...     video = pipe("a red balloon and a dog").frames[0]
    """
    chosen = _check_edits(edits)
    transformers = find_transformers(pipe_or_transformer)
    pipe = None if transformers[0] is pipe_or_transformer else pipe_or_transformer
    backbone = find_backbone(transformers[0])
    sites = {transformer: find_backbone(transformer).sites(transformer) for transformer in transformers}
    _check_model(backbone, sites)
    depth = len(sites[transformers[0]])
    picked = frozenset(range(depth)) if layers is None else check_indices("layer", layers, depth)
    numbers = None if steps is None else check_indices("step", steps, None)
    active = [edit for edit in chosen if not edit.identity]
    if not active:
        yield
        return
    names = check_words(pipe, list(dict.fromkeys(name for edit in active for name in edit.names)), prompt_tokens)
    assert names is not None  # words were given
    prompt = PromptTokens(pipe, backbone, names, prompt_tokens, official=False)
    geometry = backbone.geometry(transformers[0])
    editor = Editor(active, prompt, backbone, sites, pipe, layers=picked, steps=numbers, geometry=geometry)
    attachment: Attachment | None = None
    prompt.listen()
    try:
        attachment = Attachment(editor, backbone, sites, deepest=max(picked))
        yield
    finally:
        prompt.stop()
        if attachment is not None:
            attachment.remove()


def _check_edits(edits: AttentionEdit | Sequence[AttentionEdit]) -> list[AttentionEdit]:
    if not isinstance(edits, AttentionEdit | Sequence):
        raise ConceptMapsValueError(f"edits is {edits!r}; expected an AttentionEdit, or a list of them")
    chosen = [edits] if isinstance(edits, AttentionEdit) else list(edits)
    for edit in chosen:
        if not isinstance(edit, AttentionEdit):
            raise ConceptMapsValueError(f"edits has {edit!r}; expected AttentionEdit objects")
        if not edit.names:
            raise ConceptMapsValueError("an edit names no words; name at least one of the prompt")
    return chosen


def _check_model(backbone: Backbone, sites: Mapping[Any, list[Site]]) -> None:
    """Raise unless the attention of a model's transformers can be edited."""
    first = next(iter(sites))
    if not backbone.editable:
        raise ConceptMapsError(
            f"attention of a {type(first).__name__} cannot be edited; docs/editing.md lists the families whose can"
        )
    check_alike(backbone, sites)
    for transformer, own in sites.items():
        if any(is_compiled(module) for module in transformer.modules()):
            raise ConceptMapsError("what torch.compile has compiled cannot be edited; edit the model uncompiled")
        check_free(transformer, own, Editor.slot)
        check_without(transformer, "guide", "guidance and edits of the attention")
