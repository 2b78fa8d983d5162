"""What a model family declares so that its transformer can be traced."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import nn

from diffusers_concept_maps.backbones._real import RealInput
from diffusers_concept_maps.backbones._sites import Grid, Preset, Site, uncompiled, unpatched
from diffusers_concept_maps.parity import Parity
from diffusers_concept_maps.tokens import token_spans

__all__ = [
    "Backbone",
    "CrossBackbone",
    "Grid",
    "JoiningBackbone",
    "JointBackbone",
    "Preset",
    "Site",
    "uncompiled",
    "unpatched",
]


class Backbone(RealInput, ABC):
    """One model family; its module holds an instance as `BACKBONE`.

    Attributes:
        transformer_classes: exact class names, looked up along the transformer's MRO.
        presets: one per known checkpoint.
        batched_guidance: the family's pipelines run both guidance branches as one batch, the unconditional half first;
            False if each has a forward pass of its own, the conditional one first.
        parities: switches of `parity=` that are others for this family, by name.
        context_parallel: layers can be recorded under the host's context parallelism.
        editable: attention to words of the prompt can be edited (`edit_attention`).
        prompt_arguments: of `encode_prompt`, what it may be given as the text whose tokens are the text stream; the
            first that is given is it.
    """

    transformer_classes: ClassVar[tuple[str, ...]]
    presets: ClassVar[tuple[Preset, ...]] = ()
    batched_guidance: ClassVar[bool] = True
    parities: ClassVar[Mapping[str, Parity]] = {}
    context_parallel: ClassVar[bool] = False
    editable: ClassVar[bool] = False
    prompt_arguments: ClassVar[tuple[str, ...]] = ("prompt",)

    @abstractmethod
    def sites(self, transformer: Any) -> list[Site]:
        """The layers in the order in which the forward pass runs them."""

    def matching_sites(self, transformer: Any) -> list[Site]:
        """The layers with the attention in which image tokens see one another, in the same order."""
        return self.sites(transformer)

    @abstractmethod
    def heads(self, transformer: Any) -> int:
        """Number of attention heads of every layer."""

    @abstractmethod
    def text_width(self, transformer: Any) -> int:
        """Width of the text encoder states the transformer takes."""

    @abstractmethod
    def encode(self, pipe: Any, texts: list[str], length: int | None) -> tuple[torch.Tensor, list[int]]:
        """Text encoder states of each text on its own `[text, token, width]`, and its number of word tokens.

        Args:
            pipe: whose tokenizer and text encoder to use.
            texts: words or phrases.
            length: tokens to pad or cut to; None is what suits the model, to which a text has to fit.

        Raises:
            ConceptMapsError: the pipeline has no text encoder, or a text does not fit or has no known word.
        """

    @abstractmethod
    def grid(self, transformer: Any, call: Mapping[str, Any]) -> Grid:
        """Token grid of a forward pass, from the arguments of the transformer."""

    def image(self, call: Mapping[str, Any]) -> torch.Tensor:
        """The image stream, from the arguments of the transformer or of a block; the batch is its first dimension."""
        return cast(torch.Tensor, call["hidden_states"])

    def batch(self, call: Mapping[str, Any]) -> int:
        """Batch size of a forward pass, from the arguments of the transformer or of a block."""
        return self.image(call).shape[0]

    def text_length(self, call: Mapping[str, Any]) -> int:
        """Number of text tokens of a forward pass, from the arguments of the transformer."""
        return int(call["encoder_hidden_states"].shape[1])

    def clean(self, prompt: str) -> str:
        """A prompt as the family's pipelines hand it to their tokenizers; its words are looked for in that."""
        return prompt

    def token_spans(self, pipe: Any, prompt: str, length: int) -> list[tuple[int, int]]:
        """The characters `(start, stop)` of a prompt that each text token covers; marks that are added cover none.

        Args:
            pipe: whose tokenizer to use.
            prompt: the text that is encoded, `clean`.
            length: number of text tokens of the forward pass.

        Raises:
            ConceptMapsError: the tokenizer cannot tell.
        """
        return token_spans(pipe.tokenizer, prompt, length)

    def misleading(self, pipe: Any, arguments: Mapping[str, Any]) -> str | None:
        """Name of the argument of `encode_prompt` that makes other tokens than `token_spans` tells of; None for none.

        Args:
            pipe: whose it is.
            arguments: what it was given, by name.
        """
        return None

    def timesteps(self, scheduled: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """What the family's pipelines hand to the transformer at each timestep of the scheduler, to the bit.

        Args:
            scheduled: the scheduler's timesteps `[step]`.
            dtype: of what was handed over.

        Returns:
            `[step]`, such as `scheduled.to(dtype) / 1000`; None where it is a view of the scheduler's timesteps.
        """
        return None

    def handed_timesteps(self, pipe: Any, scheduled: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """As `timesteps`, where it depends on the pipeline or its scheduler as well.

        Args:
            pipe: the pipeline.
            scheduled: its scheduler's timesteps `[step]`.
            dtype: of what was handed over.

        Returns:
            `[step]`, or `[way, step]` where the family's pipelines do it in several ways.
        """
        return self.timesteps(scheduled, dtype)

    def passes(self, pipe: Any) -> int | None:
        """Number of forward passes in each step of a run, where guidance is no batch.

        Args:
            pipe: which runs.

        Returns:
            None where nothing tells it beforehand. It is needed where rounding gives two steps the same timestep and
            the pipeline writes down none.
        """
        return None

    def geometry(self, transformer: Any) -> dict[str, int]:
        """How token frames relate to video frames, for `ConceptMaps.upsample`.

        Returns:
            "frames_per_latent", video frames per latent frame after the first, and "latents_per_token", latent frames
            per frame of the token grid.
        """
        return {"frames_per_latent": 1, "latents_per_token": 1}

    def preset(self, transformer: Any) -> Preset | None:
        """The preset whose `config` entries the transformer's config has."""
        config = transformer.config
        for preset in self.presets:
            if all(getattr(config, name, None) == value for name, value in preset.config.items()):
                return preset
        return None


class JointBackbone(Backbone):
    """A family whose blocks attend jointly over text and image, so that concepts can be carried through them."""

    @abstractmethod
    def enter(
        self, transformer: Any, embeds: torch.Tensor, like: torch.Tensor, call: Mapping[str, Any], rows: slice
    ) -> torch.Tensor:
        """Concept states before the first block `[row, concept, width]`, by the model's own text projection.

        Args:
            transformer: the model.
            embeds: text encoder states `[row, concept, text_width]`.
            like: the image stream before the first block `[batch, token, width]`, in the model's dtype and device.
            call: arguments of the transformer by name, for projections that depend on the timestep.
            rows: the rows of the batch that the concepts belong to.
        """

    def enter_with_quirks(
        self,
        transformer: Any,
        embeds: torch.Tensor,
        like: torch.Tensor,
        call: Mapping[str, Any],
        rows: slice,
        multiplicity: torch.Tensor | None,
    ) -> torch.Tensor:
        """As `enter`, in the way of official code where that has a quirk (`Parity.quirks`).

        Args:
            transformer: the model.
            embeds: text encoder states `[row, concept, text_width]`.
            like: the image stream before the first block `[batch, token, width]`, in the model's dtype and device.
            call: arguments of the transformer by name.
            rows: the rows of the batch that the concepts belong to.
            multiplicity: float `[concept]`, how many equal concepts each one stands for, the last one for all padding;
                None if there is no padding.
        """
        return self.enter(transformer, embeds, like, call, rows)

    def text_tokens(self, block: nn.Module, arguments: Mapping[str, Any], call: Mapping[str, Any]) -> int:
        """Number of text tokens in the joint sequence of a block.

        Args:
            block: of which attention is called with text and image in one sequence, for a model whose attention
                cannot tell them apart.
            arguments: what the block was called with, by name.
            call: what the transformer was called with, likewise.
        """
        return self.text_length(call)

    def unpooled(self, transformer: Any, arguments: Mapping[str, Any], call: Mapping[str, Any]) -> Mapping[str, Any]:
        """Arguments of a block as they are without the prompt's pooled text vector; see `Parity.pooled`.

        Args:
            transformer: the model.
            arguments: what the block was called with, by name.
            call: what the transformer was called with, likewise.
        """
        return arguments

    @abstractmethod
    def reentry(
        self, block: nn.Module, arguments: Mapping[str, Any], concepts: torch.Tensor, rows: slice
    ) -> dict[str, Any]:
        """Arguments with which a block's own forward advances the concepts: an empty image stream, concepts as text.

        Args:
            block: one of those of `sites`.
            arguments: what the block was called with, by name.
            concepts: concept states `[row, concept, width]`.
            rows: the rows of the batch that the concepts belong to.
        """

    @abstractmethod
    def leave(self, block: nn.Module, block_output: Any) -> torch.Tensor | None:
        """The concept states in what the re-entered block returned; None behind the last block that has text."""


class CrossBackbone(Backbone):
    """A family whose image tokens read a text that no block updates: concepts have keys there, and no state."""

    @abstractmethod
    def matching_sites(self, transformer: Any) -> list[Site]:
        """See `Backbone.matching_sites`; that is another attention than the one of `sites`."""

    @abstractmethod
    def context(
        self, transformer: Any, embeds: torch.Tensor, like: torch.Tensor, call: Mapping[str, Any], rows: slice
    ) -> torch.Tensor:
        """Concepts as the blocks' cross-attention takes its text `[row, concept, width]`, once per forward pass.

        Args:
            transformer: the model.
            embeds: text encoder states `[row, concept, text_width]`.
            like: the image stream of a block `[batch, token, width]`, in the model's dtype and device.
            call: arguments of the transformer by name, for projections that depend on the timestep.
            rows: the rows of the batch that the concepts belong to.
        """

    def modulate(
        self, block: nn.Module, arguments: Mapping[str, Any], context: torch.Tensor, rows: slice
    ) -> torch.Tensor:
        """Concepts as the cross-attention of one block takes its text, where blocks modulate it.

        Args:
            block: one of those of `sites`.
            arguments: what the block was called with, by name.
            context: what `context` has returned `[row, concept, width]`.
            rows: the rows of the batch that the concepts belong to.
        """
        return context


class JoiningBackbone(JointBackbone):
    """A family whose blocks carry a text stream that concepts can ride in, as `attention="one_pass"` needs."""

    @abstractmethod
    def join(self, arguments: Mapping[str, Any], concepts: torch.Tensor) -> dict[str, Any]:
        """Arguments that call a block with the concepts behind its text.

        Args:
            arguments: what the block is to be called with, by name.
            concepts: concept states `[batch, concept, width]`.
        """

    @abstractmethod
    def part(self, block_output: Any, count: int) -> tuple[Any, torch.Tensor]:
        """What the block would have returned without the concepts, and their states `[batch, concept, width]`.

        Args:
            block_output: what a block called with `join` returned.
            count: number of concepts.
        """
