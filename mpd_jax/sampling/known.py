"""What servers may hold instead of the newest weights, as log-probabilities of a proof's positions (proof.py).

They outlive the process that pushed: a run that is started again finds servers with weights of its start, or of the
last push before. So they are kept in a file of the run directory.
"""

import io
import zipfile
from typing import Any

import numpy as np

from mpd_jax import files
from mpd_jax.files import AnyPath
from mpd_jax.sampling.proof import VISIBLE


class Known:
    """start, last: [N], of the weights that the run began with and of those of `version`, which were verified last;
    None and -1 as long as there are none.

    of: whatever else these numbers depend on. Those of a file that were made under another are not used.
    """

    def __init__(self, path: AnyPath, of: str):
        self._path, self._of = path, of
        self.start: np.ndarray | None = None
        self.last: np.ndarray | None = None
        self.version = -1
        if record := _read(path):
            self.version = int(record["version"])
            if str(record["of"]) == of:
                self.start, self.last = record["start"], record["last"]

    def olds(self, new: np.ndarray, version: int) -> tuple[np.ndarray, ...]:
        """What a server without the new weights [N] would answer, the likeliest first."""
        # Verified before the run was started again: they are the new ones.
        same = self.last is not None and self.version == version and np.abs(new - self.last).max() < VISIBLE
        last = () if self.last is None or same else (self.last,)
        start = () if self.start is None or version == 0 else (self.start,)
        if start and last and np.array_equal(start[0], last[0]):
            start = ()
        return (*last, *start)

    def verified(self, new: np.ndarray, version: int) -> None:
        """These are the last ones from here on, also for later processes."""
        assert self.start is not None, "the start is known by the first push"
        self.last, self.version = new, version
        _write(self._path, {"of": self._of, "start": self.start, "last": new, "version": version})


def forget_after(path: AnyPath, version: int) -> None:
    """Later versions are none any more: of them none was verified, though servers may hold the weights of the last."""
    record = _read(path)
    if record and int(record["version"]) > version:
        _write(path, {**record, "version": version})


def _read(path: AnyPath) -> dict[str, Any]:
    """Nothing where there is none, or it is damaged."""
    try:
        with np.load(io.BytesIO(files.read(path) or b"")) as record:
            return {name: record[name] for name in ("of", "start", "last", "version")}
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile):
        return {}


def _write(path: AnyPath, record: dict[str, Any]) -> None:
    out = io.BytesIO()
    np.savez(out, **record)
    files.write_atomically(path, out.getvalue())
