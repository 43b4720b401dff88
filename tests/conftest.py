"""The strict environment every test runs in: 8 CPU devices, rank promotion an error, warnings as errors.

Machine code is not optimised: most of a test's time is compiling what runs once. What XLA makes of a program (fusions,
layouts, collectives) is the same. XLA_FLAGS=--xla_backend_optimization_level=3 brings the whole of it back.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
)

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
