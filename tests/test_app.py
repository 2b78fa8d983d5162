"""The page of examples/app.py: what its functions make, and that its controls are tied to them.

Gradio is no dependency: a stand-in takes down which control calls what, and where it is installed the page is served.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import diffusers_concept_maps as dcm
from diffusers_concept_maps.media import read_frames

PROMPT = "a red circle moving right and a blue square moving right on dark background"
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def app() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("app")
        for name in ("app", "_models"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def studio(app: ModuleType) -> Any:
    return app.Studio()


@pytest.fixture(scope="module")
def look(studio: Any) -> Iterator[Any]:
    made = studio.generate(PROMPT, "red, blue, background", "concept_attention", 2, 2)
    yield made
    made.discard()


def pixels(frames: Any) -> np.ndarray:
    return read_frames(frames).frames.numpy()


def differ(first: Any, second: Any) -> float:
    """Mean difference of two videos in 0..1; what the codec makes of pictures with sharp edges is below .01."""
    return float(np.abs(pixels(first) - pixels(second)).mean())


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_the_pipeline_makes_what_it_makes_without_the_page(look: Any) -> None:
    pipe = dcm.load_shapes_pipeline()
    call = {"num_inference_steps": 2, "guidance_scale": 4.0, "max_sequence_length": 20}
    with dcm.trace(pipe, ["red", "blue", "background"]) as maps:
        frames = pipe(PROMPT, generator=torch.Generator().manual_seed(2), **call).frames[0]
    assert torch.equal(look.maps.get(), maps.get())
    assert np.array_equal(pixels(look.frames)[:, :, 5::10, 5::10], pixels(frames))  # ten times as large


def test_a_pipeline_by_its_name(app: ModuleType, look: Any) -> None:
    named = app.Studio(str(Path(dcm.__file__).parent / "shapes" / "pipeline"))
    assert named.steps == 50  # that of the host's class
    named._call["guidance_scale"] = 4.0
    own = named.generate(PROMPT, "red, blue, background", "concept_attention", 2, 2)
    assert torch.equal(own.maps.get(), look.maps.get())
    own.discard()


def test_two_users_at_once_get_their_own(app: ModuleType, studio: Any, look: Any) -> None:
    asked = [(PROMPT, "red, blue, background"), ("a green triangle moving up on dark background", "green")]
    with ThreadPoolExecutor(2) as users:
        first, second = users.map(lambda own: studio.generate(*own, "concept_attention", 2, 2), asked)
    assert torch.equal(first.maps.get(), look.maps.get())
    assert second.maps.concepts == ("green",)
    assert first.folder.name != second.folder.name
    assert app.segmentation(second) is None  # one concept alone
    for own in (first, second):
        own.discard()
        assert not Path(own.folder.name).exists()


def test_the_overlay_is_that_of_the_concept(app: ModuleType, look: Any) -> None:
    assert differ(app.overlay(look, "blue", 0.5), look.maps["blue"].overlay(look.frames, opacity=0.5)) < 0.01
    assert differ(app.overlay(look, "blue", 0.0), app.video(look)) < 0.001
    assert differ(app.overlay(look, "blue", 0.5), app.overlay(look, "red", 0.5)) > 0.02
    with pytest.raises(dcm.ConceptMapsError, match="opacity is 7"):
        app.overlay(look, "blue", 7)
    with pytest.raises(dcm.ConceptMapsError, match="'green' was not captured"):
        app.overlay(look, "green", 0.5)


def test_the_segmentation_has_the_colors_of_the_table(app: ModuleType, look: Any) -> None:
    labels = look.maps.get()[0].argmax(0).numpy()
    table = np.array([list(bytes.fromhex(row[1][1:])) for row in app.scores(look)])
    colored = np.kron(table[labels], np.ones((1, 40, 40, 1)))  # [frame, height, width, 3]
    expected = (colored / 255 + pixels(look.frames).transpose(0, 2, 3, 1)) / 2
    assert np.abs(pixels(app.segmentation(look)).transpose(0, 2, 3, 1) - expected).mean() < 0.03  # chroma is halved


def test_curves_and_numbers_are_those_of_the_maps(app: ModuleType, look: Any) -> None:
    maps = look.maps.get()[0].double().numpy()
    curves = maps.mean((2, 3))  # the embedded model has a token frame for each frame
    figure = app.timeline(look)
    for line, curve in zip(figure.axes[0].lines, curves, strict=True):
        np.testing.assert_allclose(line.get_ydata(), curve, rtol=1e-5)
    assert legend(figure) == ["red", "blue", "background"]
    for row, scores, curve in zip(app.scores(look), maps, curves, strict=True):
        assert len(row) == len(app.HEADERS)
        found = [float(number) for number in row[2:5]]
        np.testing.assert_allclose(found, [scores.min(), scores.mean(), scores.max()], rtol=1e-3)
        assert int(row[5]) == curve.argmax()


def test_math_is_not_typeset(app: ModuleType, look: Any) -> None:
    named = SimpleNamespace(concepts=("$red$", "_blue", "<b>"), get=look.maps.get, geometry=look.maps.geometry)
    figure = app.timeline(app.Look(look.frames, named, look.folder))
    assert legend(figure) == ["$red$", "_blue", "<b>"]
    assert not any(text.get_parse_math() for text in figure.axes[0].get_legend().get_texts())


def test_files_to_take_away(app: ModuleType, look: Any, tmp_path: Path) -> None:
    maps, overlay, page = app.export(look, "red", 0.25)
    assert torch.equal(dcm.load(maps).get(), look.maps.get())
    assert differ(overlay, look.maps["red"].overlay(look.frames, opacity=0.25)) < 0.01
    look.maps.report(tmp_path / "expected.html", look.frames)
    assert Path(page).read_bytes() == (tmp_path / "expected.html").read_bytes()


def test_what_a_form_may_hold(app: ModuleType, studio: Any) -> None:
    assert app.names(" red ,blue\n\nmoving right, red,") == ["red", "blue", "moving right"]
    for text in ("", " , ", ",".join("abcdefghi")):
        with pytest.raises(dcm.ConceptMapsError, match="concepts; expected 1 to 8"):
            app.names(text)
    for steps in (0, 101, 2.5, float("nan"), "2"):
        with pytest.raises(dcm.ConceptMapsError, match="the number of steps is .* from 1 to 100"):
            studio.generate(PROMPT, "red", "imap", 2, steps)
    with pytest.raises(dcm.ConceptMapsError, match="the seed is -1"):
        studio.generate(PROMPT, "red", "imap", -1, 2)
    with pytest.raises(dcm.ConceptMapsError, match="nonsense"):
        studio.generate(PROMPT, "red", "nonsense", 2, 2)


def test_methods_are_those_of_the_pipeline(app: ModuleType, studio: Any) -> None:
    assert studio.methods == ["concept_attention", "cross_attention", "gramcol", "imap"]
    wan, _ = sys.modules["_models"].tiny_wan("a dog")
    methods = app.methods_of(wan.transformer)
    assert "concept_attention" not in methods
    with dcm.trace(wan, ["dog"], methods=methods):
        pass


def test_without_gradio_the_page_says_so(app: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(dcm.ConceptMapsError, match="the page needs gradio .* pip install gradio"):
        app.require_gradio()


class Control:
    """A control, a row or the page itself; it notes what is called when something happens to it."""

    def __init__(self, page: StandIn, *args: Any, **options: Any) -> None:
        self.page, self.args, self.options = page, args, options

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was opened."""

    def happened(self, function: Any, inputs: list[Control], outputs: Any, **_: Any) -> None:
        self.page.events.append((self, function, inputs, outputs))

    click = input = release = happened

    def queue(self, **_: Any) -> Control:
        return self

    def launch(self, **options: Any) -> None:
        self.page.launched = options


class StandIn(ModuleType):
    """In place of gradio."""

    class Error(Exception):
        def __init__(self, message: str, print_exception: bool) -> None:
            super().__init__(message)

    update = staticmethod(dict)

    def __init__(self) -> None:
        super().__init__("gradio")
        self.events: list[Any] = []
        self.launched: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if not name[0].isupper():
            raise AttributeError(name)
        return lambda *args, **options: Control(self, *args, **options)


def test_controls_are_tied_to_what_they_say(app: ModuleType, studio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    page = StandIn()
    monkeypatch.setitem(sys.modules, "gradio", page)
    app.page(studio)
    form = {"Prompt": PROMPT, "Concepts, with commas between them": "red, blue", "Method": "cross_attention"}
    session: dict[str | None, Any] = {**form, "Seed": 2, "Steps": 2, "Concept": None, "Opacity": 0.6, None: None}

    def use(control: str) -> None:
        for source, function, inputs, outputs in page.events:
            if control in (source.options.get("label"), *source.args):
                made = function(*(session[entry.options.get("label")] for entry in inputs))
                listed = isinstance(outputs, list)
                for entry, value in zip(outputs if listed else [outputs], made if listed else [made], strict=True):
                    session[entry.options.get("label")] = value

    for control in ("Export", "Opacity", "Concept"):
        with pytest.raises(page.Error, match="generate a video first"):
            use(control)
    use("Generate")
    look = session[None]
    assert session["Concept"] == {"choices": ["red", "blue"], "value": "red"}
    assert differ(session["Video"], look.frames) < 0.01
    assert Path(session["Overlay"]).name == "overlay_0_0.60.mp4"
    assert [row[0] for row in session["Scores"]] == ["red", "blue"]
    session |= {"Concept": "blue", "Opacity": 0.2}
    use("Opacity")
    assert differ(session["Overlay"], look.maps["blue"].overlay(look.frames, opacity=0.2)) < 0.01
    use("Export")
    assert [Path(file).name for file in session["Files"]][:2] == ["maps.safetensors", "overlay_1_0.20.mp4"]
    session["Concept"] = "<script>alert(1)</script>"
    with pytest.raises(page.Error, match="&lt;script&gt;alert"):
        use("Opacity")
    look.discard()


def test_the_page_is_served_to_this_machine_alone(app: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    page = StandIn()
    monkeypatch.setitem(sys.modules, "gradio", page)
    monkeypatch.setattr(sys, "argv", ["app.py"])
    app.main()
    assert page.launched == {"server_name": "127.0.0.1", "server_port": None, "share": False}


if importlib.util.find_spec("gradio"):  # an extra of this one example, which the suite does without

    def test_two_users_of_the_real_page(app: ModuleType, studio: Any) -> None:
        from gradio_client import Client

        blocks = app.page(studio)
        _, url, _ = blocks.queue().launch(server_name="127.0.0.1", share=False, prevent_thread_lock=True, quiet=True)
        try:
            users = [Client(url, verbose=False) for _ in range(2)]
            words = ("red", "blue")
            jobs = [
                user.submit(PROMPT, f"{word}, background", "concept_attention", 2, 2, 0.6, api_name="/generate")
                for user, word in zip(users, words, strict=True)
            ]
            for job, word in zip(jobs, words, strict=True):
                assert job.result()[1]["value"] == word
            for user, word in zip(users, words, strict=True):
                files = user.predict(word, 0.3, api_name="/export")
                assert dcm.load(files[0]).concepts == (word, "background")
            with pytest.raises(Exception, match="not in the list of choices"):
                users[0].predict("blue", 0.3, api_name="/overlay")
        finally:
            blocks.close()
