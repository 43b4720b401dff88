"""Set-up: problems that lack something and sizes that cannot work are told before anything is sampled."""

from contextlib import nullcontext

import pytest

from mpd_jax import build, config, hosts
from mpd_jax.build import check_sizes, require_what_is_read
from mpd_jax.named import source
from mpd_jax.roles import ModelFiles, open_roles
from mpd_jax.sharding import make_mesh
from mpd_jax.types import Problem, UserError
from tests.e2e.tiny import QUICKSTART, SMALL


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.max_length=96", "train.max_length: 96 tokens .* leave no room"),
        ("train.max_length=4096", "train.max_length: 4096 tokens exceed the window of 1024 of the student"),
        ("sampling.prompt_tokens=20", "sampling.prompt_tokens: problem 'tiny-.*' makes a prompt of"),
    ],
)
def test_sizes_that_cannot_work_are_told_before_the_run(override, told):
    settings = config.load(QUICKSTART, [override])
    roles = open_roles(settings)
    problems = build.read_problems(settings.problems, "heldout")
    with pytest.raises(UserError, match=told):
        check_sizes(settings, roles, problems)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["recipe.rewrite.keep=[correct]"], "recipe.rewrite: problem 'second' has no reference answer"),
        (["recipe.rewrite.how=earliest_correct_prefix"], "recipe.rewrite: problem 'second' has no reference answer"),
        (["recipe.target.context=privileged"], "recipe.target.context: privileged .* 'second' has neither"),
        (["recipe.write.by=dataset"], "recipe.write.by=dataset: problem 'second' has no response"),
    ],
)
def test_a_problem_that_lacks_what_the_recipe_reads_is_told_before_the_run(overrides, told):
    recipe = config.load(QUICKSTART, overrides).recipe
    whole = Problem("first", "1+1?", "2", "So \\boxed{2}")
    require_what_is_read(recipe, [whole])
    with pytest.raises(UserError, match=told):
        require_what_is_read(recipe, [whole, Problem("second", "1+2?")])


def test_a_host_whose_model_is_another_is_named_with_the_section_before_weights_are_read(tmp_path, monkeypatch):
    settings = config.load(QUICKSTART, SMALL)
    roles = open_roles(settings)
    other = {**roles.fingerprints(settings.recipe), "teacher": "another"}
    others = iter([None, *other.values()])
    monkeypatch.setattr(hosts, "gather", lambda value: [value, next(others) or value])
    monkeypatch.setattr(ModelFiles, "weights", None)
    with pytest.raises(UserError, match="teacher: a file of the model: process 1 of 2 has read something else"):
        build.build(settings, tmp_path, print, print, lambda title, total: nullcontext(print), roles=roles)


@pytest.mark.parametrize("key", ["recipe.loss.token_weight={}", "recipe.rewrite.keep=[finished,{}]"])
def test_a_host_on_which_a_function_of_the_config_is_another_is_told(tmp_path, monkeypatch, key):
    monkeypatch.syspath_prepend(tmp_path)
    module = f"own_{'weight' if 'weight' in key else 'rule'}"
    file = tmp_path / f"{module}.py"
    file.write_text("def mine(stats):\n    return stats.counts")
    settings = config.load(QUICKSTART, [key.format(f"'{module}:mine'")])
    here = build._digest(settings)
    assert build._digest(settings) == here
    file.write_text("def mine(stats):\n    return 2 * stats.counts")
    assert build._digest(settings) != here
    assert source("math:sqrt") == source("finished") == b""


@pytest.mark.parametrize("loaded", [0, 1, 2])
def test_a_stop_is_obeyed_before_the_next_weights_are_read(tmp_path, monkeypatch, loaded):
    """Student, then teacher, then a rewriter of its own; asked to stop at first, or while one of the two is read."""
    read, weights = [], ModelFiles.weights

    def reading(files, mesh):
        read.append(files.key)
        return weights(files, mesh)

    def check():
        if len(read) == loaded:
            raise hosts.Stopped

    monkeypatch.setattr(ModelFiles, "weights", reading)
    monkeypatch.setattr(hosts, "check", check)
    settings = config.load(QUICKSTART, [*SMALL, "rewriter={path: 'tiny:teacher'}"])
    with pytest.raises(hosts.Stopped, match="stopped before the run was set up, so there was nothing to save"):
        build.build(settings, tmp_path, print, print, lambda title, total: nullcontext(print))
    assert read == ["student", "teacher"][:loaded]


def test_what_the_config_says_of_an_update_reaches_it(monkeypatch):
    given = {}
    monkeypatch.setattr(build, "make_update", lambda *positional, **named: given.update(named, positional=positional))
    merged = ["recipe.loss.merge_stops=true", "train.micro_batches=4", "train.learning_rate=0.5"]
    read = ["recipe.rewrite.how=repair", "recipe.target.context=rewrite"]
    settings = config.load(QUICKSTART, [*SMALL, *merged, *read])
    roles, mesh = open_roles(settings), make_mesh(settings.mesh)
    build.update_of(settings, roles, mesh)
    chat = roles.student.chat
    assert given["micro_batches"] == 4 and set(given["stop_ids"]) == roles.student.eos_ids
    assert given["exchanged"] == (chat.delimiter, chat.closing) and given["vocab_size"] == chat.vocab_size
    assert given["positional"][2] == settings.recipe.loss and given["positional"][4] is mesh
    build.update_of(config.load(QUICKSTART, SMALL), roles, mesh)
    assert given["micro_batches"] == 1 and given["exchanged"] is None
