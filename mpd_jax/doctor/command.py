"""`mpd-jax doctor`: what would end a run later, told before any device time is spent.

Each check is the run's own where the run has one; none compiles, and weights are read for one of them alone, the
agreement of servers with JAX.
"""

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from mpd_jax import hosts
from mpd_jax.config import RunConfig
from mpd_jax.doctor import machine, models
from mpd_jax.doctor.rows import Row, as_json, failed, sound, table
from mpd_jax.doctor.servers import Inspected, asked_of_servers
from mpd_jax.roles import Roles, assign_roles, open_model
from mpd_jax.screen import Screen
from mpd_jax.serving import Secrets
from mpd_jax.sharding import make_mesh
from mpd_jax.types import UserError


def run(config: RunConfig, secrets: Secrets, *, json: bool = False, quick: bool = False) -> dict[str, Any]:
    """The verdicts, printed as a table unless `json`. quick: no weights are read."""
    found = examine(config, secrets, Screen(), quick=quick)
    if not json:
        console = Console()
        (console if console.is_terminal else Console(width=120)).print(table(found))
    return as_json(found)


def examine(config: RunConfig, secrets: Secrets, screen: Screen, *, quick: bool) -> list[Row]:
    try:
        mesh = make_mesh(config.mesh)
    except UserError as error:
        return [failed("mesh", error), Row("all else", "skipped", "it needs a mesh")]
    try:
        roles = assign_roles(config, open_model)
    except UserError as error:
        return [failed("models", error), Row("all else", "skipped", "it needs the models")]
    found = models.rows(config, roles)
    found += [models.problems(config, roles, mesh), *machine.rows(config, roles, mesh)]
    loading = None if quick or not sound(found) else screen.say
    found += served(config, roles, mesh, secrets, whole=True, loading=loading)
    if not quick and loading is None:
        found.append(Row("log-probabilities of servers", "skipped", "what fails above has to be mended first"))
    return found


def before_training(config: RunConfig, roles: Roles, secrets: Secrets, say: Callable[[str], None]) -> None:
    """The quick part: warnings are said, and a failure is a UserError. Servers that do not answer yet are no failure: a
    run waits for them. Every process calls it, for they find each other's devices together; process 0 looks."""
    mesh = make_mesh(config.mesh)
    hosts.from_main(lambda: _before_training(config, roles, mesh, secrets, say))


def _before_training(config: RunConfig, roles: Roles, mesh: Mesh, secrets: Secrets, say: Callable[[str], None]) -> None:
    found = machine.rows(config, roles, mesh) + served(config, roles, mesh, secrets)
    wrong = [row for row in found if row.verdict == "FAIL" and not row.silent]
    for row in found:
        if row.verdict == "warn":
            say(f"warning: {row.what}: {row.words}")
    if wrong:
        raise UserError("\n".join(dict.fromkeys(row.words for row in wrong)))


def served(
    config: RunConfig,
    roles: Roles,
    mesh: Mesh,
    secrets: Secrets,
    *,
    whole: bool = False,
    loading: Callable[[str], None] | None = None,
) -> list[Row]:
    """The samplers on the mesh, and every server that the run will ask.

    whole: start flags too, and a server that does not answer is a failure. loading: told before weights are read, to
    be compared with servers'; None leaves that out.
    """
    try:
        asked = asked_of_servers(config, roles, mesh)
    except UserError as error:
        return [failed("samplers", error)]
    found: list[Row] = []
    for one in asked:
        inspected = Inspected(config, one, secrets(config.sampling.server.key), whole=whole)
        rows = inspected.rows()
        found += rows
        if loading is None:
            continue
        if not sound(rows):
            found.append(Row(f"{one.held.key}: log-probabilities", "skipped", "its servers have to be mended first"))
            continue
        loading(f"loading {one.held.directory} to compare its log-probabilities with its servers'")
        prompt = one.held.chat.prompt("plain", models.PROBE)
        found += inspected.agreement(mesh, [prompt], one.held.weights(mesh))
    return found
