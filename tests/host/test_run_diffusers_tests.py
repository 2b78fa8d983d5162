"""diffusers' own tests under captures: on a checkout of a few tests that is written here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import run_diffusers_tests as command
import torch
from tiny_hub import write_tiny_hub
from transformers import (
    AutoTokenizer,
    CLIPTokenizer,
    LlamaTokenizer,
    SiglipImageProcessor,
    SiglipVisionModel,
    T5EncoderModel,
)

MODEL_TESTS = """
import torch
from diffusers import SD3Transformer2DModel

CONFIG = dict(
    sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
    num_attention_heads=4, joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=8,
    pos_embed_max_size=8,
)


class Own(SD3Transformer2DModel):
    def __init__(self):
        super().__init__(**CONFIG)
        self.complete = True


def output(model):
    noise = torch.Generator().manual_seed(0)
    shapes = dict(hidden_states=(1, 4, 8, 8), encoder_hidden_states=(1, 3, 16), pooled_projections=(1, 8))
    inputs = {name: torch.randn(shape, generator=noise) for name, shape in shapes.items()}
    return model(**inputs, timestep=torch.tensor([5.0]))[0]


def test_runs(tmp_path):
    model = SD3Transformer2DModel(**CONFIG)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(output(model), output(SD3Transformer2DModel.from_pretrained(tmp_path)))
    assert Own().complete


def test_draws_no_random_number():
    torch.manual_seed(0)
    output(SD3Transformer2DModel(**CONFIG))
    raise ValueError(f"fails with the same number: {torch.rand(1).item()} {object()}")


def test_fails_with_captures():
    assert not SD3Transformer2DModel(**CONFIG)._forward_pre_hooks


def test_is_skipped():
    import pytest

    pytest.skip("no accelerator")
"""
TESTS = "tests/models/transformers/test_models_transformer_sd3.py"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    checkout = tmp_path / "checkout"
    for name, text in {
        TESTS: MODEL_TESTS,
        "tests/testing_utils.py": "",
        "src/diffusers/__init__.py": '__version__ = "0.99.0"\nraise ImportError("the installed one is to be tested")',
    }.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(text)
    return checkout


def test_outcomes_are_compared(checkout: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    done = subprocess.run(
        [sys.executable, command.__file__, checkout, "--families", "SD3", "--page", page],
        env=os.environ | {"PYTEST_ADDOPTS": "-p no:cacheprovider"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    # Of the three models of the first test, two have run; that of a subclass is not captured.
    assert "SD3\t4\t2\t1\t1\t4\t3\t1\n" in done.stdout
    assert f"different: {TESTS}::test_fails_with_captures" in done.stdout
    text = page.read_text()
    assert "| SD3 | 4 | 2 | 1 | 1 | 4 | 3 | 1 |" in text
    assert "Tests of diffusers 0.99.0 against diffusers " in text
    *_, different, failed = text.split("## ")
    assert different.splitlines()[2:3] == [f"- `{TESTS.removeprefix('tests/')}::test_fails_with_captures`"]
    assert failed.splitlines()[2:3] == [f"- `{TESTS.removeprefix('tests/')}::test_draws_no_random_number`"]


def outcome(end: str = "passed", message: str = "", captures: tuple[int, int] = (1, 1)) -> dict[str, object]:
    return {"outcome": end, "message": message, "captures": list(captures)}


@pytest.mark.parametrize(
    ("captured", "different", "good"),
    [
        ({"a": outcome(), "b": outcome("failed", "1 != 2")}, [], True),
        ({"a": outcome(captures=(1, 0)), "b": outcome("failed", "1 != 2", (2, 0))}, [], False),
        ({"a": outcome("failed", "x"), "b": outcome("failed", "1 != 2")}, ["a"], False),
        ({"a": outcome("skipped"), "b": outcome("failed", "1 != 3")}, ["a", "b"], False),
        ({"a": outcome()}, ["b"], False),
    ],
)
def test_what_is_different(captured: command.Tests, different: list[str], good: bool) -> None:
    plain: command.Tests = {"a": outcome(), "b": outcome("failed", "1 != 2")}
    result = command.Result("SD3", plain, captured)
    assert (result.different, result.good) == (different, good)


def test_a_run_without_outcomes_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(SystemExit, match="pytest ended with status 1:"):
        command.run(tmp_path, ["tests/some.py"], attach=False, workers=0)


def test_a_folder_without_tests_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main([str(tmp_path)])
    assert "holds no tests/testing_utils.py; pass a checkout of diffusers" in capsys.readouterr().err


def test_every_family_is_there() -> None:
    from diffusers_concept_maps.backbones import supported

    assert {"CogVideoXTransformer3DModel", "SD3Transformer2DModel"} <= set(supported())
    assert len({family.transformer for family in command.FAMILIES}) == 5


def test_the_tiny_hub_is_found_offline(tmp_path: Path) -> None:
    write_tiny_hub(tmp_path)
    options = {"cache_dir": tmp_path / "hub", "local_files_only": True}
    t5 = "hf-internal-testing/tiny-random-t5"
    for tokenizer in (
        AutoTokenizer.from_pretrained(t5, **options),
        CLIPTokenizer.from_pretrained("hf-internal-testing/tiny-random-clip", **options),
        LlamaTokenizer.from_pretrained("finetrainers/dummy-hunyaunvideo", subfolder="tokenizer", **options),
    ):
        ids = tokenizer("a dog", padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
        assert ids.shape == (1, 16)
        assert ids.max() < 1000  # as large as the tests' encoders have them
        assert len(set(ids[0].tolist())) > 4
    encoder = T5EncoderModel.from_pretrained(t5, **options)
    assert encoder(torch.tensor([[5, 1]])).last_hidden_state.shape == (1, 2, 32)
    siglip = "hf-internal-testing/tiny-random-SiglipVisionModel"
    pixels = SiglipImageProcessor.from_pretrained(siglip, **options)(torch.zeros(3, 9, 9), return_tensors="pt")
    states = SiglipVisionModel.from_pretrained(siglip, **options)(pixels.pixel_values).last_hidden_state
    assert states.shape == (1, 225, 32)
