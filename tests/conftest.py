"""What holds for all tests: hypothesis measures no time, which on a busy machine says nothing about the code."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("diloco", deadline=None)
settings.load_profile("diloco")
