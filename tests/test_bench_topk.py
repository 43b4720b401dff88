"""The benchmark of the tail bucket, at a size that takes no time."""

import itertools
import json

import pytest

from mpd_jax.bench import topk
from mpd_jax.types import UserError


@pytest.mark.slow
def test_what_is_left_grows_with_k_to_the_whole_and_the_table_says_so(capsys):
    result = topk.run(ks=(1, 8, 512), problems=2, max_tokens=8)
    table = capsys.readouterr().out
    assert json.loads(json.dumps(result)) == result
    rows = result["rows"]
    assert [row["k"] for row in rows] == [1, 8, 512, None] and 0 < result["tokens"] <= 16
    for fewer, more in itertools.pairwise(rows[:3]):
        for kind in topk.KINDS:
            assert fewer[kind] < more[kind]
        assert fewer["tail_mass"] > more["tail_mass"]
    for kind in topk.KINDS:
        assert rows[2][kind] == pytest.approx(rows[3][kind], rel=1e-5)
    assert "tail" in table and "100.0 %" in table and "all" in table


def test_sizes_that_cannot_be_measured_are_refused():
    with pytest.raises(UserError, match=r"bench topk ks=\[0\]"):
        topk.run(ks=(0,))
