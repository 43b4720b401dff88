"""The family on one loop: every method's twin, and every legal cell of write x rewrite x target x loss.

Cells come of the axes themselves, so that a new value is covered once it stands in AXES. Those that train do so on the
shipped models, through build.py and the loop; what would be sampled is scripted, except for the twins.
"""

import itertools
import random
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import jax
import numpy as np
import pytest

from mpd_jax import build, config, rollouts, samplers, trees
from mpd_jax.batches import as_scored, batch_to_train_on, exchanged, target_reads
from mpd_jax.config import RunConfig
from mpd_jax.data.chat import Chat
from mpd_jax.eval.grade import GraderPool
from mpd_jax.recipe.recipe import LossConfig, Recipe, RewriteConfig, TargetConfig, WriteConfig, refusals
from mpd_jax.recipe.write import DatasetWriter
from mpd_jax.roles import ModelFiles, open_roles
from mpd_jax.run import keep_compiled
from mpd_jax.sampling.sampler import Response
from mpd_jax.screen import Screen
from mpd_jax.sharding import make_mesh
from mpd_jax.train import loop
from mpd_jax.train.metrics import read_rows
from mpd_jax.train.state import NEW_MEMORY
from mpd_jax.types import Problem
from tests.e2e.tiny import ROOT

WORLD = ROOT / "configs" / "tiny"
WORDS = trees.read_yaml(WORLD / "world.yaml")
TWINS = sorted(path for path in WORLD.glob("*.yaml") if path.stem != "world")
SIZES = [
    "train.steps=2",
    "train.batch_size=8",
    "train.warmup_steps=0",
    "train.save_every=2",
    "sampling.slots=8",
    "sampling.prefill_rows=8",
    "mesh.fsdp=1",
    "mesh.data=-1",
]
SHORT = ["train.max_length=448", "sampling.writer.max_tokens=192", "sampling.rewriter.max_tokens=192"]

BY_TEACHER, BY_STUDENT = {"by": "teacher"}, {"by": "student"}
AXES: dict[str, dict[str, dict[str, Any]]] = {
    "write": {by: {"by": by} for by in ("student", "teacher", "dataset")},
    "rewrite": {
        "nobody": {"how": "nobody"},
        "nobody, correct": {"how": "nobody", "keep": ["correct"]},
        "compress by teacher": {"how": "compress", **BY_TEACHER},
        "compress by student": {"how": "compress", **BY_STUDENT},
        "compress by a third model": {"how": "compress", "keep": ["shorter"]},
        "repair by teacher": {"how": "repair", **BY_TEACHER, "keep": ["finished", "same_answer"]},
        "repair by student": {"how": "repair", **BY_STUDENT, "too_long": "trim", "window": 700},
        "truncate": {"how": "truncate", "truncate_ratio": 0.5, "fallback": "original"},
        "answer only": {"how": "truncate", "truncate_to": 0},
        "earliest correct prefix": {"how": "earliest_correct_prefix", "keep": ["correct"]},
    },
    "target": {
        "none": {"weights": "none"},
        **{
            f"{weights} / {context}": {"weights": weights, "context": context, **more}
            for weights, more in (("teacher", {}), ("self_frozen", {}), ("self_refreshed", {"every": 1}))
            for context in ("plain", "concise", "rewrite", "privileged")
        },
    },
    "loss": {
        "cross_entropy": {"kind": "cross_entropy"},
        "reverse_kl": {"kind": "reverse_kl", "reduction": "sum"},
        "forward_kl": {"kind": "forward_kl", "stabiliser": "per_entry"},
        "jsd": {"kind": "jsd", "teacher_weight": 0.3},
        "mix": {"kind": "mix", "reverse_weight": 0.3, "stabiliser": "rescale"},
        "policy_gradient": {"kind": "policy_gradient", "merge_stops": True},
        "weighted reverse_kl": {"kind": "reverse_kl", "token_weight": "entropy_guided"},
    },
}
Cell = tuple[str, str, str, str]


def tree_of(cell: Cell) -> dict[str, Any]:
    answers = {axis: dict(AXES[axis][value]) for axis, value in zip(AXES, cell, strict=True)}
    tree = {**WORDS, "run": {"dir": "nowhere"}, "recipe": {**answers, "contexts": WORDS["recipe"]["contexts"]}}
    if cell[1] == "compress by a third model":
        tree["rewriter"] = {"path": "tiny:student"}
    return tree


def resolved(cell: Cell, *overrides: str) -> RunConfig:
    return config.resolve(tree_of(cell), [*SIZES, *overrides])


@cache
def legal() -> tuple[Cell, ...]:
    """The cells that nothing refuses. Of the recipe alone, which is much faster than reading a config."""

    def recipe(cell: Cell) -> Recipe:
        write, rewrite, target, loss = (AXES[axis][value] for axis, value in zip(AXES, cell, strict=True))
        rewrite = {**rewrite, "keep": tuple(rewrite.get("keep", ()))}
        return Recipe(WriteConfig(**write), RewriteConfig(**rewrite), TargetConfig(**target), LossConfig(**loss))

    return tuple(cell for cell in itertools.product(*AXES.values()) if not refusals(recipe(cell)))


def pairs(cell: Cell) -> set[tuple]:
    return set(itertools.combinations(enumerate(cell), 2))


def pairwise(cells: tuple[Cell, ...]) -> list[Cell]:
    """Few of the cells in which every pair of values of two axes stands that stands in any of them; greedy."""
    shuffled = random.Random(0).sample(cells, len(cells))
    open_pairs, chosen = set().union(*map(pairs, cells)), []
    while open_pairs:
        best = max(shuffled, key=lambda cell: len(pairs(cell) & open_pairs))
        chosen.append(best)
        open_pairs -= pairs(best)
    return chosen


ARRAY = pairwise(legal())


class Scripted:
    """In place of a sampler: the problem's own worked response, or half of it where a rewrite is asked for."""

    version, max_length = 0, 4096

    def __init__(self, chat: Chat, problems: tuple[Problem, ...]):
        self.chat = chat
        self.by_question = {problem.question: problem for problem in problems}

    def load(self, weights, version):
        self.version = version

    def sample(self, requests, sampling, progress=None):
        return [self.answer(self.chat.text(request.prompt)) for request in requests]

    def answer(self, prompt: str) -> Response:
        problem = next(p for question, p in self.by_question.items() if question in prompt)
        (worked,) = DatasetWriter(self.chat)([problem], 0)
        if "Draft:" not in prompt:
            return Response(worked.response, (-0.5,) * len(worked.response), "stopped")
        reasoning = self.chat.text(self.chat.split(worked.response).reasoning)
        text = f"{reasoning[: len(reasoning) // 2]}\n####\n\\boxed{{{problem.answer}}}"
        ids = (*self.chat.encode(text), *self.chat.end[:1])
        return Response(ids, (-0.5,) * len(ids), "stopped")


@cache
def problems() -> tuple[Problem, ...]:
    return build.read_problems(config.resolve(tree_of(ARRAY[0])).problems, "train")[:64]


def scripted(files: ModelFiles, *_: Any) -> Any:
    return Scripted(files.chat, problems())


def train(settings: RunConfig, path: Path) -> list[dict[str, Any]]:
    """The rows of a run's loop, without evaluations."""
    screen = Screen(quiet=True)
    run, state = build.build(settings, path, lambda row: None, screen.say, screen.bar)
    try:
        loop.train(run.parts, state)
    finally:
        run.close()
    return read_rows(path / "metrics.jsonl")


def require_learning(rows: list[dict[str, Any]], itself: bool = False) -> None:
    assert len(rows) == 2 and all(row["finite"] for row in rows)
    trained = [row for row in rows if row["loss"] is not None]
    assert trained, f"every trajectory was dropped: {[row['verdicts'] for row in rows]}"
    assert all(np.isfinite(row["loss"]) for row in trained)
    norms = [row["grad_norm"] for row in trained]
    if itself:  # the student under its own prompt, before any update has moved it
        assert norms[0] < 1e-5 and trained[0]["divergence"] < 1e-6
    else:
        assert norms[-1] > 0


@pytest.fixture(scope="module")
def shared_programs(tmp_path_factory):
    """What one twin's samplers compile the next one reads."""
    before = {
        name: getattr(jax.config, name)
        for name in (
            "jax_compilation_cache_dir",
            "jax_persistent_cache_min_compile_time_secs",
            "jax_persistent_cache_min_entry_size_bytes",
        )
    }
    keep_compiled(str(tmp_path_factory.mktemp("programs")))
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def scripts(monkeypatch):
    """What would be sampled is scripted."""
    few = problems()
    monkeypatch.setattr(samplers, "make_sampler", scripted)
    monkeypatch.setattr(build, "read_problems", lambda *_: few)
    monkeypatch.setattr(build, "refuse_overlap", lambda *_: None)


@pytest.mark.parametrize("path", TWINS, ids=lambda path: path.stem)
def test_every_method_trains_in_the_tiny_world(path, tmp_path, scripts, shared_programs):
    require_learning(train(config.load(path, [*SIZES, f"run.dir={tmp_path}"]), tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("path", TWINS, ids=lambda path: path.stem)
def test_every_method_samples_and_trains_in_the_tiny_world(path, tmp_path, shared_programs):
    settings = config.load(path, [*SIZES, *SHORT, f"run.dir={tmp_path}"])
    require_learning(train(settings, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("cell", ARRAY, ids=" - ".join)
def test_pairs_of_answers_train_two_steps(cell, tmp_path, scripts, shared_programs):
    settings = resolved(cell, f"run.dir={tmp_path}")
    require_learning(train(settings, tmp_path), itself=cell[2] in ("self_frozen / plain", "self_refreshed / plain"))


def test_every_legal_cell_resolves_to_a_batch(monkeypatch):
    monkeypatch.setattr(samplers, "make_sampler", scripted)
    step, by_target = problems()[:8], sorted({cell[:3] for cell in legal()})  # the loss has no part in arrays
    trajectories = []
    for before, cell in itertools.pairwise([None, *by_target]):
        settings = resolved(next(c for c in legal() if c[:3] == cell))
        roles, mesh = opened(settings), make_mesh(settings.mesh)
        if before is None or before[:2] != cell[:2]:  # nor has the target in trajectories
            made = samplers.make_samplers(settings, roles, mesh, lambda trained: trained, lambda *_: pytest.fail())
            with GraderPool("rules") as graders:
                parts = rollouts.recipe_parts(settings, roles, made, graders, Screen(quiet=True).bar)
                trajectories = parts.rewrite(step, parts.write(step, 0, NEW_MEMORY), 0, NEW_MEMORY)
        target = roles.target(settings.recipe)
        batch = batch_to_train_on(settings, mesh, roles, step, trajectories)
        assert len(trajectories) == 8 and batch is not None, cell
        assert (batch.target_tokens_BT.shape[1] == 1) == (target is None), cell
        kept = [t for t in trajectories if not t.dropped]
        scored = sum(len(t.response) for t in kept)
        if settings.recipe.target.context == "rewrite":  # without the tags
            parts = [roles.student.chat.split(t.response) for t in kept]
            scored = sum(len(p.reasoning) + 1 + len(p.answer) + len(roles.student.chat.end) for p in parts)
        assert np.count_nonzero(batch.weight_BR) == scored > 0, cell
    assert len(by_target) > 200


ROLES: dict[Any, Any] = {}


def opened(settings: RunConfig):
    """Roles by the models that play them: a tokenizer is read once."""
    recipe = settings.recipe
    key = (recipe.write.by, recipe.rewrite.how, recipe.rewrite.by, recipe.target.weights, settings.rewriter is None)
    if key not in ROLES:
        ROLES[key] = open_roles(settings)
    return ROLES[key]


def test_a_target_that_reads_a_draft_reads_what_the_rewriter_read(monkeypatch):
    """Trimmed alike, its own thinking closed; it scores reasoning, answer and end."""
    monkeypatch.setattr(samplers, "make_sampler", scripted)
    cell = ("student", "repair by student", "teacher / rewrite", "forward_kl")
    settings = resolved(cell, "recipe.rewrite.window=390", "recipe.rewrite.by=teacher")
    roles, mesh, step = open_roles(settings), make_mesh(settings.mesh), problems()[:8]
    made = samplers.make_samplers(settings, roles, mesh, lambda trained: trained, lambda *_: pytest.fail())
    asked: list[tuple[int, ...]] = []
    sample = made.rewriter.sample
    made.rewriter.sample = lambda requests, *how: asked.extend(r.prompt for r in requests) or sample(requests, *how)
    with GraderPool("rules") as graders:
        parts = rollouts.recipe_parts(settings, roles, made, graders, Screen(quiet=True).bar)
        rewritten = parts.rewrite(step, parts.write(step, 0, NEW_MEMORY), 0, NEW_MEMORY)
    assert sum(t.trimmed > 0 for t in rewritten) > 0 and not any(t.dropped for t in rewritten)
    reads, chat = target_reads(settings, roles, step), roles.student.chat
    for t, prompt in zip(rewritten, asked, strict=True):
        scored = as_scored(settings, roles, t)
        assert scored.prompt + scored.response == t.prompt + t.response
        assert chat.text(scored.prompt).endswith("<think>\n") and not chat.text(scored.response).startswith("<think>")
        reading, parts = reads(scored), chat.split(t.response)
        reasoning, answer = (chat.text(ids).strip() for ids in (parts.reasoning, parts.answer))
        own = f"<think>\n\n</think>\n\n{reasoning}\n####\n{answer}{chat.text(chat.end)}"
        assert chat.text(reading.tokens) == chat.text(prompt) + own
        for token, at in zip(scored.response, reading.at, strict=True):
            said = reading.tokens[at + 1]
            assert at == -1 or said == token or (said, token) == exchanged(settings, roles)
        left_out = [token for token, at in zip(scored.response, reading.at, strict=True) if at < 0]
        assert not chat.text(left_out).strip() and chat.text(exchanged(settings, roles)) == "####</think>"


def test_the_axes_hold_every_value_that_a_config_may_hold():
    held = {
        (axis, key): {cell.get(key) for cell in values.values()} - {None}
        for axis, values in AXES.items()
        for key in ("by", "how", "weights", "context", "kind")
    }
    for axis, key, owner in (
        ("write", "by", WriteConfig),
        ("rewrite", "by", RewriteConfig),
        ("rewrite", "how", RewriteConfig),
        ("target", "weights", TargetConfig),
        ("target", "context", TargetConfig),
        ("loss", "kind", LossConfig),
    ):
        assert held[axis, key] == set(get_args(get_type_hints(owner)[key])), (axis, key)


def test_the_array_holds_every_pair_that_any_cell_holds():
    assert set().union(*map(pairs, legal())) == set().union(*map(pairs, ARRAY))
    assert len(ARRAY) < len(legal()) / 10
    for number, values in enumerate(AXES.values()):
        assert {cell[number] for cell in legal()} == set(values), "a value that no legal cell has"
