"""Conditions of tests that more than one module has."""

from __future__ import annotations

import platform
import sys

import pytest

needs_xformers = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="xformers is made for GPUs: Linux on x86-64 alone",
)
