"""What a capture adds to a transformer's forward pass: CPU time with and without it, one thread, interleaved pairs.

A stock CogVideoX pipeline around a random transformer takes one guided step, so that the batch holds an unconditional
and a conditional video and the capture records the conditional one, as in use. Only the transformer's call is timed,
by hooks that are set before the capture's own: the clock starts before the capture begins and stops after its last
layer.

The noise predictions with and without capture must be equal bit for bit; otherwise no ratio is printed.
"""

from __future__ import annotations

import argparse
import platform
import time
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

import diffusers_concept_maps as dcm

METHODS = ("imap", "concept_attention")
CONCEPTS = 4
LIMIT = 1.05
RESAMPLES = 10_000


@dataclass(frozen=True)
class Size:
    """One transformer and its token grid.

    Attributes:
        frames: latent frames.
        height: rows of tokens.
        width: columns of tokens.
        heads: attention heads.
        head_width: their width.
        layers: transformer blocks.
        text: prompt tokens.
        text_width: width of the text encoder states.
    """

    frames: int
    height: int
    width: int
    heads: int
    head_width: int
    layers: int
    text: int
    text_width: int


FULL = Size(frames=13, height=30, width=45, heads=8, head_width=64, layers=2, text=226, text_width=4096)
SMALL = Size(frames=5, height=6, width=9, heads=8, head_width=16, layers=2, text=16, text_width=64)


class ForwardClock:
    """Times every call of a module and keeps its output.

    Attributes:
        seconds: process CPU time of the last call.
        output: first item of its output.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.seconds = 0.0
        self.output = torch.empty(0)
        module.register_forward_pre_hook(self._start)
        module.register_forward_hook(self._stop)

    def _start(self, module: torch.nn.Module, args: Any) -> None:
        self.seconds = time.process_time()

    def _stop(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self.seconds = time.process_time() - self.seconds
        self.output = output[0]


def stock_pipeline(size: Size, dtype: torch.dtype = torch.float32, device: str = "cpu") -> CogVideoXPipeline:
    """A stock pipeline around a transformer of random weights; it has no tokenizer, text encoder or VAE."""
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
        use_rotary_positional_embeddings=True,
    )
    transformer.eval().to(device, dtype)
    pipe = CogVideoXPipeline(None, None, None, transformer, CogVideoXDDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def guided_step(size: Size, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    """Arguments of a pipeline's call of one guided step, that is a batch of 2, on random embeddings and noise."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(device, dtype)

    return {
        "prompt_embeds": random(1, size.text, size.text_width),
        "negative_prompt_embeds": random(1, size.text, size.text_width),
        "latents": random(1, size.frames, 16, 2 * size.height, 2 * size.width),
        "height": 16 * size.height,
        "width": 16 * size.width,
        "num_frames": 4 * size.frames - 3,
        "num_inference_steps": 1,
        "guidance_scale": 6.0,
        "output_type": "latent",
    }


class Subject:
    """A pipeline of one size with fixed inputs."""

    def __init__(self, size: Size) -> None:
        self.pipe = stock_pipeline(size)
        self.clock = ForwardClock(self.pipe.transformer)
        self.concepts = torch.randn(CONCEPTS, size.text_width)
        self.inputs = guided_step(size)

    def forward(self, *, captured: bool) -> tuple[float, torch.Tensor]:
        """CPU seconds and noise prediction of one forward pass.

        Raises:
            ConceptMapsError: the capture has recorded nothing.
        """
        if not captured:
            self.pipe(**self.inputs)
            return self.clock.seconds, self.clock.output
        with dcm.trace(self.pipe, concept_embeds=self.concepts, methods=METHODS) as maps:
            self.pipe(**self.inputs)
        for method in METHODS:
            maps.get(method)
        return self.clock.seconds, self.clock.output

    def pair(self, *, captured_first: bool) -> tuple[float, float]:
        """CPU seconds of a stock and a captured forward pass.

        Raises:
            SystemExit: their outputs differ.
        """
        order = (True, False) if captured_first else (False, True)
        results = {captured: self.forward(captured=captured) for captured in order}
        if not torch.equal(results[False][1], results[True][1]):
            raise SystemExit("the noise predictions with and without capture differ: no ratio is reported")
        return results[False][0], results[True][0]


def bootstrap_interval(ratios: torch.Tensor) -> tuple[float, float]:
    """95% percentile bootstrap interval of the median.

    Args:
        ratios: one per pair `[pair]`.
    """
    picks = torch.randint(len(ratios), (RESAMPLES, len(ratios)), generator=torch.Generator().manual_seed(0))
    medians = ratios[picks].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=ratios.dtype)).tolist()
    return low, high


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9, help="timed pairs, after one that is not timed")
    parser.add_argument("--small", action="store_true", help="a size of milliseconds, to check that the script works")
    options = parser.parse_args()
    if options.pairs < 1:
        parser.error(f"--pairs is {options.pairs}; expected at least 1")
    torch.set_num_threads(1)
    size = SMALL if options.small else FULL
    print(f"{size}\n{CONCEPTS} concepts, {', '.join(METHODS)}; batch 2, float32, one thread")
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, {platform.platform()}", flush=True)
    subject = Subject(size)
    subject.pair(captured_first=False)  # warms up, and compares the outputs before anything is timed
    ratios = []
    for index in range(options.pairs):
        stock, captured = subject.pair(captured_first=index % 2 == 1)
        ratios.append(captured / stock)
        print(
            f"pair {index + 1}: {stock:.4g} s without, {captured:.4g} s with capture, ratio {ratios[-1]:.3f}",
            flush=True,
        )
    table = torch.tensor(ratios, dtype=torch.float64)
    low, high = bootstrap_interval(table)
    print(
        f"outputs equal; median ratio {table.quantile(0.5):.3f}, 95% bootstrap interval {low:.3f} to {high:.3f}, "
        f"{options.pairs} pairs; at most {LIMIT} is wanted at full size"
    )


if __name__ == "__main__":
    main()
