"""Settings for the whole test run: hypothesis profiles, quiet compute threads."""

import os

from hypothesis import HealthCheck, settings

# A few examples on every run; HYPOTHESIS_PROFILE=thorough searches longer, ci is reproducible.
_SLOW_MACHINE = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile("dev", max_examples=20, deadline=None, suppress_health_check=_SLOW_MACHINE)
settings.register_profile("ci", max_examples=20, deadline=None, derandomize=True, suppress_health_check=_SLOW_MACHINE)
settings.register_profile("thorough", max_examples=500, deadline=None, suppress_health_check=_SLOW_MACHINE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))
