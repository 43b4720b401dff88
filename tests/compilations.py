"""What the backend really compiles: an input whose sharding changed compiles again without a new trace."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax.monitoring


@contextmanager
def compilations() -> Iterator[Counter[str]]:
    """Compilations inside the block, by name: "jit(f)" of a jitted `f`."""
    seen: Counter[str] = Counter()

    def listen(event: str, seconds: float, **details: Any) -> None:
        if "backend_compile" in event:
            seen[details["fun_name"]] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
