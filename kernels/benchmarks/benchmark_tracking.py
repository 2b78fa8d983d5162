"""What following points adds to a pass of a transformer: CPU time with and without, one thread, interleaved pairs.

A CogVideoX transformer of random weights, with the heads and the positions of CogVideoX-2B, makes one pass over frames
of noise that ends behind its deepest layer, plain and while 30 points are matched in that layer with every frame and
back. The clock goes around `SinglePass.run`, which has the pass and the matching, and around nothing else: frames are
encoded once for a whole video.

The matches must be those of a softmax over all tokens in float64; otherwise no ratio is printed.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import diffusers
import torch
from benchmark_capture import Size, bootstrap_interval
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import nn

import diffusers_concept_maps as dcm
from diffusers_concept_maps.attachment import DeepestLayerReached
from diffusers_concept_maps.single_pass import SinglePass

POINTS = 30
LIMIT = 1.05
LEVEL = 0.02
STRIDE = 16  # pixels of a token
FULL = Size(frames=13, height=12, width=18, heads=30, head_width=64, layers=4, text=226, text_width=4096)
SMALL = Size(frames=3, height=4, width=5, heads=6, head_width=16, layers=2, text=11, text_width=32)


def pipeline(size: Size) -> CogVideoXPipeline:
    """A stock pipeline around a transformer of random weights, with a small VAE and no text encoder."""
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.head_width,
        text_embed_dim=size.text_width,
        num_layers=size.layers,
        sample_width=2 * size.width,
        sample_height=2 * size.height,
        sample_frames=4 * size.frames - 3,
        max_text_seq_length=size.text,
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
    )
    pipe = CogVideoXPipeline(None, None, vae.eval(), transformer.eval(), CogVideoXDDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Subject:
    """A pipeline of one size, a video of as many frames as it takes in a pass, and points in the first of them."""

    def __init__(self, size: Size) -> None:
        self.size, self.pipe = size, pipeline(size)
        self._call = {"prompt": None, "prompt_embeds": torch.randn(1, size.text, size.text_width)}
        height, width = STRIDE * size.height, STRIDE * size.width
        self.video = torch.rand(size.frames, 3, height, width)
        self.points = torch.cat([torch.zeros(POINTS, 1), torch.rand(POINTS, 2) * torch.tensor([width, height])], dim=1)
        self.points[:, 1:] -= 0.5
        self._plain = SinglePass(self.pipe, prompt="", call=self._call)
        encoded = [self._plain.encode(frame[None, :, None]) for frame in self.video]
        self._latents = torch.cat(encoded, dim=2)

    def tracked(self, **options: Any) -> tuple[float, Any]:
        """CPU seconds of the pass of a tracking run, and what it gives."""
        with clocked() as seconds:
            out = dcm.track(
                self.pipe,
                self.video,
                self.points,
                layers=self.size.layers - 1,
                noise_level=LEVEL,
                call=self._call,
                **options,
            )
        (once,) = seconds  # one pass
        return once, out

    def plain(self) -> float:
        """CPU seconds of the same pass without points."""

        def stop(block: nn.Module, args: Any, output: Any) -> None:
            raise DeepestLayerReached

        clip = self.video[:1].expand(4 * self.size.frames - 3, -1, -1, -1)
        hook = self.pipe.transformer.transformer_blocks[-1].register_forward_hook(stop)
        try:
            with clocked() as seconds:
                self._plain.run(self._latents, LEVEL, clip, noised=False)
        finally:
            hook.remove()
        return seconds[0]

    def check(self) -> None:
        """Compare the matches with those of queries and keys that hooks take from a plain pass.

        Raises:
            SystemExit: they differ.
        """
        sides: dict[str, torch.Tensor] = {}
        attention = self.pipe.transformer.transformer_blocks[-1].attn1
        hooks = [
            norm.register_forward_hook(lambda module, args, output, name=name: sides.update({name: output}))
            for name, norm in (("query", attention.norm_q), ("key", attention.norm_k))
        ]
        self.plain()
        for hook in hooks:
            hook.remove()
        query, key = (
            sides[name][-1, :, self.size.text :].double().unflatten(1, (self.size.frames, -1))
            for name in ("query", "key")
        )
        width = self.size.width
        x, y = ((self.points[:, 1:] + 0.5) / STRIDE - 0.5).round().long().unbind(1)
        own = (y.clamp(0, self.size.height - 1) * width + x.clamp(0, width - 1)).tolist()
        _, out = self.tracked(readout="argmax")
        for frame in range(1, self.size.frames):
            there = (query[:, 0, own] @ key[:, frame].mT * self.size.head_width**-0.5).softmax(-1)
            back = (query[:, frame] @ key[:, 0].mT * self.size.head_width**-0.5).softmax(-1)[:, :, own].mT
            match = (there + back).mean(0).argmax(-1)
            expected = (torch.stack([match % width, match // width], dim=-1) + 0.5) * STRIDE - 0.5
            if not torch.allclose(out.tracks[:, frame], expected.float(), atol=1e-3):
                raise SystemExit("the matches are not those of all weights in float64: no ratio is reported")


@contextmanager
def clocked() -> Iterator[list[float]]:
    """CPU seconds of every single pass that is made."""
    seconds: list[float] = []
    stock = SinglePass.run

    def run(single: SinglePass, *args: Any, **options: Any) -> None:
        start = time.process_time()
        stock(single, *args, **options)
        seconds.append(time.process_time() - start)

    with mock.patch.object(SinglePass, "run", run):
        yield seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs, after runs that are not timed")
    parser.add_argument("--small", action="store_true", help="a size of milliseconds, to check that the script works")
    options = parser.parse_args()
    if options.pairs < 1:
        parser.error(f"--pairs is {options.pairs}; expected at least 1")
    torch.set_num_threads(1)
    size = SMALL if options.small else FULL
    print(f"{size}\n{POINTS} points, the last layer, there and back; float32, one thread")
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, {platform.platform()}", flush=True)
    subject = Subject(size)
    subject.check()  # warms up as well
    ratios = []
    for index in range(options.pairs):
        steps = [subject.plain, lambda: subject.tracked()[0]]
        first, second = (step() for step in (steps if index % 2 == 0 else steps[::-1]))
        plain, tracked = (first, second) if index % 2 == 0 else (second, first)
        ratios.append(tracked / plain)
        print(
            f"pair {index + 1}: {plain:.4g} s plain, {tracked:.4g} s with points, ratio {ratios[-1]:.3f}", flush=True
        )
    table = torch.tensor(ratios, dtype=torch.float64)
    low, high = bootstrap_interval(table)
    print(
        f"matches equal; median ratio {table.quantile(0.5):.3f}, 95% bootstrap interval {low:.3f} to {high:.3f}, "
        f"{options.pairs} pairs; at most {LIMIT} is wanted at full size"
    )


if __name__ == "__main__":
    main()
