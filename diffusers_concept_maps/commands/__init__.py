"""The sub-commands of `concept-maps`, one file each; every module beside this one is loaded, except `_*.py`.

A module is named after its command. Its function `register(commands)` adds the parser of its arguments to the action
that `ArgumentParser.add_subparsers` returned, with the function that runs it as the default of `run`: from the parsed
arguments to the exit status. Heavy modules are imported inside functions, so that `--help` stays quick.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def load_commands() -> list[ModuleType]:
    """The modules of all sub-commands, sorted by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return [importlib.import_module(f"{__name__}.{name}") for name in names]
