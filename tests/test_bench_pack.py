"""The benchmark of packing, at a size that takes no time."""

import json

import pytest

from mpd_jax.bench import pack
from mpd_jax.types import UserError


@pytest.mark.slow
def test_padding_is_counted_at_full_size_and_both_forms_train_on_the_same_tokens(capsys):
    result = pack.run(json=True, scale=256, width=64, layers=1, repeats=1, draws=20)
    assert capsys.readouterr().out == "" and json.loads(json.dumps(result)) == result
    assert result["mean_padding"]["packed"] <= 0.08 and result["mean_padding"]["unpacked"] >= 0.6
    (packed, row), (unpacked, longest) = (result["shapes"][form] for form in pack.FORMS)
    assert unpacked == 32 and packed < 16 and row <= 64 and longest <= 10_000 // 256
    assert result["ideal_gain"] == unpacked * longest / (packed * row)
    assert result["share"] == pytest.approx(result["gain"] / result["ideal_gain"])


def test_sizes_that_cannot_be_measured_are_refused():
    with pytest.raises(UserError, match="bench pack: scale=3"):
        pack.run(scale=3)
