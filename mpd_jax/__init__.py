"""Mixed-policy distillation in JAX: teach a small reasoning model to think in fewer tokens."""

__version__ = "0.1.0"
