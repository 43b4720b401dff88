"""The length curriculum: the cap grows while the student is unsure enough, and stays where it is otherwise."""

import itertools
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mpd_jax import config, hosts
from mpd_jax.rollouts import recipe_parts
from mpd_jax.sampling.sampler import Response, request_key
from mpd_jax.train.curriculum import CurriculumConfig, cap, next_rung
from mpd_jax.train.metrics import read_rows
from mpd_jax.train.state import NEW_MEMORY
from mpd_jax.types import Problem, UserError
from tests.e2e.tiny import QUICKSTART
from tests.test_guards import run
from tests.test_loop import Killed

LADDER = CurriculumConfig(caps=(64, 128, 256), min_entropy=0.3, every=2)


def climbed(entropies, ladder=LADDER):
    """The cap of every step of a run whose student has these mean entropies."""
    rung, caps = 0, []
    for step in range(len(entropies)):
        rows = [{"step": s, "student_entropy": value} for s, value in enumerate(entropies)]
        rung = next_rung(ladder, rows, step, rung) if step else rung
        caps.append(cap(ladder, {"length_rung": rung}))
    return caps


def test_the_cap_rises_a_rung_a_look_while_entropy_is_at_least_the_least_and_ends_on_the_last_rung():
    assert climbed([0.3] * 8) == [64, 64, 128, 128, 256, 256, 256, 256]
    assert climbed([0.29] * 8) == [64] * 8


def test_a_gate_that_closes_holds_the_rung_and_one_that_opens_again_goes_on():
    # Before step 2 row 0 is read, before step 4 rows 1 and 2, before step 6 rows 3 and 4.
    assert climbed([0.5, 0.1, 0.1, 0.5, 0.5, 0.5, 0.5]) == [64, 64, 128, 128, 128, 128, 256]


def test_rows_that_are_not_read_yet_and_steps_without_an_update_decide_nothing():
    rows = [{"step": 0}, {"step": 1, "student_entropy": None}, {"step": 2, "student_entropy": 0.4}]
    assert next_rung(LADDER, rows, 4, 0) == 1
    assert next_rung(LADDER, rows[:2], 4, 0) == 0
    assert next_rung(LADDER, [{"step": 3, "student_entropy": 9.0}], 4, 0) == 0
    assert next_rung(LADDER, rows, 5, 0) == 0  # no step to look at


@pytest.mark.parametrize(
    "changed",
    [{"caps": (64,)}, {"caps": (64, 64)}, {"caps": (128, 64)}, {"caps": (0, 64)}, {"every": 0}, {"min_entropy": -1.0}],
)
def test_what_is_no_ladder_is_refused(changed):
    with pytest.raises(UserError, match=f"{next(iter(changed))} = .* is not allowed"):
        CurriculumConfig(**{"caps": (64, 128), "min_entropy": 0.3, **changed})


@pytest.mark.parametrize("how", ["straight", "killed", "stopped", "stopped at a look"])
def test_a_run_climbs_alike_however_often_it_is_stopped(tmp_path, monkeypatch, how):
    def entropies(step, scale):
        return 0.5 if step < 3 else 0.2

    looks = itertools.count(1)

    def check():
        if next(looks) == {"stopped": 4, "stopped at a look": 5}[how]:
            raise hosts.Stopped

    kinds = {"killed": Killed, "stopped": hosts.Stopped, "stopped at a look": hosts.Stopped}
    if how != "straight":
        with monkeypatch.context() as patch, pytest.raises(kinds[how]):
            if how != "killed":
                patch.setattr(hosts, "check", check)
            run(tmp_path, entropies, curriculum=LADDER, steps=8, kill=(5, "update") if how == "killed" else None)
    state, _, written = run(tmp_path, entropies, curriculum=LADDER, steps=8)
    # Before step 2 row 0 is looked at, before step 4 rows 1 and 2.
    assert [row["length_cap"] for row in read_rows(tmp_path / "metrics.jsonl")] == [
        64,
        64,
        128,
        128,
        256,
        256,
        256,
        256,
    ]
    assert state.memory["length_rung"] == 2
    assert all(rung == min(step // 2, 2) for step, _, rung in written)


class Told:
    """A sampler that is only asked."""

    version, max_length = 0, 10**6

    def __init__(self):
        self.asked = []

    def sample(self, requests, sampling, progress=None):
        self.asked.append(([request.key for request in requests], sampling.max_tokens))
        return [Response((5,), (0.0,), "stopped") for _ in requests]


def test_the_writer_is_asked_with_the_rung_s_cap_and_every_draw_depends_on_the_rollbacks():
    ladder = "sampling.curriculum={caps: [64, 128], min_entropy: 0.3}"
    settings = config.load(QUICKSTART, [ladder, "recipe.rewrite.how=nobody"])
    student = SimpleNamespace(
        prompt=lambda *args: (1,), vocab_fingerprint=lambda: "", with_own_end=lambda ids: ids, decode=str
    )
    roles = cast(Any, SimpleNamespace(student=SimpleNamespace(chat=student)))
    sampler = Told()
    samplers = cast(Any, SimpleNamespace(writer=sampler, rewriter=None))
    parts = recipe_parts(
        settings, roles, samplers, cast(Any, None), lambda title, total: nullcontext(lambda done: None)
    )
    for rollbacks, rung in ((0, 0), (1, 1)):
        parts.write([Problem("p", "?")], 3, {**NEW_MEMORY, "rollbacks": rollbacks, "length_rung": rung})
    assert sampler.asked == [
        ([request_key(0, "write", 3, "p", 0, rollbacks)], cap) for rollbacks, cap in ((0, 64), (1, 128))
    ]
    assert sampler.asked[0][0] != sampler.asked[1][0]
