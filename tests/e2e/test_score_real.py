"""Scores of a real vLLM server on the CPU against the same model in JAX, ids and numbers.

`MPD_VLLM_PYTHON=.venv-vllm/bin/python pytest -m server -s tests/e2e/test_score_real.py` prints the differences.
"""

import jax
import numpy as np
import pytest

from mpd_jax import build, config
from mpd_jax.models.config import ModelSpec
from mpd_jax.roles import open_model
from mpd_jax.sampling.scorer import Scorer
from mpd_jax.sampling.servers import ServerConfig, ServerError, Servers
from mpd_jax.sharding import MeshConfig, make_mesh
from tests.e2e.tiny import QUICKSTART
from tests.real_server import vllm_server

pytestmark = pytest.mark.server


def test_a_real_server_says_what_the_model_says_and_refuses_what_is_refused_here():
    settings, mesh = config.load(QUICKSTART), make_mesh(MeshConfig(), jax.devices()[:1])
    files = open_model("teacher", ModelSpec("tiny:teacher"), settings.recipe.contexts)
    problems = build.read_problems(settings.problems, "heldout")[:32]
    texts = [(files.chat.prompt("plain", p), files.chat.encode(p.response or "")) for p in problems]
    longest = max(len(p) + len(r) for p, r in texts)
    rows = np.array([[*p, *r] + [0] * (longest - len(p) - len(r)) for p, r in texts])
    logprobs_BTV = np.asarray(jax.nn.log_softmax(jax.jit(files.model.logits)(files.weights(mesh), rows)))
    with vllm_server(files.directory) as server:
        servers = Servers([server.url], ServerConfig(score_tokens=2048))
        servers.wait_until_ready()
        for k in (512, 16, 1):
            scorer = Scorer(servers, k)
            scorer.check(511)
            gaps, tokens, swapped = [], 0, 0
            for (prompt, response), top, row_TV in zip(texts, scorer.score(texts), logprobs_BTV, strict=True):
                want_RV = row_TV[len(prompt) - 1 : len(prompt) - 1 + len(response)]
                gaps.append(np.abs(np.take_along_axis(want_RV, top.ids_RK, 1) - top.logprobs_RK).ravel())
                best_RK = np.sort(want_RV, axis=1)[:, ::-1][:, :k]
                assert np.abs(best_RK - top.logprobs_RK).max() < 1e-4  # ties may fall otherwise, their values may not
                swapped += int((np.argsort(-want_RV, axis=1, kind="stable")[:, :k] != top.ids_RK).sum())
                tokens += len(response)
            gap = np.concatenate(gaps)
            print(
                f"\nk = {k}: {tokens} tokens, difference {gap.max():.1e} at most, {gap.mean():.1e} mean, {swapped} ties"
            )
            assert gap.max() < 1e-4
        with pytest.raises(ServerError, match="one more exceed the 512"):
            Scorer(servers, 1).check(512)
