"""Set-up: problems that lack something and sizes that cannot work are told before anything is sampled."""

import pytest

from mpd_jax import build, config
from mpd_jax.build import check_sizes, require_what_is_read
from mpd_jax.roles import open_roles
from mpd_jax.sharding import make_mesh
from mpd_jax.types import Problem, UserError
from tests.e2e.tiny import QUICKSTART


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
    mesh, roles = make_mesh(settings.mesh), open_roles(settings)
    problems = build.read_problems(settings.problems, "heldout")
    with pytest.raises(UserError, match=told):
        check_sizes(settings, roles, mesh, problems)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["recipe.rewrite.keep=[correct]"], "recipe.rewrite.keep: 'correct' needs .* 'second' has none"),
        (["recipe.write.by=dataset"], "recipe.write.by=dataset: problem 'second' has no response"),
    ],
)
def test_a_problem_that_lacks_what_the_recipe_reads_is_told_before_the_run(overrides, told):
    recipe = config.load(QUICKSTART, overrides).recipe
    whole = Problem("first", "1+1?", "2", "So \\boxed{2}")
    require_what_is_read(recipe, [whole])
    with pytest.raises(UserError, match=told):
        require_what_is_read(recipe, [whole, Problem("second", "1+2?")])
