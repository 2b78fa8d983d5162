"""The pipeline with maps in its output is the stock pipeline in every other respect."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import tiny_cogvideox as tiny
from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline, CogVideoXVideoToVideoPipeline, DiffusionPipeline
from diffusers.pipelines.cogvideo.pipeline_output import CogVideoXPipelineOutput
from torch import nn

import diffusers_concept_maps as dcm

CONCEPTS = ["dog", "running", "sky"]
STOCK_CALL = CogVideoXPipeline.__call__


class ConceptPipeline(dcm.ConceptMapsMixin, CogVideoXPipeline):
    """What a user writes to have a pipeline class of his own."""


@pytest.fixture
def stock() -> CogVideoXPipeline:
    return tiny.make_pipeline()


def arguments(**options: Any) -> dict[str, Any]:
    given = {
        "prompt": "a dog on the beach",
        "num_inference_steps": 2,
        "guidance_scale": 4.0,
        "max_sequence_length": tiny.TEXT_LENGTH,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        **tiny.SIZE,
    }
    return given | options


def expected_maps(stock: CogVideoXPipeline, **options: Any) -> dcm.ConceptMaps:
    with dcm.trace(stock, CONCEPTS, **options) as maps:
        stock(**arguments())
    return maps


@pytest.mark.parametrize("make", [dcm.with_concept_maps, lambda pipe: ConceptPipeline(**pipe.components)])
def test_the_output_has_frames_first_and_maps_last(stock: CogVideoXPipeline, make: Any) -> None:
    frames = stock(**arguments()).frames
    expected = expected_maps(stock)
    pipe = make(stock)
    assert isinstance(pipe, dcm.ConceptMapsMixin)
    assert isinstance(pipe, CogVideoXPipeline)
    output = pipe(**arguments(), concepts=CONCEPTS)
    assert isinstance(output, CogVideoXPipelineOutput)
    assert isinstance(output, dcm.ConceptMapsPipelineOutput)
    assert list(output.keys()) == ["frames", "concept_maps"]
    assert torch.equal(output.frames, frames)
    assert output[0] is output.frames is output["frames"]
    assert output[1] is output.concept_maps is output["concept_maps"] is output.to_tuple()[-1]
    assert torch.equal(output.concept_maps.get(), expected.get())
    assert output.concept_maps.metadata == expected.metadata


@pytest.mark.parametrize("output_type", ["latent", "pt", "np", "pil"])
@pytest.mark.parametrize("return_dict", [True, False])
def test_every_output_type(stock: CogVideoXPipeline, output_type: str, return_dict: bool) -> None:
    options = arguments(output_type=output_type, return_dict=return_dict)
    expected = stock(**options)
    options["generator"] = torch.Generator().manual_seed(0)
    output = dcm.with_concept_maps(stock)(**options, concepts=CONCEPTS)
    assert isinstance(output, dcm.ConceptMapsPipelineOutput if return_dict else tuple)
    assert len(output) == len(expected) + 1 == 2
    assert type(output[0]) is type(expected[0])
    assert np.array_equal(np.asarray(output[0]), np.asarray(expected[0]))
    assert torch.equal(output[1].get(), expected_maps(stock).get())


def test_options_of_trace_are_taken(stock: CogVideoXPipeline) -> None:
    options: dict[str, Any] = {
        "methods": ["imap", "gramcol"],
        "layers": [1, 2],
        "steps": [1],
        "heads": [0, 3],
        "normalize": "none",
        "branch": "both",
        "token_policy": "first",
    }
    expected = expected_maps(stock, **options)
    maps = dcm.with_concept_maps(stock)(**arguments(), concepts=CONCEPTS, **options).concept_maps
    assert list(maps) == ["cond", "uncond"]
    for branch in maps:
        assert maps[branch].methods == ("imap", "gramcol")
        assert torch.equal(maps[branch].get("imap"), expected[branch].get("imap"))
        assert torch.equal(maps[branch].get("gramcol"), expected[branch].get("gramcol"))


def test_embeddings_in_place_of_concepts(stock: CogVideoXPipeline) -> None:
    embeds = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    output = dcm.with_concept_maps(stock)(**arguments(), concept_embeds=embeds)
    with dcm.trace(stock, concept_embeds=embeds) as maps:
        stock(**arguments())
    assert output.concept_maps.concepts == ("concept 0", "concept 1", "concept 2")
    assert torch.equal(output.concept_maps.get(), maps.get())


def test_arguments_by_position(stock: CogVideoXPipeline) -> None:
    pipe = dcm.with_concept_maps(stock)
    given = arguments()
    prompt, generator = given.pop("prompt"), torch.Generator().manual_seed(0)
    frames = pipe(**arguments(), concepts=CONCEPTS).frames
    given = {name: value for name, value in given.items() if name not in ("height", "width", "generator")}
    output = pipe(prompt, None, 48, 80, generator=generator, concepts=CONCEPTS, **given)
    assert torch.equal(output.frames, frames)


@pytest.mark.parametrize("without", [{}, {"concepts": None}, {"concepts": None, "concept_embeds": None}])
def test_a_call_without_concepts_is_the_stock_call(stock: CogVideoXPipeline, without: dict[str, Any]) -> None:
    pipe = dcm.with_concept_maps(stock)
    output = pipe(**arguments(), **without)
    assert type(output) is CogVideoXPipelineOutput
    assert torch.equal(output.frames, stock(**arguments()).frames)
    as_tuple = pipe(**arguments(return_dict=False), **without)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == 1


@pytest.mark.parametrize("option", [{"methods": ["imap"]}, {"layers": [0]}, {"branch": "both"}, {"steps": None}])
def test_options_without_concepts_are_refused(stock: CogVideoXPipeline, option: dict[str, Any]) -> None:
    with pytest.raises(dcm.ConceptMapsError, match=f"{next(iter(option))} given without concepts"):
        dcm.with_concept_maps(stock)(**arguments(), **option)


def test_wrong_arguments_are_refused_and_leave_the_pipeline_usable(stock: CogVideoXPipeline) -> None:
    pipe = dcm.with_concept_maps(stock)
    processors = dict(pipe.transformer.attn_processors)
    with pytest.raises(dcm.ConceptMapsValueError, match="no concepts"):
        pipe(**arguments(), concepts=[])
    with pytest.raises(dcm.ConceptMapsValueError, match="unknown method 'x'"):
        pipe(**arguments(), concepts=CONCEPTS, methods=["x"])
    with pytest.raises(TypeError, match="unexpected keyword argument 'concept'"):
        pipe(**arguments(), concepts=CONCEPTS, concept="dog")
    with pytest.raises(ValueError, match="divisible by 8"):
        pipe(**arguments(height=3), concepts=CONCEPTS)
    with dcm.trace(pipe, CONCEPTS), pytest.raises(dcm.ConceptMapsError, match="traced already"):
        pipe(**arguments(), concepts=CONCEPTS)
    assert all(pipe.transformer.attn_processors[name] is processors[name] for name in processors)
    assert torch.equal(pipe(**arguments(), concepts=CONCEPTS).frames, stock(**arguments()).frames)


@pytest.mark.parametrize("cls", [ConceptPipeline, None], ids=["own class", "with_concept_maps"])
def test_the_signature_names_the_stock_parameters_and_ours(stock: CogVideoXPipeline, cls: Any) -> None:
    pipe = dcm.with_concept_maps(stock) if cls is None else cls(**stock.components)
    parameters = list(inspect.signature(pipe.__call__).parameters.values())
    expected = list(inspect.signature(stock.__call__).parameters.values())
    assert [str(p) for p in parameters[: len(expected)]] == [str(p) for p in expected]
    ours = list(inspect.signature(dcm.trace).parameters.values())[1:]
    assert [(p.name, p.default) for p in parameters[len(expected) :]] == [(p.name, p.default) for p in ours]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters[len(expected) :])
    assert "CogVideoXPipeline" in type(pipe).__call__.__doc__


def test_the_pipeline_handed_in_stays_what_it_is(stock: CogVideoXPipeline) -> None:
    config, attributes = dict(stock.config), dict(vars(stock))
    frames = stock(**arguments()).frames
    attributes |= {name: value for name, value in vars(stock).items() if name not in attributes}
    pipe = dcm.with_concept_maps(stock)
    pipe(**arguments(), concepts=CONCEPTS)
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    assert type(stock) is CogVideoXPipeline
    assert CogVideoXPipeline.__call__ is STOCK_CALL
    assert "set_attn_processor" not in vars(CogVideoXPipeline)
    assert dict(stock.config) == config
    assert vars(stock).keys() == attributes.keys()
    assert stock.scheduler is attributes["scheduler"]
    output = stock(**arguments())
    assert type(output) is CogVideoXPipelineOutput
    assert torch.equal(output.frames, frames)


def test_components_and_settings_are_shared(stock: CogVideoXPipeline) -> None:
    bar = io.StringIO()
    stock.set_progress_bar_config(file=bar, desc="mine")
    pipe = dcm.with_concept_maps(stock)
    assert all(pipe.components[name] is component for name, component in stock.components.items())
    assert type(pipe).__name__ == "CogVideoXPipeline"
    assert type(pipe) is type(dcm.with_concept_maps(tiny.make_pipeline()))
    pipe(**arguments(), concepts=CONCEPTS)
    lines = [line for line in bar.getvalue().replace("\n", "\r").split("\r") if line.strip()]
    assert all(line.startswith("mine") for line in lines)  # one bar, and it is the stock one
    assert [("| 0/2 " in line) for line in lines].count(True) == 1
    assert "| 2/2 " in lines[-1]


def test_no_dtype_is_changed() -> None:
    stock = tiny.make_pipeline(dtype=torch.bfloat16)
    stock.vae.to(torch.float32)

    def dtypes() -> dict[str, Any]:
        return {name: part.dtype for name, part in stock.components.items() if isinstance(part, nn.Module)}

    before = dtypes()
    output = dcm.with_concept_maps(stock)(**arguments(), concepts=CONCEPTS)
    assert dtypes() == before
    assert before == {"text_encoder": torch.bfloat16, "vae": torch.float32, "transformer": torch.bfloat16}
    assert output.frames.dtype == torch.bfloat16
    assert output.concept_maps.get().dtype == torch.float32


def test_other_pipeline_classes_can_be_mixed(stock: CogVideoXPipeline) -> None:
    other = CogVideoXVideoToVideoPipeline(**stock.components)
    other.set_progress_bar_config(disable=True)
    pipe = dcm.with_concept_maps(other)
    video = [torch.rand(9, 3, 48, 80, generator=torch.Generator().manual_seed(4))]
    given = {name: value for name, value in arguments().items() if name != "num_frames"}
    frames = other(video, **given, strength=1.0).frames
    output = pipe(video, **given | {"generator": torch.Generator().manual_seed(0)}, strength=1.0, concepts=CONCEPTS)
    assert torch.equal(output.frames, frames)
    assert output.concept_maps.get().shape == (1, 3, *tiny.GRID)
    assert type(pipe) is not type(dcm.with_concept_maps(stock))


def test_a_pipeline_is_not_mixed_twice(stock: CogVideoXPipeline) -> None:
    with pytest.raises(dcm.ConceptMapsError, match="returns concept maps already"):
        dcm.with_concept_maps(dcm.with_concept_maps(stock))
    with pytest.raises(dcm.ConceptMapsError, match="this ConceptPipeline returns concept maps already"):
        dcm.with_concept_maps(ConceptPipeline(**stock.components))


def test_only_supported_pipelines_are_mixed(stock: CogVideoXPipeline) -> None:
    with pytest.raises(dcm.ConceptMapsValueError, match="object has no transformer to trace"):
        dcm.with_concept_maps(object())
    stock.transformer = nn.Linear(1, 1)
    with pytest.raises(dcm.ConceptMapsError, match="Linear cannot be traced; supported are .*, CogVideoXTrans"):
        dcm.with_concept_maps(stock)


def test_a_subclass_keeps_what_it_overrides(stock: CogVideoXPipeline) -> None:
    class Own(dcm.ConceptMapsMixin, CogVideoXPipeline):  # type: ignore[misc]  # untyped host
        def __call__(self, *args: Any, **options: Any) -> Any:
            return "mine"

    class More(Own):
        pass

    class Plain(ConceptPipeline):
        pass

    assert Own(**stock.components)() == "mine"
    assert More(**stock.components)() == "mine"
    maps = Plain(**stock.components)(**arguments(), concepts=CONCEPTS).concept_maps
    assert torch.equal(maps.get(), expected_maps(stock).get())


@pytest.mark.parametrize("make", [dcm.with_concept_maps, lambda pipe: ConceptPipeline(**pipe.components)])
def test_saved_pipelines_are_stock_pipelines(stock: CogVideoXPipeline, make: Any, tmp_path: Path) -> None:
    stock.save_pretrained(tmp_path / "stock")
    pipe = make(stock)
    pipe.save_pretrained(tmp_path / "ours")
    written = [json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("stock", "ours")]
    assert written[0] == written[1]
    assert written[0]["_class_name"] == "CogVideoXPipeline"
    frames = stock(**arguments()).frames
    for cls in (DiffusionPipeline, CogVideoXPipeline):
        loaded = cls.from_pretrained(tmp_path / "ours")
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is CogVideoXPipeline
        assert torch.equal(loaded(**arguments()).frames, frames)
    ours = ConceptPipeline.from_pretrained(tmp_path / "stock")
    assert type(ours) is ConceptPipeline
    assert torch.equal(ours(**arguments(), concepts=CONCEPTS).concept_maps.get(), expected_maps(stock).get())


def test_from_pipe_of_an_own_class(stock: CogVideoXPipeline) -> None:
    pipe = ConceptPipeline.from_pipe(stock)
    assert pipe.transformer is stock.transformer
    assert torch.equal(pipe(**arguments(), concepts=CONCEPTS).concept_maps.get(), expected_maps(stock).get())


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda output: pickle.loads(pickle.dumps(output))])
def test_outputs_can_be_copied_and_pickled(stock: CogVideoXPipeline, copied: Any) -> None:
    output = dcm.with_concept_maps(stock)(**arguments(), concepts=CONCEPTS, methods=["imap", "gramcol"])
    again = copied(output)
    assert type(again) is type(output)
    assert list(again.keys()) == ["frames", "concept_maps"]
    assert torch.equal(again.frames, output.frames)
    assert again.concept_maps.concepts == output.concept_maps.concepts
    assert again.concept_maps.metadata == output.concept_maps.metadata
    for method in output.concept_maps.methods:
        assert torch.equal(again.concept_maps.get(method), output.concept_maps.get(method))


def test_a_pickled_output_holds_no_model(stock: CogVideoXPipeline) -> None:
    output = dcm.with_concept_maps(stock)(**arguments(), concepts=CONCEPTS)
    weights = sum(p.numel() * p.element_size() for p in stock.transformer.parameters())
    assert len(pickle.dumps(output)) < weights / 4
