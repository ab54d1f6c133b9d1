"""How many cases hypothesis tries: few in CI, at least 10,000 over all properties in the nightly profile."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

COMMON = {"deadline": None, "suppress_health_check": [*HealthCheck], "print_blob": True}
settings.register_profile("ci", max_examples=25, **COMMON)
settings.register_profile("nightly", max_examples=1200, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
