"""The next step's trajectories, made in a thread while this step trains.

To the other processes it speaks as a thread of that name (hosts.py), so that every process hears both voices in order.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

from mpd_jax.train.making import Begin
from mpd_jax.types import Trajectory


class Ahead:
    """Runs `make(begin)` at once; `begin` is told every phase, and so is `note`. seconds: of each phase, at the end."""

    def __init__(self, make: Callable[[Begin], Sequence[Trajectory]], note: Begin):
        self.seconds: dict[str, float] = defaultdict(float)
        self._make, self._note = make, note
        self._phase: tuple[str, float] | None = None
        self._made: Sequence[Trajectory] = ()
        self._error: BaseException | None = None
        # A daemon: a run that fails does not wait for minutes of sampling.
        self._thread = threading.Thread(target=self._run, name="look-ahead", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the thread is through, well or not."""
        self._thread.join()

    def result(self) -> Sequence[Trajectory]:
        """What was made; what went wrong in the thread is raised here."""
        while self._thread.is_alive():
            self._thread.join(timeout=1.0)  # between two of which signals are heard
        if self._error is not None:
            raise self._error
        return self._made

    def _begin(self, step: int, phase: str) -> None:
        self._end()
        self._note(step, phase)
        self._phase = (phase, time.perf_counter())

    def _end(self) -> None:
        if self._phase is not None:
            name, start = self._phase
            self.seconds[name] += time.perf_counter() - start
            self._phase = None

    def _run(self) -> None:
        try:
            self._made = self._make(self._begin)
        except BaseException as error:  # a stop too: it is the loop that ends
            self._error = error
        finally:
            self._end()
