"""Whole rounds: the sum is right whoever drops out, and shows nothing until it is unmasked."""

import itertools
import json
import math

import numpy as np
import pytest
from protocol import STAGES, Round, decoded, encoded, run_round, terms
from scipy.stats import chi2

from fedseg.errors import ProtocolError, TooFewSites
from fedseg.privacy import secagg_server
from fedseg.privacy.roster import Terms, party_of
from fedseg.privacy.secagg_keys import join_secret, mask_key, self_mask_key
from fedseg.privacy.secagg_masks import Words, add_mask
from fedseg.privacy.secagg_server import RunningSum
from fedseg.privacy.secagg_state import State

SIZE = 500


def uploads(
    count: int, agreed: Terms, *, seed: int = 0, encoded_for: int | None = None
) -> tuple[np.ndarray, np.ndarray, list[Words]]:
    """Values, weights and words of sites; `encoded_for`: sites of the roster, where not all."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 0.01, (count, SIZE)).astype(np.float32)
    weights = rng.integers(1, 100, count).astype(float)
    words = [
        encoded(values[i], weights[i], agreed, encoded_for or count, seed=1000 * seed + i)
        for i in range(count)
    ]
    return values, weights, words


def plain_sum(done: Round) -> Words:
    """The oracle: the words before masking, of whose are in the sum."""
    rows = [done.plain[index].astype(np.uint64) for index in done.total.sites]
    return (np.sum(rows, axis=0) % 2**32).astype(np.uint32)


@pytest.mark.parametrize("count", [3, 4, 10, 50])
def test_sum_equals_plain_fedavg_to_fixed_point_error(count: int) -> None:
    agreed = terms()
    values, weights, words = uploads(count, agreed)
    done = run_round(words, agreed)
    np.testing.assert_array_equal(done.total.words, plain_sum(done))
    mean, total = decoded(done, SIZE)
    assert total == weights.sum()
    expected = np.average(values.astype(np.float64), axis=0, weights=weights)
    step = 0.5 * 100 / (done.party.encoding.scale * total)
    np.testing.assert_allclose(mean, expected, atol=6 * math.sqrt(count) / 2 * step, rtol=1e-6)
    assert all(state.stage == "done" for state in done.states.values())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("count", [4, 10, 20])
def test_one_site_drops_out_at_any_stage(stage: str, count: int) -> None:
    agreed = terms()
    roster = count - (stage == "keys")
    values, weights, words = uploads(count, agreed, encoded_for=roster)
    for site in (0, count - 1):
        done = run_round(words, agreed, drop={site: stage})
        np.testing.assert_array_equal(done.total.words, plain_sum(done))
        mean, total = decoded(done, SIZE)
        counted = weights * (np.arange(count) != site) if stage in STAGES[:3] else weights
        assert total == counted.sum()
        expected = np.average(values.astype(np.float64), axis=0, weights=counted)
        np.testing.assert_allclose(mean, expected, atol=1e-5)


def test_sites_drop_out_at_all_stages_down_to_the_threshold() -> None:
    agreed = terms()
    _, weights, words = uploads(10, agreed, encoded_for=9)
    # 9 take part, of which 6 must be left: more than 60%.
    drop = {0: "keys", 3: "shares", 5: "upload", 8: "unmask"}
    done = run_round(words, agreed, drop=drop)
    assert done.party.size == 9 and done.party.threshold == 6 == len(done.revealed)
    np.testing.assert_array_equal(done.total.words, plain_sum(done))
    assert decoded(done, SIZE)[1] == sum(weights[i] for i in range(10) if i not in (0, 3, 5))


@pytest.mark.parametrize("stage", STAGES[1:])
def test_below_the_threshold_a_round_fails_by_name(stage: str) -> None:
    agreed = terms()
    *_, words = uploads(10, agreed)
    for left in (7, 6):
        drop = {site: stage for site in range(10 - left)}
        if left == 7:
            run_round(words, agreed, drop=drop)
            continue
        with pytest.raises(TooFewSites, match=r"secagg-threshold|neighbours"):
            run_round(words, agreed, drop=drop)
    with pytest.raises(TooFewSites, match="at least 3"):
        run_round(words[:3], agreed, drop={0: "keys"})


@pytest.mark.parametrize("stage", STAGES[1:3])
def test_the_sum_of_two_is_never_unmasked(stage: str) -> None:
    """Each of the two would know the other's words from it."""
    agreed = terms()
    *_, words = uploads(3, agreed)
    run_round(words, agreed)
    with pytest.raises(TooFewSites, match=r"2 of 3 sites .*expected at least 3"):
        run_round(words, agreed, drop={0: stage})


def lose(count: int, of: int) -> None:
    """Run a round that so many sites leave at different stages; check its sum."""
    agreed = terms()
    _, weights, words = uploads(of, agreed)
    lost = np.random.default_rng(1).permutation(of)[:count].tolist()
    stages = itertools.cycle(("shares", "upload", "unmask"))
    drop = {site: next(stages) for site in lost}
    done = run_round(words, agreed, drop=drop)
    assert len(done.party.neighbours[0]) == 32
    np.testing.assert_array_equal(done.total.words, plain_sum(done))
    gone = [site for site, stage in drop.items() if stage != "unmask"]
    assert decoded(done, SIZE)[1] == weights.sum() - weights[gone].sum()


def test_fifty_sites_survive_the_loss_of_fifteen() -> None:
    """As many as the sparse graph is made for; which sites are neighbours is drawn anew."""
    lose(15, of=50)


def test_nineteen_lost_of_fifty_give_the_right_sum_or_an_error_by_name() -> None:
    """As many as the threshold lets go: a site's neighbours may be too few, never the sum wrong."""
    try:
        lose(19, of=50)
    except TooFewSites as error:
        assert "of 33 shares of a site's secret came" in str(error)


@pytest.mark.slow
def test_a_hundred_rounds_of_ten_sites() -> None:
    """One site drops out in each; states go from round to round as stored text."""
    before: dict[int, State] = {}
    seen: set[bytes] = set()
    for number in range(1, 101):
        agreed = terms(number)
        *_, words = uploads(10, agreed, seed=number)
        site, stage = number % 10, STAGES[1 + number % 4]
        done = run_round(words, agreed, drop={site: stage}, before=before)
        np.testing.assert_array_equal(done.total.words, plain_sum(done))
        before = {k: State.from_json(state.to_json()) for k, state in done.states.items()}
        masked = {words.tobytes()[:64] for words in done.uploads.values()}
        assert not masked & seen
        seen |= masked


def test_uploads_are_uniform_and_one_mask_left_in_place_hides_the_sum() -> None:
    agreed = terms()
    count = 4
    words = [np.full(2_500_000, 1, np.uint32) for _ in range(count)]
    done = run_round(words, agreed)
    everything = np.concatenate(list(done.uploads.values()))
    assert len(everything) == 10_000_000
    for cell in (everything >> 24, everything & 0xFF):
        counts = np.bincount(cell, minlength=256)
        expected = len(cell) / 256
        statistic = ((counts - expected) ** 2 / expected).sum()
        assert chi2.ppf(1e-4, 255) < statistic < chi2.ppf(1 - 1e-4, 255)
    assert (done.total.words == count).all()
    # Each mask is uniform; one alone is enough to hide the sum.
    sum_of_two = done.uploads[0] + done.uploads[1]
    assert (sum_of_two == 2).mean() < 1e-5


def test_with_any_single_mask_left_in_place_the_sum_is_wrong() -> None:
    """Each of the masks that the server takes off, put back in turn."""
    agreed = terms()
    *_, words = uploads(5, agreed)
    done = run_round(words, agreed, drop={4: "upload"})
    oracle, party = plain_sum(done), done.party
    np.testing.assert_array_equal(done.total.words, oracle)

    def restored(index: int) -> bytes:
        shares = {holder: done.revealed[holder][index] for holder in done.revealed}
        return join_secret(shares, needed=party.needed(index))

    keys = [self_mask_key(restored(index), party.digest) for index in range(4)]
    keys += [mask_key(restored(4), party.adverts[peer].mask, party.digest) for peer in range(4)]
    for key in keys:
        wrong = oracle.copy()
        add_mask(wrong, key)
        assert (wrong != oracle).mean() > 0.99
    # Masks of two sites in the sum cancel: with one of them missing on one side they do not.
    pairs = list(itertools.permutations(range(4), 2))
    assert len(pairs) == 12
    for site, peer in pairs:
        key = mask_key(done.received[site].mask, party.adverts[peer].mask, party.digest)
        rows = [done.uploads[index].copy() for index in range(4)]
        add_mask(rows[site], key, subtract=site < peer)  # taken off again
        total = RunningSum(words=np.sum(rows, axis=0, dtype=np.uint32), sites={0, 1, 2, 3})
        secagg_server.unmask(total, party, done.sealed, done.revealed)
        assert (total.words != oracle).mean() > 0.99


def test_no_two_rounds_runs_or_purposes_share_a_mask() -> None:
    zeros = [np.zeros(1000, np.uint32)] * 3
    agreed = [terms(number, run=run) for run, number in (("a", 1), ("a", 2), ("b", 1), ("a", 1))]
    agreed += [terms(run="a", purpose=purpose) for purpose in ("evaluate", "final")]
    seen = [run_round(zeros, each).uploads for each in agreed]
    rows = [words for uploads in seen for words in uploads.values()]
    assert len({words.tobytes() for words in rows}) == 18
    for one, other in itertools.combinations(rows, 2):
        assert (one == other).mean() < 0.01
    # Even with one secret: the key depends on run, round and purpose by the digest.
    adverts = run_round(zeros, agreed[0]).party.adverts
    digests = {party_of(adverts, each).digest for each in agreed}
    secret, peer = bytes(16), bytes([9] + 31 * [0])
    assert len(digests) == len(agreed) - 1  # the first and the fourth have the same terms
    assert len({self_mask_key(secret, digest) for digest in digests}) == len(digests)
    assert len({mask_key(secret, peer, digest) for digest in digests}) == len(digests)


def test_a_wrong_share_gives_an_error_and_never_a_wrong_sum() -> None:
    agreed = terms()
    *_, words = uploads(4, agreed)
    for site, drop in ((0, {}), (3, {3: "upload"})):
        done = run_round(words, agreed, drop=drop)
        total = RunningSum(words=np.zeros(SIZE + 4, np.uint32))
        total.sites |= done.total.sites
        before = total.words.copy()
        done.revealed[1][site] = bytes(16)
        with pytest.raises(ProtocolError, match="wrong share"):
            secagg_server.unmask(total, done.party, done.sealed, done.revealed)
        np.testing.assert_array_equal(total.words, before)


def test_all_keys_and_shares_cost_less_than_a_twentieth_of_a_million_floats() -> None:
    """Per site and round, both ways, with the masked words: at most 1.05 times fp32."""
    for count in (3, 10, 50):
        agreed = terms()
        *_, words = uploads(count, agreed)
        done = run_round(words, agreed)
        beside = (done.bytes_up + done.bytes_down) / count - words[0].nbytes
        assert beside < 0.05 * 4_000_000


def test_secrets_are_small_and_gone_after_unmasking() -> None:
    agreed = terms()
    *_, words = uploads(20, agreed)
    done = run_round(words, agreed, drop={5: "unmask"})
    kept = {index: state.to_json() for index, state in done.states.items()}
    assert json.loads(kept[0]) == {"run": "run-1", "round": 1, "stage": "done"}
    # One that was never asked for its shares still has those, but none of its own secrets.
    waiting = json.loads(kept[5])
    assert waiting["stage"] == "masked" and not {"mask", "self_mask", "channel"} & set(waiting)
    assert max(len(text) for text in kept.values()) < 20_000
