"""Sampled responses on disk as they come, so that a run that is killed asks only for the ones that it lacks."""

import json
from collections.abc import Collection

from mpd_jax import files
from mpd_jax.sampling.sampler import Response


class Spill:
    """A file of one call's responses, a JSON line each; a key says of a response all that it may depend on."""

    def __init__(self, path: files.AnyPath):
        self._path = path
        self._lines: files.Lines | None = None

    def begin(self, keys: Collection[str]) -> dict[str, Response]:
        """Those of a call that are there already. All others go: their call is over, and its outcome stored elsewhere.

        A line that a kill cut short is left out, and so is any other that cannot be read.
        """
        wanted, found = set(keys), {}
        text = (files.read(self._path) or b"").decode(errors="replace")
        for line in text.split("\n"):
            try:
                key, ids, logprobs, ended = json.loads(line)
                if key in wanted:
                    found[key] = Response(tuple(ids), tuple(logprobs), ended)
            except (ValueError, TypeError):
                continue
        files.write_atomically(self._path, "".join(_line(key, response) + "\n" for key, response in found.items()))
        self._lines = files.Lines(self._path)
        return found

    def add(self, key: str, response: Response) -> None:
        assert self._lines is not None, "begin comes before add"
        self._lines.add(_line(key, response))

    def clear(self) -> None:
        self.close()
        files.remove(self._path)

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
            self._lines = None


def _line(key: str, response: Response) -> str:
    return json.dumps([key, response.ids, response.logprobs, response.ended], separators=(",", ":"))
