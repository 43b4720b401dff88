"""Claims about the proof: over noise and update sizes its three answers come out as they should, never a false one.

`pytest -s` prints how often each was given.
"""

import numpy as np
import pytest

from mpd_jax.sampling.proof import ERROR, LEAST_POSITIONS, TOLERANCE, VISIBLE, judge, slope_by_prompt

PROMPTS, POSITIONS, DRAWS = 64, 47, 250
PROMPT = np.repeat(np.arange(PROMPTS), POSITIONS)
NOISE = {"float32": 2e-6, "bfloat16": 0.03}  # of a server, nats
# From invisible to plain, most of them where the answer turns.
UPDATES = {
    "float32": (1e-6, 1e-5, 5e-5, 1e-4, 2e-4, 1e-3, 1e-2),
    "bfloat16": (1e-3, 3e-3, 5e-3, 7e-3, 1e-2, 3e-2, 3e-1),
}
EXACT = 1e-6  # noise of the numbers here


def fields(count: int, seed: int) -> np.ndarray:
    """Differences as they are: rare large ones, louder at some positions and prompts, alike within a prompt [., N]."""
    rng = np.random.default_rng(seed)
    shape = (count, PROMPTS, POSITIONS)
    alone, shared = rng.standard_t(4, shape), rng.normal(size=(count, PROMPTS, 1))
    loud = np.exp(0.5 * rng.normal(size=(count, PROMPTS, 1)) + 0.5 * rng.normal(size=shape))
    drawn = ((0.8 * alone + 0.6 * shared) * loud).reshape(count, -1)
    return drawn / drawn.std(axis=1, keepdims=True)


@pytest.fixture(scope="module")
def pools() -> tuple[np.ndarray, ...]:
    return fields(100, 0), fields(100, 1), np.random.default_rng(2).normal(size=(100, PROMPTS * POSITIONS))


def answers(pools, noise: float, update: float, tolerance: float, fresh: bool) -> list:
    """The proofs of DRAWS pushes to a server whose noise stays by half, and that is off by a constant, too."""
    rng, found = np.random.default_rng(int(fresh)), []
    for _ in range(DRAWS):
        (moves, hums, rests), (a, b, c, d, e, f) = pools, rng.integers(100, size=6)
        old, new = EXACT * rests[c], update * moves[a] + EXACT * rests[d]
        stays, before, now = (noise / np.sqrt(2) * rng.choice([-1, 1]) * hums[n] for n in (b, e, f))
        stays = stays + rng.normal() * noise
        server = (update * moves[a] if fresh else 0.0) + stays + now
        found.append(judge(server, new, PROMPT, tolerance, old=old, off=stays + before))
    return found


@pytest.mark.slow
def test_the_three_answers_over_noise_and_updates(pools):
    print(f"\n{'noise':>8} {'update':>8}   fresh: verified undecided stale   stale: verified undecided stale")
    for dtype, noise in NOISE.items():
        for update in UPDATES[dtype]:
            row = {}
            for fresh in (True, False):
                proofs = answers(pools, noise, update, TOLERANCE[dtype], fresh)
                row[fresh] = [proof.verdict for proof in proofs]
                visible = [proof for proof in proofs if proof.update >= VISIBLE and proof.error <= ERROR]
                assert all(proof.verdict == ("verified" if fresh else "stale") for proof in visible)
                assert ("stale" if fresh else "verified") not in row[fresh]
                assert update < UPDATES[dtype][-1] or len(visible) == DRAWS
            shares = [row[f].count(v) / DRAWS for f in (True, False) for v in ("verified", "undecided", "stale")]
            cells = "{:>15.1%} {:>9.1%} {:>6.1%}   {:>14.1%} {:>9.1%} {:>6.1%}".format(*shares)
            print(f"{noise:>8.0e} {update:>8.0e}   {cells}")
    print(f"never verified on stale weights: {sum(map(len, UPDATES.values())) * DRAWS} draws")


def test_the_error_is_as_large_as_the_slope_scatters(pools):
    moves, hums, _ = pools
    pairs = [(a, b) for a in range(20) for b in range(20)]
    ones = np.ones((len(PROMPT), 1))
    drawn = [slope_by_prompt(moves[a], moves[a] + hums[b], ones, PROMPT) for a, b in pairs]
    scatter = np.std([slope for slope, _ in drawn])
    assert np.mean([slope for slope, _ in drawn]) == pytest.approx(1, abs=0.02)
    assert scatter < np.sqrt(np.mean([error**2 for _, error in drawn])) < 1.3 * scatter


def test_the_slope_is_least_squares_and_its_error_the_jackknife():
    x, y, z = np.random.default_rng(0).normal(size=(3, 120))
    prompt, beside = np.repeat(np.arange(6), 20), np.stack([np.ones(120), z], axis=1)

    def slope_of(rows):
        return np.linalg.lstsq(np.column_stack([x, beside])[rows], y[rows], rcond=None)[0][0]

    without = np.array([slope_of(prompt != group) for group in range(6)])
    slope, error = slope_by_prompt(x, y, beside, prompt)
    assert slope == pytest.approx(slope_of(prompt >= 0))
    assert error == pytest.approx(np.sqrt(5 / 6 * np.sum((without - without.mean()) ** 2)))


def test_what_a_server_is_always_off_by_is_not_taken_for_the_update(pools):
    """Noise that stays, half of it along the update: without its record the plain slope would call it verified."""
    update = 0.01 * pools[0][0]
    stays, hum = 0.75 * update + 0.01 * pools[1][0], 1e-4 * pools[1][1]
    old = np.zeros_like(update)
    plain = judge(stays, update, PROMPT, TOLERANCE["bfloat16"], old=old)
    assert plain.slope is not None and plain.slope > 0.5
    for fresh, verdict in ((0, "stale"), (1, "verified")):
        proof = judge(fresh * update + stays + hum, update, PROMPT, TOLERANCE["bfloat16"], old=old, off=stays)
        assert proof.verdict == verdict and proof.slope == pytest.approx(fresh, abs=0.05)


def test_the_first_push_agrees_or_is_stale(pools):
    new = fields(1, 3)[0]
    for dtype, noise in NOISE.items():
        hum = noise * pools[1][0]
        assert judge(new + hum, new, PROMPT, TOLERANCE[dtype]).verdict == "agrees"
        assert judge(new + hum + 1.0, new, PROMPT, TOLERANCE[dtype]).verdict == "stale"
    assert judge(np.full_like(new, np.nan), new, PROMPT, TOLERANCE["bfloat16"]).verdict == "stale"


def test_differences_add_up_until_they_are_seen(pools):
    """Five pushes, each too small to be seen against the first: what is compared with stays what was verified."""
    step, hum = 0.1 * NOISE["bfloat16"] * pools[0][0], NOISE["bfloat16"] * pools[1][0]
    old, at = np.zeros_like(step), [n * step for n in range(1, 6)]
    off = NOISE["bfloat16"] * pools[1][1]
    proofs = [judge(new + hum, new, PROMPT, TOLERANCE["bfloat16"], old=old, off=off) for new in at]
    assert proofs[0].verdict == "undecided" and proofs[-1].verdict == "verified"
    assert judge(hum, at[-1], PROMPT, TOLERANCE["bfloat16"], old=old, off=off).verdict == "stale"


def test_without_an_update_nothing_is_verified(pools):
    """A push of the same weights: a slope of 0 over 0, and then one that only the noise of our own numbers makes."""
    old, hum = fields(1, 4)[0], NOISE["float32"] * pools[1][0]
    assert judge(old + hum, old, PROMPT, TOLERANCE["float32"], old=old).verdict == "undecided"
    for rest in pools[2][:50]:
        assert judge(old + hum, old + EXACT * rest, PROMPT, TOLERANCE["float32"], old=old).verdict == "undecided"


def test_other_weights_altogether_are_stale_however_little_the_update_explains_of_them(pools):
    """A server that came back with the weights of its start: no slope can be seen, but it is far from what it was."""
    update, away = 1e-3 * pools[0][0], 0.2 * pools[0][1]
    off = NOISE["bfloat16"] * pools[1][0]
    proof = judge(away, update, PROMPT, TOLERANCE["bfloat16"], old=np.zeros_like(update), off=off)
    assert proof.verdict == "stale" and proof.error is not None and proof.error > ERROR


def test_too_few_positions_are_no_proof():
    few = np.zeros(LEAST_POSITIONS - 1)
    with pytest.raises(AssertionError, match="1999 positions"):
        judge(few, few, np.zeros(len(few), int), 0.3)
