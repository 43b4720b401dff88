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
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from etils import epath
from jax.sharding import Mesh

from mpd_jax import hosts
from mpd_jax.files import AnyPath
from mpd_jax.models.hf_weights import export
from mpd_jax.models.lora import Adapted
from mpd_jax.models.peft import export_adapter
from mpd_jax.sampling.agreement import Frozen, by_temperature
from mpd_jax.sampling.known import Known, forget_after
from mpd_jax.sampling.probe import Probe, probe_tokens
from mpd_jax.sampling.proof import TOLERANCE, Proof, judge
from mpd_jax.sampling.servers import ServerConfig, ServerError, Servers, Unreachable
from mpd_jax.sampling.ways import POLL_S, NoReload, PushConfig, Say, Way, choose, way_of
from mpd_jax.types import UserError

TRIES = 5  # of a push, while servers die of it or in the middle of it, and none holds the weights
LINGER_S = 5.0  # for a server that is being given weights when the run ends: it may be paused
WEAKEST = ("undecided", "agrees", "verified")  # a stale server ends the run


class Student(Frozen, Protocol):
    """What is read of the student's files (roles.ModelFiles)."""

    @property
    def adapted(self) -> Adapted | None: ...
    def start(self, mesh: Mesh, seed: int) -> Any: ...


class StaleWeights(ServerError):
    """A server that computes with other weights than it was given, twice. there: its log-probabilities of the proof."""

    def __init__(self, message: str, url: str, there: np.ndarray, proof: Proof):
        super().__init__(message)
        self.url, self.there, self.proof = url, there, proof


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
    """What every server should hold. new: its log-probabilities here; olds: of what it may hold instead (known.py)."""

    version: int
    name: str
    directory: str
    olds: tuple[np.ndarray, ...]
    new: np.ndarray


class WeightPush:
    """whole: the whole weights, of what trains. samples: prompts (with responses, if there are) whose beginnings are
    the proof's positions. key: the API key. seed: the run's. say: told of servers that need a second push or had been
    away. note: told of every push. distrust: told the version last verified when a server turns out to be stale, in
    any thread: what was sampled with later ones may be of no known weights.

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
        distrust: Callable[[int], None] = lambda version: None,
    ):
        self._student, self._whole, self._mesh, self._config, self._seed = student, whole, mesh, config, seed
        self._say, self._note, self._distrust = say, note, distrust
        self._record = run_dir / "proof.npz"
        self._dtype = config.dtype or student.model.dtype
        self._tokens_BT = probe_tokens(samples, student.model.config.vocab_size, seed)
        place = config.directory or f"{run_dir}/served"
        self._place = place if "://" in place else str(Path(place).expanduser().absolute())
        digest = hashlib.blake2b(str(epath.Path(run_dir).absolute()).encode(), digest_size=3)
        self._run = f"mpd-{digest.hexdigest()}-"  # other runs may put theirs on the same servers and in the same place
        self._all = Servers(student.serve, server, key=key, say=say)
        self._alone = lambda urls: Servers(urls, replace(server, patience_s=0.0), key=key, say=say)
        self._one = {url: Servers([url], server, key=key, say=say) for url in self._all.urls}
        self._once = {url: self._alone([url]) for url in self._all.urls}  # a push into which a server dies begins anew
        self._able: set[str] = set()  # those that have the way
        self._locks = {url: threading.Lock() for url in self._all.urls}
        self._way: Way | None = None
        self._probe: Probe | None = None
        self._wanted: _Wanted | None = None
        self._held: dict[str, str] = {}
        self._off: dict[str, np.ndarray] = {}
        self._there: dict[str, np.ndarray] = {}  # what each said last
        self._again: set[str] = set()
        self._known: Known | None = None

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
        start = new if version == 0 else None
        if version > 0 and hosts.from_main(lambda: self._recall().start is None):
            start = probe.here(self._whole(self._student.start(self._mesh, self._seed)))

        def deliver() -> dict:
            try:
                return delivered()
            except StaleWeights as error:
                why = {"url": error.url, "there": error.there.tolist(), "proof": asdict(error.proof)}
                return {"stale": str(error), **why}

        def delivered() -> dict:
            known = self._recall()
            assert self._way is not None
            known.start = known.start if start is None else start
            wanted = _Wanted(version, name, self._upload(name, directory), known.olds(new, version), new)
            proofs = self._deliver(wanted)
            verdict = min((proof.verdict for proof in proofs.values()), key=WEAKEST.index)
            if verdict != "undecided":
                known.verified(new, version)
            again = tuple(sorted(self._again & proofs.keys()))
            seconds = time.monotonic() - began
            return asdict(PushReport(version, self._way.kind, verdict, known.version, seconds, again, proofs))

        told = hosts.from_main(deliver)
        if "stale" in told:
            url, there, proof = told["url"], np.array(told["there"]), Proof(**told["proof"])
            why = by_temperature(probe, weights, there, proof.limit)
            raise StaleWeights(f"{url}: {proof.words}; {why}" if why else told["stale"], url, there, proof)
        proofs = {url: Proof(**proof) for url, proof in told["proofs"].items()}
        report = PushReport(**{**told, "again": tuple(told["again"]), "proofs": proofs})
        self._note(report)
        return report

    def forget_after(self, version: int) -> None:
        """The run has left what came after this version: the next ones bear its numbers with other weights."""
        if hosts.is_main():
            forget_after(self._record, version)
        self._known = None  # the file is read anew

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
                holds = self._way.holds(self._once[url], self._wanted.name)
                if holds or (holds is None and self._prove(url, self._wanted).verdict != "stale"):
                    return
            self._say(f"{url} does not hold the weights of version {self._wanted.version}; it is given them")
            self._bring(url, self._wanted)

    def _ways(self) -> tuple[Way, Probe]:
        """How these servers are given weights, found out at the first push."""
        if self._way is None or self._probe is None:
            student = self._student
            kind = hosts.from_main(self._choose)
            self._way = self._way_of(kind)
            self._probe = Probe(student.model, self._mesh, self._tokens_BT, self._dtype, merge=not self._way.adapter)
        return self._way, self._probe

    def _choose(self) -> str:
        """The way that those have that answer now; one that is away is asked when it is back."""
        for left in reversed(range(TRIES)):
            up = self._up()
            try:
                kind = self._possible(self._config, self._alone(up))
                self._able = set(up)
                return kind
            except Unreachable:
                if not left:
                    raise
        raise AssertionError

    def _possible(self, config: PushConfig, servers: Servers) -> str:
        model = self._student.model
        adapts, experts = self._student.adapted is not None, model.config.experts is not None
        return choose(config, servers, adapts=adapts, experts=experts)

    def _way_of(self, kind: str) -> Way:
        return way_of(kind, self._config, self._say, self._all.config.patience_s)

    def _recall(self) -> Known:
        """Of earlier pushes, this process's or another's. Process 0's."""
        if self._known is None:
            assert self._way is not None
            of = (self._tokens_BT.tobytes(), self._dtype, self._way.adapter)
            self._known = Known(self._record, hashlib.blake2b(repr(of).encode(), digest_size=8).hexdigest())
        return self._known

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

    def _up(self) -> list[str]:
        """Those that answer now. Where none does one is waited for, unless it is the push that starts it again."""
        deadline = time.monotonic() + self._all.config.patience_s
        while True:
            up = [url for url, there in zip(self._all.urls, self._all.alive(), strict=True) if there]
            if up:
                return up
            if self._way is not None and self._way.kind == "restart":
                return list(self._all.urls)
            if time.monotonic() > deadline:
                raise Unreachable(
                    f"{', '.join(self._all.urls)}: nobody answers there, for {self._all.config.patience_s:g} s; start "
                    "the server and run the same command again, or raise sampling.server.patience_s"
                )
            hosts.check()
            time.sleep(POLL_S)

    def _deliver(self, wanted: _Wanted) -> dict[str, Proof]:
        """To all that can be reached; and what is not needed any more is given up."""
        self._wanted = wanted
        self._again.clear()
        for left in reversed(range(TRIES)):
            proofs, lost = self._to_all(self._up(), wanted)
            if proofs:
                break
            if not left or any(error.slow for error in lost):
                raise lost[0]
            self._say(f"{lost[0]}; it is given the weights of version {wanted.version} once more when it is back")
            time.sleep(POLL_S)
        for error in lost:
            self._say(f"{error}; it is given the weights of version {wanted.version} when it is back")
        self._tidy(wanted.name)
        return proofs

    def _to_all(self, urls: Sequence[str], wanted: _Wanted) -> tuple[dict[str, Proof], list[Unreachable]]:
        """At once. What came of it, and of which servers nothing did, for they could not be reached any more."""
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

        # Daemons: a run that ends waits a little for a server, not for long.
        threads = [threading.Thread(target=one, args=(url,), daemon=True) for url in urls]
        for thread in threads:
            thread.start()
        try:
            while not wrong and (running := [thread for thread in threads if thread.is_alive()]):
                running[0].join(0.2)
                hosts.check()
        finally:
            deadline = time.monotonic() + LINGER_S
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
        if wrong:
            raise wrong[0]
        return proofs, lost

    def _bring(self, url: str, wanted: _Wanted) -> Proof:
        """Puts the weights on one server and proves them; once more if they are not there."""
        assert self._way is not None
        server = self._once[url]
        self._held.pop(url, None)
        if url not in self._able:
            self._possible(PushConfig(self._way.kind), server)  # type: ignore[arg-type] - a kind is a way
            self._able.add(url)
        for last in (False, True):
            try:
                self._way.put(server, wanted.name, wanted.directory)
            except NoReload as error:
                if self._config.restart is None:
                    raise NoReload(
                        f"{error}: train an adapter (student.lora), set sampling.push.restart, or serve the student by "
                        "jax"
                    ) from None
                self._say(f"{error}; from now on weights come by restart")
                self._way = self._way_of("restart")
                self._way.put(server, wanted.name, wanted.directory)
            proof = self._proved(url, wanted)
            if proof.verdict != "stale":
                self._held[url] = wanted.name
                self._way.tidy(server, wanted.name, self._run)
                return proof
            if not last:
                self._again.add(url)
                self._say(f"{url}: {proof.words}; the weights of version {wanted.version} are pushed once more")
        self._distrust(self._recall().version)
        raise StaleWeights(
            f"{url}: it was given the weights of version {wanted.version} twice and computes with others "
            f"({proof.words}). What it would sample belongs to no known weights. Look whether it reads "
            f"{wanted.directory} and computes in {self._dtype} (sampling.push.dtype); one that reloads wrongly, as "
            "some do with experts or quantised weights, needs sampling.push.way=restart",
            url,
            self._there[url],
            proof,
        )

    def _proved(self, url: str, wanted: _Wanted) -> Proof:
        """The proof after a push. Unreachable where the server was started again since, and has lost the weights."""
        way = self._way
        assert way is not None

        def lost() -> bool:
            return way.holds(self._once[url], wanted.name) is False

        gone = Unreachable(f"{url}: it was started again while it was given the weights of version {wanted.version}")
        try:
            proof = self._prove(url, wanted)
        except Unreachable:
            raise
        except ServerError:
            if lost():
                raise gone from None
            raise
        if proof.verdict == "stale" and lost():
            raise gone
        return proof

    def _prove(self, url: str, wanted: _Wanted) -> Proof:
        assert self._probe is not None
        found = self._there[url] = self._probe.there(self._one[url], self.model_name())
        tolerance, off = TOLERANCE[self._dtype], self._off.get(url)
        judged = partial(judge, found, wanted.new, self._probe.prompt, tolerance, off=off)
        proofs = [judged(old=old) for old in wanted.olds or (None,)]
        proof = next((proof for proof in proofs if proof.verdict == "stale"), proofs[0])
        if proof.verdict in ("agrees", "verified"):
            self._off[url] = found - wanted.new
        return proof
