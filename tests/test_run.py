"""What commands do around the loop: which changes make another run, and which old measurements are kept."""

import json
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mpd_jax import config, hosts, run
from mpd_jax.lock import locked
from mpd_jax.run import Judged, recorded_cost, refuse_another_run, telling_what_is_saved
from mpd_jax.train.metrics import read_rows
from mpd_jax.types import UserError
from tests.e2e.tiny import QUICKSTART


def run_of(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(config.to_yaml(config.load(QUICKSTART)))
    return tmp_path


@pytest.mark.parametrize(
    "override", ["train.learning_rate=1.0e-4", "mesh.fsdp=1", "eval.problems=3", "sampling.slots=8"]
)
def test_what_may_change_between_two_starts_of_a_run(tmp_path, override):
    refuse_another_run(run_of(tmp_path), config.load(QUICKSTART, [override]))


@pytest.mark.parametrize(
    "override", ["run.seed=1", "recipe.loss.kind=forward_kl", "train.batch_size=8", "train.eps=0.1"]
)
def test_what_would_make_it_another_run_is_refused_with_both_values(tmp_path, override):
    key, _, value = override.partition("=")
    with pytest.raises(UserError, match=rf"run.dir: .*{key} = '?{value}'?, and .* there"):
        refuse_another_run(run_of(tmp_path), config.load(QUICKSTART, [override]))


def test_the_number_of_steps_may_change_only_where_the_rate_does_not_depend_on_it(tmp_path):
    more = {name: [f"train.schedule={name}", "train.steps=60"] for name in ("constant", "cosine")}
    for name, overrides in more.items():
        (tmp_path / "config.yaml").write_text(config.to_yaml(config.load(QUICKSTART, overrides[:1])))
        longer = config.load(QUICKSTART, overrides)
        if name == "constant":
            refuse_another_run(tmp_path, longer)
            continue
        with pytest.raises(UserError, match=r"train.steps = 60, and 48 there"):
            refuse_another_run(tmp_path, longer)


def test_a_run_directory_has_one_trainer(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="is being trained by another process"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_resumed_run_forgets_what_was_measured_of_steps_it_has_not_reached(tmp_path):
    directory = tmp_path / "evaluations"
    (directory / "math500").mkdir(parents=True)
    names = ["base", "prompt-only concise", "step 5", "step 10", "trained, step 10", "trained, step 20"]
    names += ["math500/trained, step 10", "math500/trained, step 20"]
    for name in names:
        for suffix in (".jsonl", ".json"):
            (directory / f"{name}{suffix}").write_text(json.dumps({}))
    run = SimpleNamespace(parts=SimpleNamespace(run_dir=tmp_path))
    Judged(cast(Any, run), cast(Any, None)).forget_after(10)

    def left():
        return {str(path.relative_to(directory)).rsplit(".", 1)[0] for path in directory.rglob("*.json*")}

    assert left() == set(names) - {"trained, step 20", "math500/trained, step 20"}
    Judged(cast(Any, run), cast(Any, None)).forget_after(0)
    assert left() == set(names[:2])


@pytest.mark.parametrize(
    ("step", "said"), [(None, "stopped before the first checkpoint, so"), (3, "stopped and saved after step 3")]
)
def test_a_run_that_was_stopped_says_what_is_saved(step, said):
    checkpoints = cast(Any, SimpleNamespace(latest=lambda: step))
    with pytest.raises(hosts.Stopped, match=said), telling_what_is_saved(checkpoints):
        raise hosts.Stopped


def test_an_evaluation_is_read_back_without_loading_and_the_base_is_held_by_its_sampler_alone(tmp_path, monkeypatch):
    class Weights:
        pass

    held, loaded, noted = [], [], []

    def load(weights, version):
        held[:], loaded[len(loaded) :] = [weakref.ref(weights)], [version]

    def evaluate(self, name, context):
        if name == "base":
            assert held[0]() is None
        return [SimpleNamespace(accuracy=0.5, mean_tokens=9.0)]

    checkpoints = SimpleNamespace(note=lambda *words: noted.append(words))
    run = SimpleNamespace(
        parts=SimpleNamespace(run_dir=tmp_path, checkpoints=checkpoints),
        config=config.load(QUICKSTART),
        mesh=None,
        student=SimpleNamespace(start=lambda mesh, seed: Weights()),
        load_student=load,
    )
    judged = Judged(cast(Any, run), cast(Any, None))
    state = cast(Any, SimpleNamespace(step=7, weights=Weights()))
    monkeypatch.setattr(Judged, "_evaluate", evaluate)
    judged.between(state)
    assert loaded == [7]
    judged.base(state)
    assert loaded == [7, 0]
    head = tmp_path / "evaluations" / "step 7.json"
    head.parent.mkdir()
    head.write_text(json.dumps({"settings": judged._settings(), "seconds": 1.0}))
    judged.between(state)
    assert loaded == [7, 0]
    assert len(judged.trained(state)) == 1 and loaded == [7, 0, 7]
    assert noted == [(7, {"accuracy": 0.5, "mean_tokens": 9.0}, judged._settings())] * 3


def test_a_damaged_evaluation_is_made_again(tmp_path):
    head = tmp_path / "evaluations" / "base.json"
    head.parent.mkdir()
    settings = config.load(QUICKSTART)
    run = SimpleNamespace(parts=SimpleNamespace(run_dir=tmp_path), config=settings)
    judged = Judged(cast(Any, run), cast(Any, None))
    assert not judged._stored("base")
    whole = json.dumps({"settings": judged._settings(), "seconds": 1.0})
    head.write_text(whole)
    assert judged._stored("base")
    head.with_name("step 8.json").write_text(json.dumps({"settings": "of another process", "seconds": 2.0}))
    assert judged.seconds() == {"evaluate base": 1.0, "evaluate step 8": 2.0}
    for damaged in (whole[:40], "[]", "{}", ""):
        head.write_text(damaged)
        assert not judged._stored("base") and judged.seconds() == {"evaluate step 8": 2.0}


@pytest.mark.parametrize("end", [KeyboardInterrupt, hosts.Stopped, None])
def test_every_process_of_a_run_leaves_what_it_cost_however_it_ends(tmp_path, end):
    def costs():
        return [(row["steps"], row["peak_memory_bytes"] > 0) for row in read_rows(tmp_path / "processes.jsonl")]

    with pytest.raises(end) if end else nullcontext(), recorded_cost(tmp_path, 0, 8, 0.0) as saving:
        saving(3)
        assert costs() == [(3, True)]  # what SIGKILL leaves
        saving(6)
        if end:
            raise end
    assert costs() == [(6, True)]
    with recorded_cost(tmp_path, 8, 8, 0.0):
        pass  # all updates were done, and the last evaluation was not
    (tmp_path / "summary.json").write_text("{}")
    with recorded_cost(tmp_path, 8, 8, 0.0):
        pass
    assert costs() == [(6, True), (0, True)]


def test_a_process_that_rolls_back_behind_its_start_has_gained_no_steps(tmp_path):
    with recorded_cost(tmp_path, 6, 8, 0.0) as saving:
        saving(4)
    assert [row["steps"] for row in read_rows(tmp_path / "processes.jsonl")] == [0]


def test_a_compile_cache_that_can_only_be_read_is_told(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(run.jax.config, "update", lambda key, value: None)
    run.keep_compiled(str(tmp_path), said.append)
    assert not said
    monkeypatch.setattr(run.os, "access", lambda path, mode: False)  # root may write wherever it is
    run.keep_compiled(str(tmp_path), said.append)
    assert len(said) == 1 and f"run.compile_cache: {tmp_path} cannot be written" in said[0]
