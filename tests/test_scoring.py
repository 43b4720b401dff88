"""A target on servers: what they say meets the student's tokens as what a model on the mesh says, in any packing."""

from contextlib import nullcontext
from dataclasses import replace

import jax
import numpy as np
import pytest

from mpd_jax import build, config
from mpd_jax.data.batching import to_batch
from mpd_jax.models.decoder import Model
from mpd_jax.models.hf_weights import load_config, load_weights
from mpd_jax.roles import TINY
from mpd_jax.sampling.scorer import Scorer
from mpd_jax.sampling.servers import ServerConfig, Servers
from mpd_jax.sharding import MeshConfig, make_mesh
from mpd_jax.train.loop import staleness
from mpd_jax.train.records import Records
from mpd_jax.train.state import Trained, init_opt_state
from mpd_jax.train.step import make_update
from mpd_jax.types import Problem, TopK, Trajectory, UserError
from tests.e2e.tiny import QUICKSTART, SMALL
from tests.fake_server import FakeServer
from tests.test_loop import Killed, run
from tests.test_loop import to_batch as rows_alone
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
    return to_batch(PROBLEMS, trajectories, target_prompts=prompts, **settings, **how)[0]


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


@pytest.fixture(scope="module")
def exact(step):
    trajectories, prompts, _ = step
    return gradient_of(batch_of(trajectories, prompts))


@pytest.mark.parametrize("how", ["one device", "mesh and micro-batches"])
def test_with_the_whole_vocabulary_asked_for_loss_and_gradient_are_those_of_the_target_on_the_mesh(step, exact, how):
    trajectories, prompts, logprobs = step
    told = scored(trajectories, prompts, logprobs, VOCAB)
    batch = batch_of(told, prompts, top_k=VOCAB)
    assert batch.student_segments_BT.max() > 1  # packed
    split = {"mesh": make_mesh(MeshConfig(2, 2, 2)), "micro_batches": 2} if "mesh" in how else {}
    found = gradient_of(batch, **split)
    assert_same(found, exact, 1e-6, 1e-5)
    for name in ("tokens", "divergence", "student_entropy", "target_entropy", "divergence_at"):
        np.testing.assert_allclose(found[0][name], exact[0][name], rtol=1e-5, err_msg=name)
    assert found[0]["tail_mass"] == found[0]["student_tail_mass"] == 0


def test_fewer_tokens_give_a_smaller_loss_and_name_the_tail_s_mass(step, exact):
    trajectories, prompts, logprobs = step
    told = scored(trajectories, prompts, logprobs, 6)
    out, _ = gradient_of(batch_of(told, prompts, top_k=6))
    assert 0.2 * exact[0]["loss"] < out["loss"] < exact[0]["loss"]
    left = sum((1 - np.exp(t.target.logprobs_RK.astype(np.float64)).sum(1)).sum() for t in told)
    assert out["tail_mass"] == pytest.approx(left, rel=1e-5)
    assert out["student_tail_mass"] > out["tail_mass"]


def test_a_trajectory_without_what_the_target_says_is_no_batch(step):
    trajectories, prompts, logprobs = step
    with pytest.raises(AssertionError, match="p6"):
        batch_of(trajectories, prompts, top_k=4)
    told = scored(trajectories, prompts, logprobs, 4)
    short = replace(told[3], target=TopK(*(x[1:] for x in told[3].target)))
    with pytest.raises(AssertionError, match="p3"):
        batch_of([*told[:3], short, *told[4:]], prompts, top_k=4)


# The loop


def said_of(problems, trajectories, step):
    return [replace(t, target=TopK(np.full((len(t.response), 1), step), np.zeros(1))) for t in trajectories]


@pytest.mark.parametrize("lookahead", [0, 1])
def test_every_step_is_scored_once_before_its_batch_and_again_after_a_kill(tmp_path, lookahead):
    asked, met = [], []

    def score(problems, trajectories, step):
        asked.append(step)
        return said_of(problems, trajectories, step)

    def batch(problems, trajectories):
        met.append({int(t.target.ids_RK[0, 0]) for t in trajectories})
        return rows_alone(problems, trajectories)

    how = {"score": score, "to_batch": batch, "lookahead": lookahead, "steps": 4}
    with pytest.raises(Killed):
        run(tmp_path, kill=(2, "update"), **how)
    first = list(asked)
    assert first[:3] == [0, 1, 2]
    _, opened = run(tmp_path, **how)
    assert met == [{0}, {1}, {2}, {3}]
    assert asked[len(first) :] == [2, 3]  # the stored trajectories of step 2, and those of step 3
    rows = opened.parts.metrics.path.read_text().splitlines()
    assert all('"score_seconds"' in row and '"score_tokens_per_second"' in row for row in rows)


def test_records_hold_no_scores_and_read_back_equal(tmp_path):
    problems = PROBLEMS[:1]
    plain = [Trajectory("p0", 0, (1,), (2, 3), "student", 0, "cut")]
    records = Records(tmp_path, 0)
    records.save(0, said_of(problems, plain, 0))
    assert "target" not in records.path(0).read_text()
    found = records.load(0, problems)
    assert found == plain and staleness(0, found) == 0


# The run


@pytest.fixture(scope="module")
def teacher():
    model = Model(load_config(TINY / "teacher"))
    weights = load_weights(TINY / "teacher", model, make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))
    return served(model, weights, 512)


def opened(tmp_path, *overrides):
    settings = config.load(QUICKSTART, [*SMALL, f"run.dir={tmp_path}", "recipe.rewrite.how=nobody", *overrides])
    silent = lambda *_: nullcontext(lambda *_: None)  # noqa: E731
    return build.build(settings, tmp_path, lambda row: None, lambda text: None, silent)


def some_trajectories(chat, problems):
    texts = [chat.encode_quoted("7 + 5 = 12. " * (1 + i)) for i in range(len(problems))]
    responses = [chat.assemble(text, chat.encode_quoted(r"\boxed{12}")) for text in texts]
    return [
        Trajectory(p.id, 0, chat.prompt("plain", p), r, "teacher", 0, "assembled", dropped=i == 2)
        for i, (p, r) in enumerate(zip(problems, responses, strict=True))
    ]


def test_a_run_asks_its_teacher_s_server_and_trains_without_the_teacher_s_weights(tmp_path, teacher):
    with FakeServer(teacher, vocab_size=512, window=1024) as server:
        made, state = opened(tmp_path, f"teacher.serve={server.url}", "recipe.target={top_k: 8, context: concise}")
        try:
            parts, problems = made.parts, made.parts.problems.at(0)
            trajectories = some_trajectories(made.student.chat, problems)
            asked = len(server.bodies())
            told = parts.score(problems, trajectories, 0)
            assert len(server.bodies()) - asked == 7 and told[2].target is None  # the one that was dropped
            assert parts.teacher_weights is None
            _, out = parts.update(Trained(state.weights, state.opt_state), None, parts.to_batch(problems, told))
        finally:
            made.close()
    left = 0.0
    for t in told:
        if not t.dropped:
            prompt = made.student.chat.prompt("concise", next(p for p in problems if p.id == t.problem_id))
            rows_RV = teacher([*prompt, *t.response])[len(prompt) - 1 : -1].astype(np.float64)
            left += (1 - np.exp(np.sort(rows_RV, axis=1)[:, -8:]).sum(1)).clip(1e-6).sum()
    assert out["tail_mass"] == pytest.approx(left, rel=1e-3)
    assert out["finite"] and 0 < out["loss"] < out["divergence"]


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
