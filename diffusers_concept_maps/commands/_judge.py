"""The arguments of a judge, for every sub-command that can have maps rated; without its URL there is none."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from diffusers_concept_maps.errors import ConceptMapsValueError

if TYPE_CHECKING:
    from diffusers_concept_maps.evaluation.judge import Judge


def add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `judge_of` reads."""
    judge = parser.add_argument_group(
        "judge",
        "Have maps rated by a model behind an endpoint with OpenAI's chat protocol. Frames are sent to it; the key is "
        "read from the environment variable CONCEPT_MAPS_JUDGE_KEY.",
    )
    judge.add_argument("--judge-url", metavar="URL", help="such as https://host/v1; default: nothing is sent anywhere")
    judge.add_argument("--judge-model", metavar="NAME", help="the endpoint's name of the model")
    judge.add_argument(
        "--judge-default-temperature",
        action="store_true",
        help="send no temperature, for models that refuse one; default: 0, as in the paper",
    )


def judge_of(options: argparse.Namespace) -> Judge | None:
    """The judge that was asked for, if one was.

    Raises:
        ConceptMapsValueError: a URL without a model or a model without a URL, or a URL that cannot be used.
    """
    if (options.judge_url is None) != (options.judge_model is None):
        given, missing = (
            ("--judge-url", "--judge-model") if options.judge_url is not None else ("--judge-model", "--judge-url")
        )
        raise ConceptMapsValueError(f"{given} is there without {missing}; a judge needs both")
    if options.judge_url is None:
        return None
    from diffusers_concept_maps.evaluation.judge_endpoint import ChatJudge

    temperature = None if options.judge_default_temperature else 0.0
    return ChatJudge(options.judge_url, options.judge_model, temperature)
