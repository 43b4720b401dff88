"""Where a model's files are: a local directory, a gs:// address, or a hub id pinned to a commit.

Remote files are copied to a cache on this machine once. Only the files that a model needs are taken, and no code.
"""

import fcntl
import re
import shutil
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import huggingface_hub
from etils import epath
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - of whichever HTTP library the hub's client uses
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mpd_jax.models import peft
from mpd_jax.models.hf_weights import CONFIG, COPIED, INDEX
from mpd_jax.types import UserError

FILES = (CONFIG, "model*.safetensors", INDEX, *COPIED)
WEIGHTS = ("model*.safetensors", INDEX, peft.WEIGHTS)
DESCRIBED = (CONFIG, peft.CONFIG, *(name for name in COPIED if not name.startswith(("LICENSE", "NOTICE"))))
BLOCKS, BLOCK = 64, 4096  # of a file of weights, and bytes of each: what `fingerprint` reads of it beside its header
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")


def locate(path: str, revision: str | None = None, weights: bool = True) -> Path:
    """The local directory of a model's files, downloaded if need be. UserError if there is none.

    weights: whether those are needed too, and not only what describes the model and its tokenizer.

    path: a local directory, gs://bucket/directory, or a hub id `owner/name` whose commit (40 hexadecimal digits) is
    `revision` or stands in the path as `owner/name@commit`.
    """
    local, wanted = Path(path).expanduser(), FILES if weights else DESCRIBED
    if path.startswith("gs://") or local.is_dir():
        if revision is not None:
            raise UserError(f"revision = {revision!r}: {path} is not a hub id and has none; remove revision")
        return _from_bucket(path, wanted) if path.startswith("gs://") else local
    name, _, commit = path.partition("@")
    if not HUB_ID.fullmatch(name):
        raise UserError(
            f"path = {path!r}: no such directory; give a directory that holds config.json, a gs:// address, "
            "or a hub id such as Qwen/Qwen3-1.7B with its revision"
        )
    if commit and revision and commit != revision:
        raise UserError(f"path = {path!r} and revision = {revision!r} name two commits; keep one of them")
    return _from_hub(path, name, commit or revision, wanted)


def _from_hub(path: str, name: str, commit: str | None, wanted: Sequence[str]) -> Path:
    """The snapshot of a commit, from the hub's cache or downloaded into it; HF_TOKEN and HF_HUB_OFFLINE are obeyed."""
    if commit is None or not COMMIT.fullmatch(commit):
        raise UserError(
            f"path = {path!r} is no local directory, and as a hub id it needs its commit: revision = {commit!r} is "
            f"not 40 hexadecimal digits; take it from https://huggingface.co/{name}/commits/main"
        )
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=commit, allow_patterns=list(wanted)))
    except GatedRepoError as error:
        raise UserError(
            f"path = {path!r}: the hub gives this model only to those who accepted its terms; accept them on "
            f"https://huggingface.co/{name} and set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"revision = {commit!r}: {name} has no such commit; take one from its page") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"path = {path!r}: no such model; correct the id, or set HF_TOKEN if it is private") from error
    except (OSError, ValueError, HTTPError) as error:
        raise UserError(
            f"path = {path!r}: neither downloaded nor whole in the cache {constants.HF_HUB_CACHE}: {error}"
        ) from error


def _from_bucket(address: str, wanted: Sequence[str]) -> Path:
    """A copy of a bucket's directory, made anew when the names, sizes or times of its files have changed."""
    try:
        files = _list(epath.Path(address), wanted)
    except ImportError as error:
        raise UserError(f"path = {address!r} needs gcsfs: pip install 'mpd-jax[gcs]'") from error
    except Exception as error:  # each storage library has its own
        raise UserError(
            f"path = {address!r} cannot be read ({error}); check the address and your access to the bucket"
        ) from error
    if not files:
        raise UserError(f"path = {address!r} holds no model; give the directory that holds config.json")
    stats = {name: file.stat() for name, file in files.items()}
    state = repr((address, [(name, s.length, s.mtime) for name, s in sorted(stats.items())]))
    target = Path(constants.HF_HOME) / "gs" / sha256(state.encode()).hexdigest()
    try:
        if not target.is_dir():
            _copy(files, target, target.with_name(sha256(address.encode()).hexdigest()))
    except OSError as error:
        raise UserError(f"path = {address!r} could not be copied to {target.parent}: {error}") from error
    return target


def _copy(files: dict[str, epath.Path], target: Path, of_address: Path) -> None:
    """By one process of this machine at a time, for an address has one lock and one draft; the others find it done."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = of_address.with_suffix(".draft")
    with of_address.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return
        try:
            shutil.rmtree(draft, ignore_errors=True)  # what a process that was killed has left
            for name, file in files.items():
                (draft / name).parent.mkdir(parents=True, exist_ok=True)
                file.copy(draft / name)
            draft.replace(target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _list(directory: epath.Path, wanted: Sequence[str]) -> dict[str, epath.Path]:
    """The files that are wanted, by their names relative to the directory."""
    return {
        str(file.relative_to(directory)): file
        for pattern in wanted
        for file in directory.glob(pattern)
        if file.is_file()
    }


def fingerprint(directory: Path, weights: bool) -> str:
    """A hash of what is read of a model's or an adapter's directory, by which another model's copy is known.

    weights: of the files of weights too. They are not read whole: name, size, header and a sample of the blocks of each
    are in the hash.
    """
    digest = sha256()
    patterns = (*DESCRIBED, *WEIGHTS) if weights else DESCRIBED
    for path in sorted({path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}):
        digest.update(f"{path.relative_to(directory)}\0{path.stat().st_size}\0".encode())
        digest.update(_sampled(path) if path.suffix == ".safetensors" else path.read_bytes())
    return digest.hexdigest()


def _sampled(path: Path) -> bytes:
    """The header of a safetensors file, and BLOCKS blocks that are spread evenly over the rest."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = file.read(8)
        parts = [length, file.read(min(int.from_bytes(length, "little"), size))]
        start = file.tell()
        for number in range(BLOCKS):
            file.seek(start + max(0, size - start - BLOCK) * number // (BLOCKS - 1))
            parts.append(file.read(BLOCK))
    return b"".join(parts)
