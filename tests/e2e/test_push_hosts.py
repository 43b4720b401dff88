"""A push by a run of two processes: both take part, process 0 alone speaks, and both hear what came of it."""

import json
import socket
import subprocess
import sys

import pytest

from mpd_jax.models.decoder import Model
from tests.e2e.test_kill import environment
from tests.fake_server import FakeServer
from tests.test_weight_push import CONFIG, MESH, VOCAB, base_of, load_config, load_weights, served

CHILD = """
import sys
import jax, numpy as np
from pathlib import Path
from mpd_jax import hosts
coordinator, number, directory, run_dir, url = sys.argv[1:]
hosts.join(coordinator, 2, int(number))
from mpd_jax.models.decoder import Model
from mpd_jax.models.hf_weights import load_config
from mpd_jax.sampling.servers import ServerConfig
from mpd_jax.sampling.ways import PushConfig
from mpd_jax.sampling.weight_push import WeightPush
from mpd_jax.sharding import MeshConfig, make_mesh, tree_shardings
from mpd_jax.types import UserError
from tests.test_weight_push import Student, random_weights
model = Model(load_config(directory))
mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
places = tree_shardings(mesh, model.logical_axes(), model.abstract(), "train")
def placed(tree):
    return jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]), tree, places)
push = WeightPush(Student(Path(directory), model, None, (url,)), lambda t: t, mesh, Path(run_dir), [],
                  server=ServerConfig(patience_s=5.0), key=None, config=PushConfig(), seed=0, say=print)
weights = random_weights(model, 0)
try:
    for version in range(3):
        print("said", push.push(placed(weights), version).words, flush=True)
        weights = jax.tree.map(lambda w: w + np.float32(1e-3) * np.sign(w), weights)
except UserError as error:
    print("said", error, flush=True)
hosts.leave(0)
"""


@pytest.mark.slow
def test_two_processes_push_as_one(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIG))
    model = Model(load_config(source))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"

    reads = []

    def read(path):
        reads.append(path)
        server.stale = len(reads) > 2  # the third push and its repetition
        file = Model(load_config(path))
        return served(file, load_weights(path, file, MESH))

    with FakeServer(served(model, base_of(model)), vocab_size=VOCAB, read_weights=read) as server:
        flags = environment(tmp_path / "cache", devices=4)
        words = [sys.executable, "-c", CHILD, coordinator]
        both = [
            subprocess.Popen(
                [*words, str(number), str(source), str(tmp_path / "run"), server.url],
                env=flags,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for number in (0, 1)
        ]
        said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    heard = [[line for line in text.splitlines() if line.startswith("said")] for text in said]
    assert heard[0] == heard[1] and len(reads) == 4
    for word, line in zip(("agrees", "verified", "version 2 twice"), heard[0], strict=True):
        assert word in line
