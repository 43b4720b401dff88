"""Each attention kernel against the reference: packed segments, grouped queries, padding, meshes."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpd_jax.models.attention import restarting
from mpd_jax.models.kernels import attention, choose, takes_segments
from mpd_jax.sharding import MeshConfig, make_mesh
from mpd_jax.types import UserError

PACKED, ALONE = "packed", "alone"


def inputs(length: int, heads: int, kv_heads: int, size: int, rows: str, batch: int = 2):
    """Random queries, keys, values and segments; every row ends in padding."""
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((batch, length, n, size), np.float32) for n in (heads, kv_heads, kv_heads))
    segments = np.zeros((batch, length), np.int32)
    for row in range(batch):
        cuts = np.sort(random.choice(np.arange(1, length), 3 if rows == PACKED else 1, replace=False))
        for number, (start, end) in enumerate(zip([0, *cuts], cuts, strict=False), start=1):
            segments[row, start:end] = number
    return q, k, v, segments


def run(kernel: str, q, k, v, segments, mesh=None):
    """What attention gives and its gradient, padding aside."""

    def value(q, k, v):
        out = jnp.where((segments > 0)[:, :, None, None], attention(kernel, segments)(q, k, v), 0)
        return jnp.sum(jnp.sin(out)), out

    with jax.set_mesh(mesh) if mesh else nullcontext(), jax.default_matmul_precision("highest"):
        (_, out), gradient = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return jax.device_get((out, *gradient))


def dense(q, k, v, segments) -> np.ndarray:
    """The definition, token by token, in float64."""
    out, group = np.zeros(q.shape), q.shape[2] // k.shape[2]
    for b, t in zip(*np.nonzero(segments), strict=True):
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        for n in range(q.shape[2]):
            scores = k[b, seen, n // group].astype(np.float64) @ q[b, t, n] / np.sqrt(q.shape[3])
            weight = np.exp(scores - scores.max())
            out[b, t, n] = weight / weight.sum() @ v[b, seen, n // group]
    return out


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-6 * np.abs(y).max())


def test_the_reference_is_the_definition():
    arrays = inputs(24, 4, 2, 8, PACKED)
    np.testing.assert_allclose(run("reference", *arrays)[0], dense(*arrays), atol=1e-6)


@pytest.mark.parametrize(
    ("kernel", "length", "size", "rows"),
    [
        ("splash_emulated", 200, 64, PACKED),
        ("splash_emulated", 600, 16, PACKED),  # two blocks of 512
        ("cudnn_emulated", 40, 16, ALONE),
    ],
)
def test_a_kernel_gives_what_the_reference_gives_with_its_gradient(kernel, length, size, rows):
    arrays = inputs(length, 4, 2, size, rows)
    assert_same(run(kernel, *arrays), run("reference", *arrays))


@pytest.mark.parametrize(("mesh", "kv_heads"), [((2, 2, 2), 4), ((1, 1, 8), 2)], ids=str)
def test_heads_and_rows_lie_over_the_mesh_and_key_value_heads_that_do_not_divide_are_shared(mesh, kv_heads):
    arrays = inputs(40, 8, kv_heads, 8, PACKED, batch=4)
    assert_same(run("splash_emulated", *arrays, make_mesh(MeshConfig(*mesh))), run("reference", *arrays))


def test_no_kernel_but_the_reference_holds_all_scores():
    """Nor a mask of them: no array of T x T is in the traced program."""
    arrays = inputs(1024, 2, 1, 8, ALONE, batch=1)
    for kernel, whole in {"reference": True, "splash": False}.items():
        jaxpr = str(jax.make_jaxpr(lambda q, k, v, s, kernel=kernel: attention(kernel, s)(q, k, v))(*arrays))
        assert ("1024,1024]" in jaxpr) == whole


def test_the_kernel_is_chosen_by_the_platform_of_the_devices_and_can_be_named():
    assert choose("auto", "bfloat16", "tpu") == choose("auto", "float32", "tpu") == "splash"
    assert (choose("auto", "bfloat16", "gpu"), choose("auto", "float32", "gpu")) == ("cudnn", "reference")
    assert choose("auto", "bfloat16", "cpu") == choose("reference", "bfloat16", "tpu") == "reference"
    assert (choose("splash", "float32", "cpu"), choose("cudnn", "bfloat16", "cpu")) == (
        "splash_emulated",
        "cudnn_emulated",
    )
    assert [takes_segments(k) for k in ("splash", "reference", "cudnn", "cudnn_emulated")] == [True, True, False, False]
    with pytest.raises(UserError, match="attention: cudnn takes no float32"):
        choose("cudnn", "float32", "gpu")


def test_positions_restart_with_every_segment():
    segments = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 3, 3, 3, 3, 0]], np.int32)
    np.testing.assert_array_equal(restarting(jnp.asarray(segments)), [[0, 1, 2, 0, 1, 0, 1], [0, 0, 0, 1, 2, 3, 0]])
