"""A run directory in a bucket: one trainer, the same files, checkpoints that are whole or not there.

The bucket is another program's (tests/bucket.py), reached through the same libraries as Google's own.
"""

import gc
import itertools
import os
import threading
import time
from importlib import import_module, util

import pytest
from google.cloud import storage

from mpd_jax import config, files, hosts, lock
from mpd_jax.data.problems import read_file
from mpd_jax.files import Lines, read, write_atomically, written_here
from mpd_jax.lock import locked
from mpd_jax.run import recorded_cost, refuse_another_run
from mpd_jax.train.checkpoint import Checkpoints
from mpd_jax.train.metrics import Metrics, Seconds, read_rows
from mpd_jax.train.records import Records
from mpd_jax.train.state import abstract
from mpd_jax.types import UserError
from tests import bucket
from tests.e2e.tiny import QUICKSTART
from tests.test_checkpoint import assert_equal, make_state
from tests.test_metrics import out
from tests.test_records import PROBLEMS, trajectory

# Client libraries leave sessions and, of a damaged array, open reads behind; they are told of when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
numbers = itertools.count()


@pytest.fixture(scope="module", autouse=True)
def _bucket():
    with bucket.in_this_process():
        yield
        gc.collect()  # here, and not in the test of another module


@pytest.fixture
def run_dir():
    return files.path(f"gs://bucket/runs/run {next(numbers)}")


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.glob("*"))


def prefix(directory) -> str:
    return str(directory).removeprefix("gs://bucket/")


def outage():
    raise RuntimeError("503, backend error")


def objects(directory) -> list[storage.Blob]:
    """All of them, through another library than the package's own way."""
    return list(storage.Client().list_blobs("bucket", prefix=f"{prefix(directory)}/"))


# Files


def test_a_file_is_written_read_replaced_and_removed(run_dir):
    path = run_dir / "deep" / "config.yaml"
    assert read(path) is None and not files.is_file(path)
    for content in ("old", "ändert sich\n"):
        write_atomically(path, content)
        assert read(path) == content.encode() and files.is_file(path) and names(run_dir / "deep") == ["config.yaml"]
    for _ in range(2):
        files.remove(path)
        assert read(path) is None and names(run_dir) == []


def test_what_another_process_writes_is_seen_at_once(run_dir):
    write_atomically(run_dir / "a", "1")
    assert [path.name for path in run_dir.iterdir()] == ["a"] and not files.is_file(run_dir / "b")
    storage.Client().bucket("bucket").blob(f"{prefix(run_dir)}/b").upload_from_string("2")
    assert [path.name for path in run_dir.iterdir()] == ["a", "b"] and read(run_dir / "b") == b"2"


def test_only_process_0_writes(run_dir, monkeypatch):
    monkeypatch.setattr(hosts, "is_main", lambda: False)
    write_atomically(run_dir / "a", "1")
    lines = Lines(run_dir / "b")
    lines.add("1")
    lines.close()
    assert names(run_dir) == []


def test_lines_are_in_the_object_soon_after_and_at_a_flush_and_a_later_start_goes_on_with_it(run_dir, monkeypatch):
    monkeypatch.setattr(files, "PUT_AFTER_S", 1000.0)
    path, puts = run_dir / "phase.log", []
    lines = Lines(path)
    put = type(path).write_bytes
    monkeypatch.setattr(type(path), "write_bytes", lambda path, data: puts.append(bytes(data)) or put(path, data))
    lines.add("one")
    lines.add("two")
    assert read(path) is None
    lines.flush()
    lines.flush()
    assert puts == [b"one\ntwo\n"] == [read(path)]
    monkeypatch.setattr(files, "PUT_AFTER_S", 0.0)
    again = Lines(path)
    again.add("three")
    deadline = time.monotonic() + 20
    while read(path) != b"one\ntwo\nthree\n":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    again.close()
    lines.close()


def test_no_line_waits_for_a_put_and_the_next_put_takes_it_along(run_dir, monkeypatch):
    monkeypatch.setattr(files, "PUT_AFTER_S", 1000.0)
    path, began, over = run_dir / "phase.log", threading.Event(), threading.Event()
    lines, put = Lines(path), type(path).write_bytes

    def slow(path, data):
        began.set()
        assert over.wait(30)
        return put(path, data)

    monkeypatch.setattr(type(path), "write_bytes", slow)
    lines.add("one")
    putting, adding = threading.Thread(target=lines.flush), threading.Thread(target=lines.add, args=("two",))
    putting.start()
    assert began.wait(30)
    adding.start()
    adding.join(5)
    waits = adding.is_alive()
    over.set()
    putting.join(30)
    assert not waits and read(path) == b"one\n"
    lines.close()
    assert read(path) == b"one\ntwo\n"


def test_an_outage_costs_no_line_and_is_told_at_a_flush(run_dir, monkeypatch):
    monkeypatch.setattr(files, "PUT_AFTER_S", 0.0)
    path, tried = run_dir / "metrics.jsonl", threading.Event()

    def refused(path, data):
        tried.set()
        outage()

    lines = Lines(path)
    with monkeypatch.context() as patch:
        patch.setattr(type(path), "write_bytes", refused)
        lines.add("one")
        assert tried.wait(20)
        with pytest.raises(UserError, match=r"run.dir: gs://.*metrics.jsonl could not be written: 503"):
            lines.flush()
    lines.flush()
    assert read(path) == b"one\n"


def test_a_tree_that_was_written_here_is_in_the_bucket_and_no_longer_here(run_dir):
    with written_here(run_dir / "profile") as here:
        (here / "plugins").mkdir()
        (here / "plugins" / "trace").write_bytes(b"\0\1")
    assert read(run_dir / "profile" / "plugins" / "trace") == b"\0\1" and not here.exists()


def test_a_bucket_that_is_not_there_is_one_message(run_dir):
    missing = files.path("gs://no-such-bucket/run")
    with pytest.raises(UserError, match=r"run.dir: gs://no-such-bucket/run could not be written: "), locked(missing):
        pass
    with pytest.raises(UserError, match=r"run.dir: gs://no-such-bucket/run/a could not be written: "):
        write_atomically(missing / "a", "1")


def test_a_missing_storage_library_is_named(monkeypatch):
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gs://bucket/run: .* needs gcsfs: pip install 'mpd-jax\[gcs\]'"):
        files.path("gs://bucket/run")


# The lock


@pytest.fixture
def quick(monkeypatch):
    """A heart that beats 40 times a second."""
    for name, seconds in (("BEAT_S", 0.025), ("LOOK_S", 0.05), ("DEAD_AFTER_S", 1.0)):
        monkeypatch.setattr(lock, name, seconds)


def test_a_run_has_one_trainer_and_its_lock_goes_with_it(run_dir, quick):
    for _ in range(2):
        with locked(run_dir):
            held = (read(run_dir / ".lock") or b"").decode()
            assert held.startswith(f"process {os.getpid()} on ")
            refused = rf"is being trained by process {os.getpid()} on .*\(since 20"
            with pytest.raises(UserError, match=refused), locked(run_dir):
                pass
        assert read(run_dir / ".lock") is None


def test_a_dead_process_is_waited_for_and_then_taken_over_by_one(run_dir, quick, monkeypatch):
    dead = lock._Held(run_dir, lambda text: None)
    dead._ended.set()
    dead._beats.join()
    said, ends = [], []
    began = time.monotonic()

    def start():
        try:
            with locked(run_dir, said.append):
                ends.append("trained")
                time.sleep(1.5)
        except UserError as error:
            ends.append(str(error))

    starts = [threading.Thread(target=start) for _ in range(3)]
    for each in starts:
        each.start()
    for each in starts:
        each.join()
    assert time.monotonic() - began > 1.0 and all("waiting 1 s for a sign of life" in text for text in said)
    assert ends.count("trained") == 1 and sum("being trained by" in end for end in ends) == 2


def test_a_holder_that_was_taken_over_ends_and_leaves_the_lock_to_the_other(run_dir, quick, monkeypatch):
    ended = []
    monkeypatch.setattr(lock, "_end", ended.append)
    monkeypatch.setattr(lock, "BEAT_S", 1.0)
    held = lock._Held(run_dir, lambda text: None)
    other = held._bucket.blob(held._name)
    other.metadata = {"host": "elsewhere", "pid": "7", "since": "today"}
    other.upload_from_string("")
    held._beats.join(20)
    assert "was taken over by process 7 on elsewhere (since today)" in ended[0]
    deleted = []
    monkeypatch.setattr(type(other), "delete", lambda blob, **asked: deleted.append(asked["if_generation_match"]))
    held.release()
    assert deleted == [held._generation] != [other.generation]


def test_a_put_whose_answer_was_lost_is_known_as_ones_own(run_dir, quick, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 1000.0)
    held = lock._Held(run_dir, lambda text: None)
    before = held._generation
    assert held._put()
    held._generation = before
    assert held._put() and held._put() and held._generation != before
    held.release()


# What a run keeps


def test_records_read_back_and_those_of_later_steps_are_forgotten(run_dir):
    records = Records(run_dir, seed=7)
    whole = [trajectory("b "), trajectory("a", original=trajectory("a"))]
    records.save(3, [trajectory()], stage="written")
    assert records.load(3, PROBLEMS) is None and records.load(3, PROBLEMS, stage="written") == [trajectory()]
    for step in (3, 12, 13):
        records.save(step, whole)
    assert Records(run_dir, seed=7).load(3, PROBLEMS) == whole
    records.forget_after(3)
    assert names(records.directory) == ["step_000003.jsonl.gz"]
    write_atomically(records.path(3), (read(records.path(3)) or b"")[:-10])
    assert records.load(3, PROBLEMS) is None


def test_rows_are_there_before_a_save_and_a_resumed_run_cuts_off_what_it_does_again(run_dir, monkeypatch):
    monkeypatch.setattr(files, "PUT_AFTER_S", 1000.0)
    metrics = Metrics(run_dir, 0)
    for step in range(4):
        metrics.add(step, out(), {}, lambda: Seconds({}, {}))
    metrics.settle(behind=1)
    metrics.flush()
    assert [row["step"] for row in read_rows(metrics.path)] == [0, 1, 2]
    again = Metrics(run_dir, 2)
    again.add(2, out(loss=9.0), {}, lambda: Seconds({}, {}))
    again.settle()
    again.close()
    assert [(row["step"], row["loss"]) for row in read_rows(metrics.path)] == [(0, 1.5), (1, 1.5), (2, 9.0)]


def test_the_config_and_the_processes_of_a_run_are_kept(run_dir):
    settings = config.load(QUICKSTART, [f"run.dir={str(run_dir).replace(' ', '-')}"])
    refuse_another_run(run_dir, settings)
    write_atomically(run_dir / "config.yaml", config.to_yaml(settings))
    assert config.load(str(run_dir / "config.yaml")) == settings
    with pytest.raises(UserError, match=r"run.seed = 1, and 0 there"):
        refuse_another_run(run_dir, config.load(QUICKSTART, ["run.seed=1"]))
    for start, step in ((0, 2), (2, 5)):
        with recorded_cost(run_dir, start, 5, 0.0) as saving:
            saving(step)
    assert [row["steps"] for row in read_rows(run_dir / "processes.jsonl")] == [2, 3]


# Checkpoints


@pytest.fixture
def opened():
    """Checkpoints that are closed at the end."""
    all_opened = []

    def open_(*args, **kwargs) -> Checkpoints:
        all_opened.append(Checkpoints(*args, **kwargs))
        return all_opened[-1]

    yield open_
    for each in all_opened:
        each.close()


def test_a_checkpoint_reads_back_the_same_bits_and_the_oldest_goes(run_dir, opened):
    saved = opened(run_dir, keep=2, keep_best="accuracy")
    state = make_state()
    assert saved.restore(abstract(state)) is None
    for step, accuracy in ((3, 0.9), (4, 0.1), (5, 0.2), (6, 0.3)):
        saved.note(step, {"accuracy": accuracy}, None)
        saved.save(state._replace(step=step))
    saved.wait()
    assert names(saved.directory) == ["3", "5", "6", "figures.json"]
    looked = opened(run_dir, keep=2, keep_best="accuracy", read_only=True)
    assert_equal(looked.restore(abstract(state)), state._replace(step=6))
    assert looked.restore_one(abstract(state), "best").step == 3


def test_a_save_that_was_cut_short_is_no_checkpoint_and_is_cleared_away(run_dir, opened):
    saved = opened(run_dir, keep=3)
    state = make_state(self_copy=False)
    for step in (3, 4):
        saved.save(state._replace(step=step))
        saved.wait()
    (saved.directory / "4" / "commit_success.txt").unlink()
    assert opened(run_dir, keep=3, read_only=True).restore(abstract(state)).step == 3
    assert names(saved.directory) == ["3", "4"]
    again = opened(run_dir, keep=3)
    assert names(saved.directory) == ["3"] and again.restore(abstract(state)).step == 3
    again.save(state._replace(step=4))
    again.wait()
    assert_equal(opened(run_dir, keep=3).restore(abstract(state)), state._replace(step=4))


@pytest.mark.parametrize("how", ["no metadata", "cut short"])
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_is_used(run_dir, opened, how, monkeypatch):
    saved = opened(run_dir, keep=3)
    state = make_state(self_copy=False)
    for step in (3, 4):
        saved.save(state._replace(step=step))
        saved.wait()
    sizes = {blob.name: blob.size for blob in objects(saved.directory / "4")}
    hit = f"{prefix(saved.directory)}/4/run/metadata" if how == "no metadata" else max(sizes, key=sizes.__getitem__)
    path = files.path(f"gs://bucket/{hit}")
    write_atomically(path, (read(path) or b"")[: sizes[hit] // 2])
    told = []
    with monkeypatch.context() as patch:  # a network that is down looks the same to those who only read
        patch.setattr(type(run_dir), "is_file", lambda path: outage())
        with pytest.raises(UserError, match="could not be read: 503"):
            opened(run_dir, keep=3, say=told.append).restore(abstract(state))
    assert names(saved.directory) == ["3", "4"] and not told
    again = opened(run_dir, keep=3, say=told.append)
    assert_equal(again.restore(abstract(state)), state._replace(step=3))
    assert "checkpoints/4 cannot be read" in told[0] and "is now gs://" in told[0]
    assert names(saved.directory) == ["3", "damaged-4"] and again.latest() == 3
    again.save(state._replace(step=4))
    again.wait()
    assert opened(run_dir, keep=3).restore(abstract(state)).step == 4
    assert names(saved.directory) == ["3", "4", "damaged-4"]


def test_problems_are_read_from_a_bucket_a_file_or_a_directory_and_told_by_place():
    there = files.path("gs://bucket/sets")
    (there / "a.jsonl").write_text('{"question": "1?"}\n')
    (there / "b.jsonl").write_text('{"question": "2?"}\n{"question": 3?}\n')
    assert [p.id for p in read_file("gs://bucket/sets/a.jsonl")] == ["a:1"]
    with pytest.raises(UserError, match=r"gs://bucket/sets/b\.jsonl, line 2, character 15: not JSON"):
        read_file("gs://bucket/sets")
    (there / "b.jsonl").write_text('{"question": "2?"}\n')
    assert [(p.id, p.question) for p in read_file("gs://bucket/sets")] == [("sets:1", "1?"), ("sets:2", "2?")]
    with pytest.raises(UserError, match=r"problems: gs://bucket/none\.jsonl: no such file"):
        read_file("gs://bucket/none.jsonl")
    if util.find_spec("pyarrow"):
        arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
        with (there / "c.parquet").open("wb") as file:
            parquet.write_table(arrow.Table.from_pylist([{"question": "1?"}]), file)
        assert [p.id for p in read_file("gs://bucket/sets/c.parquet")] == ["c:1"]
