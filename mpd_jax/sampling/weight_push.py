"""The student's new weights on the servers that hold it: written, handed over, and proved (proof.py) at each of them.

Every process calls `push`, for weights and the proof's own numbers are sharded; process 0 alone speaks to servers. Its
servers are its own: the sampler's ask `admit` before they give a server work, and that asks here.
"""

import hashlib
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from etils import epath
from jax.sharding import Mesh

from mpd_jax import hosts
from mpd_jax.files import AnyPath
from mpd_jax.models.decoder import Model
from mpd_jax.models.hf_weights import export
from mpd_jax.models.lora import Adapted
from mpd_jax.models.peft import export_adapter
from mpd_jax.sampling.probe import Probe, probe_tokens
from mpd_jax.sampling.proof import TOLERANCE, Proof, judge
from mpd_jax.sampling.servers import ServerConfig, ServerError, Servers, Unreachable
from mpd_jax.sampling.ways import PushConfig, Say, Way, choose, way_of
from mpd_jax.types import UserError

WEAKEST = ("undecided", "agrees", "verified")  # a stale server ends the run


class Student(Protocol):
    """What is read of the student's files (roles.ModelFiles)."""

    @property
    def directory(self) -> Path: ...
    @property
    def model(self) -> Model: ...
    @property
    def adapted(self) -> Adapted | None: ...
    @property
    def serve(self) -> tuple[str, ...]: ...


class StaleWeights(ServerError):
    """A server that computes with other weights than it was given, twice."""


@dataclass(frozen=True)
class PushReport:
    """A version on its servers. proofs: by URL, of those that were reachable.

    verdict: the weakest of theirs. verified: the version that was last verified on all, or agreed as the first.
    again: servers that were stale at first. seconds: of the whole.
    """

    version: int
    way: str
    verdict: str
    verified: int
    seconds: float
    again: tuple[str, ...]
    proofs: dict[str, Proof]

    @property
    def weakest(self) -> Proof:
        return min(self.proofs.values(), key=lambda proof: WEAKEST.index(proof.verdict))

    @property
    def words(self) -> str:
        return f"weights of version {self.version} by {self.way} in {self.seconds:.1f} s, {self.weakest.words}"


@dataclass(frozen=True)
class _Wanted:
    """What every server should hold. old, new: log-probabilities here, of the weights last verified and of these."""

    version: int
    name: str
    directory: str
    old: np.ndarray | None
    new: np.ndarray


class WeightPush:
    """whole: the whole weights, of what trains. samples: prompts (with responses, if there are) whose beginnings are
    the proof's positions. key: the API key. say: told of servers that need a second push or had been away. note: told
    of every push.

    Nothing is asked of the servers before the first push.
    """

    def __init__(
        self,
        student: Student,
        whole: Callable[[Any], Any],
        mesh: Mesh,
        run_dir: AnyPath,
        samples: Sequence[Sequence[int]],
        *,
        server: ServerConfig,
        key: str | None,
        config: PushConfig,
        seed: int,
        say: Say,
        note: Callable[[PushReport], None] = lambda report: None,
    ):
        self._student, self._whole, self._mesh, self._config = student, whole, mesh, config
        self._say, self._note = say, note
        self._dtype = config.dtype or student.model.dtype
        self._tokens_BT = probe_tokens(samples, student.model.config.vocab_size, seed)
        place = config.directory or f"{run_dir}/served"
        self._place = place if "://" in place else str(Path(place).expanduser().absolute())
        digest = hashlib.blake2b(str(epath.Path(run_dir).absolute()).encode(), digest_size=3)
        self._run = f"mpd-{digest.hexdigest()}-"  # other runs may put theirs on the same servers and in the same place
        self._all = Servers(student.serve, server, key=key, say=say)
        self._one = {url: Servers([url], server, key=key, say=say) for url in self._all.urls}
        self._locks = {url: threading.Lock() for url in self._all.urls}
        self._way: Way | None = None
        self._probe: Probe | None = None
        self._wanted: _Wanted | None = None
        self._held: dict[str, str] = {}
        self._off: dict[str, np.ndarray] = {}
        self._again: set[str] = set()
        self._old: np.ndarray | None = None
        self._verified = -1

    def push(self, trained: Any, version: int) -> PushReport:
        """These weights are on every server that can be reached, and proved. StaleWeights where they are not.

        A server that is away gets them when it is back, before any work (`admit`).
        """
        began = time.monotonic()
        way, probe = self._ways()
        name = self._run + hosts.from_main(lambda: f"{version}-{secrets.token_hex(3)}")
        weights = self._whole(trained)
        directory = self._write(name, trained, weights, way.adapter)
        new = probe.here(weights)

        def deliver() -> dict:
            wanted = _Wanted(version, name, self._upload(name, directory), self._old, new)
            proofs = self._deliver(wanted)
            verdict = min((proof.verdict for proof in proofs.values()), key=WEAKEST.index)
            if verdict != "undecided":
                self._old, self._verified = new, version
            again = tuple(sorted(self._again & proofs.keys()))
            report = PushReport(version, way.kind, verdict, self._verified, time.monotonic() - began, again, proofs)
            return asdict(report)

        told = hosts.from_main(deliver)
        proofs = {url: Proof(**proof) for url, proof in told["proofs"].items()}
        report = PushReport(**{**told, "again": tuple(told["again"]), "proofs": proofs})
        self._note(report)
        return report

    def model_name(self) -> str:
        """What requests name as their model now. Process 0's to ask."""
        if self._way is None or self._wanted is None:
            return self._all.model
        return self._way.model(self._all, self._wanted.name)

    def admit(self, url: str) -> None:
        """Before a server is given work, and again after it was away: it holds the present weights. Process 0's."""
        if self._wanted is None or self._way is None:
            return
        with self._locks[url]:
            if self._held.get(url) == self._wanted.name:
                holds = self._way.holds(self._one[url], self._wanted.name)
                if holds or (holds is None and self._prove(url, self._wanted).verdict != "stale"):
                    return
            self._say(f"{url} does not hold the weights of version {self._wanted.version}; it is given them")
            self._bring(url, self._wanted)

    def _ways(self) -> tuple[Way, Probe]:
        """How these servers are given weights, found out at the first push."""
        if self._way is None or self._probe is None:
            student, config = self._student, self._config
            adapts, experts = student.adapted is not None, student.model.config.experts is not None
            kind = hosts.from_main(lambda: choose(config, self._all, adapts=adapts, experts=experts))
            self._way = way_of(kind, config, self._say)
            self._probe = Probe(student.model, self._mesh, self._tokens_BT, self._dtype, merge=not self._way.adapter)
        return self._way, self._probe

    # Files

    def _write(self, name: str, trained: Any, weights: Any, adapter: bool) -> Path:
        """The directory of a version, complete, on a disk of process 0. Every process takes part."""
        student = self._student
        out = Path(tempfile.gettempdir() if "://" in self._place else self._place) / name
        try:
            if adapter:
                assert student.adapted is not None
                export_adapter(out, student.adapted, trained, str(student.directory))
            else:
                export(out, student.directory, student.model, weights, dtype=self._dtype, untie=True)
        except OSError as error:
            raise UserError(
                f"sampling.push.directory: {out} could not be written: {error.strerror or error}; free space or mend "
                "permissions there, or choose another, and run the same command again"
            ) from error
        return out

    def _upload(self, name: str, written: Path) -> str:
        """The directory as servers see it."""
        if "://" in self._place:
            try:
                there = epath.Path(self._place) / name
                there.mkdir(parents=True, exist_ok=True)
                for file in (file for file in written.rglob("*") if file.is_file()):
                    target = there / file.relative_to(written)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    epath.Path(file).copy(target)
            except Exception as error:  # every object store has errors of its own
                raise UserError(
                    f"sampling.push.directory: {self._place} could not be written: {error}; mend permissions there"
                ) from error
            finally:
                shutil.rmtree(written, ignore_errors=True)
        return f"{(self._config.seen_as or self._place).rstrip('/')}/{name}"

    def _tidy(self, keep: str) -> None:
        """Directories of earlier versions, and what a killed run left, are gone."""
        for directory in list(epath.Path(self._place).iterdir()):
            if directory.name.lstrip(".").startswith(self._run) and directory.name != keep:
                directory.rmtree(missing_ok=True)

    # Servers

    def _deliver(self, wanted: _Wanted) -> dict[str, Proof]:
        """To all that can be reached, at once; and what is not needed any more is given up."""
        self._wanted = wanted
        self._again.clear()
        alive = [url for url, up in zip(self._all.urls, self._all.alive(), strict=True) if up]
        proofs: dict[str, Proof] = {}
        lost: list[Unreachable] = []

        wrong: list[BaseException] = []

        def one(url: str) -> None:
            try:
                with self._locks[url]:
                    proofs[url] = self._bring(url, wanted)
            except Unreachable as error:
                lost.append(error)
            except BaseException as error:  # raised below, in the thread that was called
                wrong.append(error)

        urls = alive or list(self._all.urls)  # where none answers now, one that is started again is waited for
        # Daemons: a run that is stopped does not wait for a server.
        threads = [threading.Thread(target=one, args=(url,), daemon=True) for url in urls]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            threads[-1].join(0.2) if threads[-1].is_alive() else threads.pop()
            hosts.check()
        if wrong or not proofs:
            raise [*wrong, *lost][0]
        for error in lost:
            self._say(f"{error}; it is given the weights of version {wanted.version} when it is back")
        self._tidy(wanted.name)
        return proofs

    def _bring(self, url: str, wanted: _Wanted) -> Proof:
        """Puts the weights on one server and proves them; once more if they are not there."""
        assert self._way is not None
        server = self._one[url]
        self._held.pop(url, None)
        for last in (False, True):
            self._way.put(server, wanted.name, wanted.directory)
            proof = self._prove(url, wanted)
            if proof.verdict != "stale":
                self._held[url] = wanted.name
                self._way.tidy(server, wanted.name, self._run)
                return proof
            if not last:
                self._again.add(url)
                self._say(f"{url}: {proof.words}; the weights of version {wanted.version} are pushed once more")
        raise StaleWeights(
            f"{url}: it was given the weights of version {wanted.version} twice and computes with others "
            f"({proof.words}). What it would sample belongs to no known weights. Look whether it reads "
            f"{wanted.directory} and computes in {self._dtype} (sampling.push.dtype); one that reloads wrongly, as "
            "some do with experts or quantised weights, needs sampling.push.way=restart"
        )

    def _prove(self, url: str, wanted: _Wanted) -> Proof:
        assert self._probe is not None
        found = self._probe.there(self._one[url], self.model_name())
        tolerance, off = TOLERANCE[self._dtype], self._off.get(url)
        proof = judge(found, wanted.new, self._probe.prompt, tolerance, old=wanted.old, off=off)
        if proof.verdict in ("agrees", "verified"):
            self._off[url] = found - wanted.new
        return proof
