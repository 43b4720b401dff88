"""Claims about finding a model: directories are used as they are, hub ids need a commit, remote files come once."""

import fcntl
import shutil
import threading
from types import SimpleNamespace

import huggingface_hub
import pytest
from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from mpd_jax.models import locate as module
from mpd_jax.models.locate import fingerprint, locate
from mpd_jax.roles import TINY
from mpd_jax.types import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "additional_chat_templates/tool.jinja")


def fill(directory):
    for name in FILES:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    return directory


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's cache with one snapshot in it, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return fill(tmp_path / "hub" / "models--Owner--a.model" / "snapshots" / COMMIT)


def test_a_directory_is_used_as_it_is(tmp_path):
    assert locate(str(tmp_path)) == tmp_path


def test_a_revision_of_a_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match="remove revision"):
        locate(str(tmp_path), COMMIT)


@pytest.mark.parametrize("path", ["/no/such/directory", "./none", "none", "a/b/c", "s3://bucket/x"])
def test_a_path_that_is_nothing_is_refused_with_what_may_stand_there(path):
    with pytest.raises(UserError, match=r"no such directory; give .*gs://.*hub id"):
        locate(path)


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT[:7], COMMIT[:-1] + "G"])
def test_a_hub_id_without_a_commit_is_refused(hub, revision):
    with pytest.raises(UserError, match=r"revision = .* is not 40 hexadecimal digits"):
        locate("Owner/a.model", revision)


def test_two_commits_are_refused(hub):
    with pytest.raises(UserError, match="two commits"):
        locate(f"Owner/a.model@{COMMIT}", COMMIT[::-1])


def test_a_snapshot_is_found_without_the_network(hub):
    assert locate("Owner/a.model", COMMIT) == hub
    assert locate(f"Owner/a.model@{COMMIT}") == hub
    assert locate(f"Owner/a.model@{COMMIT}", COMMIT) == hub


def test_a_snapshot_that_is_not_there_is_refused_with_the_cache_looked_in(hub, tmp_path):
    with pytest.raises(UserError, match=rf"path = 'Owner/other'.*{tmp_path}"):
        locate("Owner/other", COMMIT)
    with pytest.raises(UserError, match=r"Owner/a\.model"):
        locate("Owner/a.model", COMMIT[::-1])


def test_only_files_of_a_model_are_asked_for(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **kw: asked.update(kw, name=name) or tmp_path
    )
    locate("Owner/a.model", COMMIT)
    wanted = list(
        huggingface_hub.utils.filter_repo_objects(
            [
                *FILES,
                "model-00001-of-00002.safetensors",
                "modeling_x.py",
                "pytorch_model.bin",
                "original/m.safetensors",
            ],
            allow_patterns=asked["allow_patterns"],
        )
    )
    assert wanted == [*FILES, "model-00001-of-00002.safetensors"]
    assert (asked["name"], asked["revision"]) == ("Owner/a.model", COMMIT)


def test_without_weights_a_model_is_its_description(monkeypatch, tmp_path, bucket):
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: asked.update(kw) or tmp_path)
    locate("Owner/a.model", COMMIT, weights=False)
    assert [*huggingface_hub.utils.filter_repo_objects(FILES, allow_patterns=asked["allow_patterns"])] == [
        name for name in FILES if name != "model.safetensors"
    ]
    described = locate("gs://bucket/model", weights=False)
    assert not (described / "model.safetensors").exists() and (described / "config.json").exists()
    assert (locate("gs://bucket/model") / "model.safetensors").exists()


@pytest.mark.parametrize(
    "error, text",
    [
        (GatedRepoError, "accept them on https://huggingface.co/Owner/a.model and set HF_TOKEN"),
        (RepositoryNotFoundError, "no such model"),
        (LocalEntryNotFoundError, "neither downloaded nor whole in the cache"),
        (OSError, "neither downloaded nor whole in the cache.*No space left"),
    ],
)
def test_what_the_hub_says_becomes_a_remedy(monkeypatch, error, text):
    def fails(*_, **__):
        raise error.__new__(error) if issubclass(error, RepositoryNotFoundError) else error("No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(UserError, match=text):
        locate("Owner/a.model", COMMIT)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """gs://bucket as a directory here, behind the storage library that epath uses; files opened for reading counted."""
    root, opened = tmp_path / "remote", []

    class Fake(LocalFileSystem):
        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(str(path).replace("gs://", f"{root}/"))

        def glob(self, path, **kw):
            return [p.removeprefix(f"{root}/") for p in super().glob(path, **kw)]

        def _open(self, path, mode="rb", **kw):
            opened.extend([path] if "r" in mode else [])
            return super()._open(path, mode, **kw)

    fake, real = Fake(skip_instance_cache=True), LocalFileSystem()
    monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: fake if str(path).startswith("gs://") else real)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    model = fill(root / "bucket" / "model")
    (model / "run.py").write_text("code")
    return SimpleNamespace(model=model, opened=opened, home=tmp_path / "home")


def test_a_bucket_is_copied_once(bucket):
    first = locate("gs://bucket/model")
    assert {str(p.relative_to(first)): p.read_text() for p in first.rglob("*") if p.is_file()} == {n: n for n in FILES}
    assert len(bucket.opened) == len(FILES)
    assert locate("gs://bucket/model") == first
    assert len(bucket.opened) == len(FILES), "copied again"


def test_a_bucket_that_changed_is_copied_again(bucket):
    first = locate("gs://bucket/model")
    (bucket.model / "config.json").write_text("another config")
    second = locate("gs://bucket/model")
    assert second != first and (second / "config.json").read_text() == "another config"
    assert (first / "config.json").read_text() == "config.json", "a run may still read the first copy"


def test_a_copy_that_fails_leaves_nothing(bucket, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.epath.Path("gs://bucket").__class__, "copy", full)
        with pytest.raises(UserError, match="No space left on device"):
            locate("gs://bucket/model")
    assert [path.suffix for path in (bucket.home / "gs").iterdir()] == [".lock"]
    assert (locate("gs://bucket/model") / "config.json").exists()


def test_several_processes_of_a_machine_copy_a_bucket_once(bucket, monkeypatch):
    """Threads that take the lock as processes do: each opens it. The second comes while the first copies."""
    copying, second, found = threading.Event(), threading.Event(), []
    copy, flock = module.epath.Path("gs://bucket").__class__.copy, fcntl.flock

    def slow(*words):
        copying.set()
        assert second.wait(30)
        return copy(*words)

    def locking(*words):
        if copying.is_set():
            second.set()
        flock(*words)

    monkeypatch.setattr(module.epath.Path("gs://bucket").__class__, "copy", slow)
    monkeypatch.setattr(fcntl, "flock", locking)
    threads = [threading.Thread(target=lambda: found.append(locate("gs://bucket/model"))) for _ in range(2)]
    threads[0].start()
    assert copying.wait(30)
    threads[1].start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 2 and found[0] == found[1] and len(bucket.opened) == len(FILES)


def test_what_a_killed_copy_has_left_is_cleared_by_the_next_one_of_its_address(bucket, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module.epath.Path("gs://bucket").__class__, "copy", kill)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # SIGKILL leaves no time for it
        with pytest.raises(Killed):
            locate("gs://bucket/model")
    (draft,) = (bucket.home / "gs").glob("*.draft")
    (draft / "half").write_text("")
    (bucket.model / "config.json").write_text("another config")
    found = locate("gs://bucket/model")
    assert not draft.exists() and not (found / "half").exists()


def test_an_empty_bucket_is_refused(bucket):
    shutil.rmtree(bucket.model)
    with pytest.raises(UserError, match="holds no model"):
        locate("gs://bucket/model")


def test_a_missing_storage_library_is_named(bucket, monkeypatch):
    def no_library(_):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(backend.fsspec_backend, "fs", no_library)
    with pytest.raises(UserError, match=r"pip install 'mpd-jax\[gcs\]'"):
        locate("gs://bucket/model")


def test_a_fingerprint_tells_models_apart_without_reading_their_weights_whole(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(TINY / "student", model)
    (model / "model.safetensors").write_bytes((TINY / "student" / "model.safetensors").read_bytes() + bytes(2**20))
    same, weights = shutil.copytree(model, tmp_path / "same"), model / "model.safetensors"
    (same / "LICENSE").write_text("no part of the model")
    whole = [fingerprint(same, weights) for weights in (True, False)]
    assert [fingerprint(model, weights) for weights in (True, False)] == whole and whole[0] != whole[1]

    size, header = weights.stat().st_size, int.from_bytes(weights.read_bytes()[:8], "little")
    for at, known in ((header, True), (8 + header, True), (size // 2, None), (size - 1, True)):
        changed = bytearray((same / "model.safetensors").read_bytes())
        width = size // module.BLOCKS if known is None else 1  # of a stretch as long as two blocks are apart
        changed[at : at + width] = bytes(255 - byte for byte in changed[at : at + width])
        weights.write_bytes(changed)
        assert fingerprint(model, True) != whole[0] and fingerprint(model, False) == whole[1], at
    shutil.copy(same / "model.safetensors", weights)
    assert fingerprint(model, True) == whole[0]
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        with (model / name).open("a") as file:
            file.write(" ")
        assert fingerprint(model, False) != whole[1], name
        shutil.copy(same / name, model / name) if (same / name).exists() else (model / name).unlink()
    weights.rename(model / "model-00001-of-00001.safetensors")
    assert fingerprint(model, True) != whole[0] and fingerprint(model, False) == whole[1]
