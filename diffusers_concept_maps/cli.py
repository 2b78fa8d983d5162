"""The command `concept-maps`: it parses, runs one of `commands`, and says what is wrong in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from diffusers_concept_maps.commands import load_commands
from diffusers_concept_maps.commands._common import printable
from diffusers_concept_maps.errors import ConceptMapsError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, 1 where a gate is red, or 2 with one line on standard error.
    """
    parser = argparse.ArgumentParser(prog="concept-maps", description="Saliency maps of concepts in generated videos.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in load_commands():
        command.register(commands)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except (ConceptMapsError, OSError) as error:
        print(f"concept-maps: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
