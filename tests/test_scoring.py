"""A target on servers: what they say meets the student's tokens as what a model on the mesh says, in any packing."""

from contextlib import nullcontext
from dataclasses import replace

import jax
import numpy as np
import pytest

from mpd_jax import build, config
from mpd_jax.data.batching import after, to_batch
from mpd_jax.models.decoder import Model
from mpd_jax.models.hf_weights import load_config, load_weights
from mpd_jax.roles import TINY, open_roles
from mpd_jax.sampling.scorer import Scorer
from mpd_jax.sampling.servers import ServerConfig, Servers
from mpd_jax.sharding import MeshConfig, make_mesh
from mpd_jax.train.state import Trained, init_opt_state
from mpd_jax.train.step import make_update
from mpd_jax.types import Problem, TopK, Trajectory, UserError
from tests.e2e.tiny import QUICKSTART, SMALL
from tests.fake_server import FakeServer
from tests.test_step import GRADIENT, REVERSE, VOCAB, assert_same, pair, weights_of

EOS = 59
PROBLEMS = [Problem(f"p{i}", "?") for i in range(7)]


def served(model, weights, vocab_size):
    """`logprobs` of a JAX model for the fake server: one shape, compiled once."""

    @jax.jit
    def logprobs_TV(ids_T):
        return jax.nn.log_softmax(model.logits(weights, ids_T[None])[0, :, :vocab_size])

    def logprobs(ids):
        padded_T = np.zeros(192, np.int32)
        padded_T[: len(ids)] = ids
        with jax.default_matmul_precision("highest"):
            return np.asarray(logprobs_TV(padded_T))[: len(ids)]

    return logprobs


def scored(trajectories, prompts, logprobs, k):
    """The trajectories with what a server says that answers with these log-probabilities."""
    with FakeServer(logprobs, vocab_size=VOCAB, max_logprobs=-1) as server:
        scorer = Scorer(Servers([server.url], ServerConfig(score_tokens=100)), k)
        tops = scorer.score([(prompts[t.problem_id], t.response) for t in trajectories])
    return [replace(t, target=top) for t, top in zip(trajectories, tops, strict=True)]


@pytest.fixture(scope="module")
def step():
    """Trajectories of unequal length, the target's prompts, and what the teacher says to them."""
    rng = np.random.default_rng(0)
    trajectories = [
        Trajectory(p.id, 0, (1,) * (2 + i), (*rng.integers(0, 58, 3 + 4 * i).tolist(), EOS), "student", 0, "stopped")
        for i, p in enumerate(PROBLEMS)
    ]
    prompts = {p.id: tuple(rng.integers(0, 58, 9 - i).tolist()) for i, p in enumerate(PROBLEMS)}
    _, teacher = pair()
    return trajectories, prompts, served(teacher, weights_of(teacher, 1), VOCAB)


def batch_of(trajectories, prompts, **how):
    settings = {"reduction": "token_mean", "max_length": 48, "eos_ids": {EOS}, "multiple": 8}
    return to_batch(
        PROBLEMS, trajectories, reads=lambda t: after(prompts[t.problem_id], t.response), **settings, **how
    )[0]


def gradient_of(batch, mesh=None, micro_batches=1):
    """Out and gradient of one update; the teacher is read where the batch does not say what it says."""
    student, teacher = pair()
    here = teacher if batch.top_ids_BRK is None else None
    update = make_update(student, here, REVERSE, GRADIENT, mesh, vocab_size=VOCAB, micro_batches=micro_batches)
    weights = weights_of(student, 0, mesh)
    with jax.default_matmul_precision("highest"):
        trained, out = update(
            Trained(weights, init_opt_state(GRADIENT, weights)), weights_of(teacher, 1, mesh) if here else None, batch
        )
    return jax.device_get(out), jax.device_get(trained.opt_state.trace)


@pytest.mark.slow
def test_with_the_whole_vocabulary_asked_for_loss_and_gradient_are_those_of_the_target_on_the_mesh(step):
    trajectories, prompts, logprobs = step
    exact = gradient_of(batch_of(trajectories, prompts))
    batch = batch_of(scored(trajectories, prompts, logprobs, VOCAB), prompts, top_k=VOCAB)
    assert batch.student_segments_BT.max() > 1  # packed
    found = gradient_of(batch, make_mesh(MeshConfig(2, 2, 2)), micro_batches=2)
    assert_same(found, exact, 1e-6, 1e-5)
    for name in ("tokens", "divergence", "student_entropy", "target_entropy", "divergence_at"):
        np.testing.assert_allclose(found[0][name], exact[0][name], rtol=1e-5, err_msg=name)
    assert found[0]["tail_mass"] == found[0]["student_tail_mass"] == 0


def test_a_trajectory_without_what_the_target_says_is_no_batch(step):
    trajectories, prompts, logprobs = step
    with pytest.raises(AssertionError, match="p6"):
        batch_of(trajectories, prompts, top_k=4)
    told = scored(trajectories, prompts, logprobs, 4)
    short = replace(told[3], target=TopK(*(x[1:] for x in told[3].target)))
    with pytest.raises(AssertionError, match="p3"):
        batch_of([*told[:3], short, *told[4:]], prompts, top_k=4)


# The run


@pytest.fixture(scope="module")
def teacher():
    model = Model(load_config(TINY / "teacher"))
    weights = load_weights(TINY / "teacher", model, make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))
    return served(model, weights, 512)


def opened(tmp_path, *overrides, say=lambda text: None):
    settings = config.load(QUICKSTART, [*SMALL, f"run.dir={tmp_path}", "recipe.rewrite.how=nobody", *overrides])
    silent = lambda *_: nullcontext(lambda *_: None)  # noqa: E731
    return build.build(settings, tmp_path, lambda row: None, say, silent)


def some_trajectories(chat, problems):
    texts = [chat.encode_quoted("7 + 5 = 12. " * (1 + i)) for i in range(len(problems))]
    responses = [chat.assemble(text, chat.encode_quoted(r"\boxed{12}")) for text in texts]
    return [
        Trajectory(p.id, 0, chat.prompt("plain", p), r, "teacher", 0, "assembled", dropped=i == 2)
        for i, (p, r) in enumerate(zip(problems, responses, strict=True))
    ]


def test_a_run_asks_its_teacher_s_server_and_trains_without_the_teacher_s_weights(tmp_path, teacher):
    said = []
    with FakeServer(teacher, vocab_size=512, window=1024) as server:
        made, state = opened(
            tmp_path,
            f"teacher.serve={server.url}",
            "recipe.target={top_k: 8, context: concise}",
            "train.max_length=100",
            say=said.append,
        )
        try:
            parts, problems, chat = made.parts, made.parts.problems.at(0), made.student.chat
            trajectories = some_trajectories(chat, problems)
            asked = len(server.bodies())
            told = parts.score(problems, trajectories, 0)
            batch = parts.to_batch(problems, told)
        finally:
            made.close()
    assert f"teacher: that {server.url} computes with teacher.path is unproved" in " ".join(said)
    read = [t.target is not None for t in told]
    assert read[:3] == [True, True, False] and not read[-1]  # one was dropped, others are too long
    assert len(server.bodies()) - asked == sum(read)
    for problem, t in zip(problems, told, strict=True):
        if t.target is not None:
            prompt = chat.prompt("concise", problem)
            rows_RV = teacher([*prompt, *t.response])[len(prompt) - 1 : -1]
            np.testing.assert_allclose(t.target.logprobs_RK, -np.sort(-rows_RV, axis=1)[:, :8], rtol=1e-5, atol=1e-6)
    assert parts.teacher_weights is None and batch.target_tokens_BT.shape[1] == 1
    update = build.update_of(made.config, open_roles(made.config), made.mesh)
    assert "top_ids_BRK" in update.lower(Trained(state.weights, state.opt_state), None, batch).as_text(debug_info=True)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["recipe.target.top_k=-1"], r"recipe\.target\.top_k: -1 is not allowed"),
        (["recipe.target.top_k=8"], r"recipe\.target\.top_k: 8 asks the teacher's servers, and teacher\.serve is jax"),
        (["recipe.target={weights: self_frozen, top_k: 8}"], r"top_k: 8 .*recipe\.target\.weights=self_frozen"),
        (
            ["recipe.target.top_k=8", "recipe.loss.stabiliser=per_entry", "teacher.serve=http://127.0.0.1:9"],
            r"top_k: 8 makes one bucket.*per_entry clips single tokens",
        ),
    ],
)
def test_what_a_target_on_servers_cannot_be_is_refused(overrides, told):
    with pytest.raises(UserError, match=told):
        config.load(QUICKSTART, overrides)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["recipe.target.top_k=513"], r"recipe\.target\.top_k: 513 .*vocabulary has 512 tokens"),
        (["recipe.target.top_k=21"], r"--max-logprobs, or lower recipe\.target\.top_k"),
        (
            ["recipe.target.top_k=4", "train.max_length=300"],
            r"300 tokens \(train\.max_length\).* the 300 that it takes",
        ),
    ],
)
def test_a_server_that_cannot_score_is_told_before_the_run(tmp_path, teacher, overrides, told):
    with FakeServer(teacher, vocab_size=512, window=300) as server, pytest.raises(UserError, match=told):
        opened(tmp_path, f"teacher.serve={server.url}", *overrides)
