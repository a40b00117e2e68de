"""Manifolds: what the tables hold, that they are the same everywhere, and that the search tables mean "nearest"."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

import ghost_kernels as kernels
import manifolds
from manifolds import ENTRIES, FIXED_BITS, INDEX_MAX, Manifold, ManifoldError

SHA256 = {
    "prime-harmonic": "7ab73472bc4853198b3337ff8bcd6d8db572d8c8509878f37b326255bbc01b50",
    "linear": "e5966e03a81b2f43fef58648d8ecfa270f0fda665c6b230fd1a923fa9e3884cd",
    "compact": "eee1d6f20bcd2774b9c9192a58136c84ffa5fab0ab5e1fb7c15a76a5929bfea9",
}
COMPACT = manifolds.build("compact")
EVERY_WORD = torch.arange(-32768, 32768).to(torch.int16)


@pytest.fixture(scope="module", params=manifolds.NAMES)
def table(request: pytest.FixtureRequest) -> Manifold:
    return manifolds.build(request.param)


def half_of(table: Manifold) -> np.ndarray:
    """The values of levels 0 to the largest in float64."""
    return table.values.numpy()[INDEX_MAX + 1 :: 1 << table.vote_bits].astype(np.float64)


def nearest(half: np.ndarray, magnitudes: np.ndarray) -> np.ndarray:
    """Index of the nearest entry by comparing with every entry; of two at the same distance the smaller."""
    found = [
        np.abs(half[None, :] - part[:, None]).argmin(1)
        for part in np.array_split(magnitudes, len(magnitudes) // 64 + 1)
    ]
    return np.concatenate(found)


def looked_up(table: Manifold, magnitudes: np.ndarray) -> np.ndarray:
    """What the thresholds say, by the definition in ``Manifold``."""
    return np.searchsorted(table.thresholds.numpy(), magnitudes.astype(np.float32), side="right") - 1


def primes_by_division(limit: int) -> np.ndarray:
    numbers = np.arange(2, limit + 1)
    for divisor in range(2, math.isqrt(limit) + 1):
        numbers = numbers[(numbers % divisor != 0) | (numbers == divisor)]
    return numbers


def test_digests_are_pinned(table: Manifold) -> None:
    assert set(SHA256) == set(manifolds.NAMES)
    assert table.sha256 == SHA256[table.name]
    assert manifolds.fingerprint(table.values) == SHA256[table.name]


def test_a_second_build_from_scratch_is_the_same(table: Manifold) -> None:
    levels, vote_bits = manifolds._BUILDERS[table.name]
    again = manifolds.from_values(
        table.name, manifolds._spread(levels().astype(np.float32), vote_bits), table.vote_bits
    )
    assert again is not table
    assert torch.equal(again.values, table.values) and again.sha256 == table.sha256


def test_one_flipped_bit_changes_the_fingerprint(table: Manifold) -> None:
    changed = table.values.clone()
    changed.view(torch.int32)[40_000] ^= 1
    assert manifolds.fingerprint(changed) != table.sha256


def test_order_and_symmetry(table: Manifold) -> None:
    values = table.values.numpy()
    assert values.dtype == np.float32 and values.shape == (ENTRIES,)
    half = half_of(table)
    assert len(half) == table.top + 1 == (INDEX_MAX + 1 >> table.vote_bits)
    assert (np.diff(half) > 0).all() and half[0] == 0.0 and half[-1] == 1.0
    levels = table.levels(EVERY_WORD).numpy().astype(int)
    written = np.abs(levels) <= table.top
    zeros = values[levels == 0]
    assert not zeros.any() and not np.signbit(zeros).any()
    assert (values[written] == np.sign(levels[written]) * half[np.abs(levels[written])]).all()
    beyond = np.float32(2 * half[-1] - half[-2])
    assert (values[~written] == np.sign(levels[~written]) * beyond).all(), "past the last level lies one more gap"


@pytest.mark.parametrize("name", ["prime-harmonic", "linear"])
def test_a_table_without_votes_is_strictly_increasing(name: str) -> None:
    values = manifolds.build(name).values.numpy()
    assert (values[1:] > values[:-1]).all()
    assert (values[32769:] == -values[32767:0:-1]).all()
    assert values[-1] == 1.0 and values[1] == -1.0
    assert values[0] == np.float32(-2.0 + np.float64(values[-2])), "the unpaired entry lies one last gap below -1"


def test_compact_levels_are_the_formula() -> None:
    """Level i is t (7 + 9 t^2) / 16 at t = i / 511, rounded once to float32, in exact fractions."""
    exact = [Fraction(i, 511) * (7 + 9 * Fraction(i, 511) ** 2) / 16 for i in range(512)]
    assert half_of(COMPACT).tolist() == [float(np.float32(float(level))) for level in exact]
    for level, value in zip(exact, half_of(COMPACT).tolist(), strict=True):
        # To the nearest float32, judged by the exact fraction: the double in between did not round twice.
        for direction in (-np.inf, np.inf):
            neighbour = np.nextafter(np.float32(value), np.float32(direction))
            assert abs(Fraction(value) - level) <= abs(Fraction(float(neighbour)) - level)
    assert (np.diff(half_of(COMPACT), 2) > 0).all(), "finer in the bulk than at a row's edge"


def test_compact_words_are_level_and_votes() -> None:
    """For every word: 64 times its level plus its votes, with votes from -32 to 31."""
    levels, votes = COMPACT.levels(EVERY_WORD), COMPACT.votes(EVERY_WORD)
    assert levels.dtype == torch.int16 and votes.dtype == torch.int8
    assert torch.equal(64 * levels.int() + votes.int(), EVERY_WORD.int())
    assert sorted(set(votes.tolist())) == list(range(-32, 32))
    for level in (-511, -1, 0, 1, 300, 511):
        for vote in (-31, -1, 0, 1, 31):
            word = torch.tensor([[64 * level + vote]], dtype=torch.int16)
            assert (int(COMPACT.levels(word)), int(COMPACT.votes(word))) == (level, vote)


@pytest.mark.parametrize("name", ["prime-harmonic", "linear"])
def test_words_without_votes_are_levels(name: str) -> None:
    table = manifolds.build(name)
    assert table.vote_bits == 0
    assert torch.equal(table.levels(EVERY_WORD), EVERY_WORD)
    votes = table.votes(EVERY_WORD)
    assert votes.dtype == torch.int8 and votes.shape == EVERY_WORD.shape and not votes.any()


def test_unused_words_are_counted(table: Manifold) -> None:
    """Word by word: the lowest one, levels beyond the last, votes that no step leaves behind."""
    allowed = set(range(-INDEX_MAX, INDEX_MAX + 1))
    if table.vote_bits:
        allowed = {64 * level + vote for level in range(-511, 512) for vote in range(-31, 32)}
    good = torch.tensor(sorted(allowed), dtype=torch.int16)
    assert table.unused(good) == 0
    bad = torch.tensor([word for word in EVERY_WORD.tolist() if word not in allowed], dtype=torch.int16)
    counts = {int(word): table.unused(word.view(1, 1)) for word in bad}
    assert {word: count for word, count in counts.items() if count != 1} == {}
    assert table.unused(torch.cat([good[:7], bad, good[7:]]).view(2, -1)) == len(bad) > 0


def test_a_words_value_does_not_depend_on_its_votes() -> None:
    """Dequantizing reads the level alone, in every word that a step may write or hold in its middle."""
    generator = np.random.default_rng(12)
    levels = torch.from_numpy(generator.integers(-511, 512, (40, 63)))
    scale = torch.from_numpy(generator.uniform(0.1, 9, 40).astype(np.float32))
    words = (64 * levels).to(torch.int16)
    expected = kernels.dequantize(words, scale, COMPACT, torch.full((40, 63), math.nan))
    half = half_of(COMPACT)
    exact = np.sign(levels.numpy()) * half[np.abs(levels.numpy())] * scale.double().numpy()[:, None]
    np.testing.assert_allclose(expected.numpy(), exact, rtol=2.0**-23, atol=0)
    for backend in kernels.BACKENDS:
        for vote in (-32, -31, -1, 1, 17, 31):
            out = torch.full((40, 63), math.nan)
            assert torch.equal(kernels.dequantize(words + vote, scale, COMPACT, out, backend), expected)


def test_the_import_limit_is_lower_for_compact() -> None:
    """Ten bits keep Gaussian rows at about 55 dB; the limits lie below what each table keeps."""
    weights = torch.from_numpy(np.random.default_rng(13).standard_normal((32, 2048)).astype(np.float32))
    for name in manifolds.NAMES:
        table = manifolds.build(name)
        report = kernels.snap(weights, kernels.row_scales(weights, 1.25), table)[1]
        assert table.snr_limit_db < report.snr_db
        if name == "compact":
            assert table.snr_limit_db == 50.0 and abs(report.snr_db - 54.9) < 0.5
        else:
            assert table.snr_limit_db == 75.0


def test_every_member_of_the_three_families_is_an_entry() -> None:
    values = manifolds.build("prime-harmonic").values.numpy()
    primes = primes_by_division(60_000)
    assert len(primes) == 6057
    families = {
        "nucleus": [1 / float(p) ** 1.05 for p in primes],
        "harmonics": [1 / (1.2 * i) for i in range(2, 10_000)],
        "tail": [i / 8192 for i in range(1, 8193)],
    }
    for name, members in families.items():
        missing = ~np.isin(np.array(members).astype(np.float32), values)
        assert not missing.any(), f"{name}: {int(missing.sum())} missing"
    seeds = np.sort(manifolds.prime_harmonic_seeds())
    assert np.allclose(seeds, np.sort(np.concatenate(list(families.values()))), rtol=1e-14, atol=0)


def test_no_seed_lies_near_a_rounding_boundary() -> None:
    """A libm that is off by hundreds of units in the last place would still build the same table."""
    seeds = manifolds.prime_harmonic_seeds()
    rounded = seeds.astype(np.float32)
    closest = np.full(len(seeds), np.inf)
    for direction in (0.0, np.inf):
        neighbour = np.nextafter(rounded, np.float32(direction)).astype(np.float64)
        boundary = (rounded.astype(np.float64) + neighbour) / 2
        closest = np.minimum(closest, np.abs(seeds - boundary) / seeds)
    assert closest.min() > 1e-13
    exact = np.array([np.longdouble(p) ** -np.longdouble(1.05) for p in primes_by_division(60_000)])
    assert (exact.astype(np.float32) == rounded[: len(exact)]).all()


def test_gaps_are_what_the_docstring_says() -> None:
    half = half_of(manifolds.build("prime-harmonic"))
    gaps = np.diff(half)
    assert gaps.max() == 1 / 16384
    assert 500 < (1 / 16384) / np.median(gaps[half[:-1] < 1e-3]) < 5000
    linear = half_of(manifolds.build("linear"))
    assert np.abs(linear * INDEX_MAX - np.arange(INDEX_MAX + 1)).max() < INDEX_MAX * 2.0**-24


def test_fixed_point_is_exact(table: Manifold) -> None:
    half = half_of(table)
    assert table.fixed.dtype == torch.int64 and tuple(table.fixed.shape) == (table.top + 1,)
    scaled = [math.ldexp(v, FIXED_BITS) for v in half.tolist()]
    assert all(s == int(s) for s in scaled)
    assert table.fixed.tolist() == [int(s) for s in scaled]
    assert table.fixed[-1] == 1 << FIXED_BITS


def test_thresholds_find_the_nearest_entry(table: Manifold) -> None:
    generator = np.random.default_rng(11)
    magnitudes = np.concatenate(
        [
            generator.random(800),
            10.0 ** generator.uniform(-5, 0, 400),
            10.0 ** generator.uniform(-12, -4, 100),
            1 - 10.0 ** generator.uniform(-7, -1, 100),
            [0.0, 1.0, 1e-45, 1e-38],
        ]
    ).astype(np.float32)
    expected = nearest(half_of(table), magnitudes.astype(np.float64))
    assert len(np.unique(expected)) > (350 if table.vote_bits else 900)
    np.testing.assert_array_equal(looked_up(table, magnitudes), expected)


def test_midpoints_go_to_the_smaller_and_their_neighbours_to_their_own_side(table: Manifold) -> None:
    half = half_of(table)
    middle = (half[:-1] + half[1:]) / 2
    rounded = middle.astype(np.float32)
    lower = np.arange(table.top)
    exact = rounded.astype(np.float64) == middle
    assert exact.sum() > table.top // 32, "too few midpoints are float32 numbers for this test to mean anything"
    np.testing.assert_array_equal(looked_up(table, rounded[exact]), lower[exact])

    # The float32 numbers just below and just above each midpoint; entries may themselves be such neighbours.
    below = np.where(rounded.astype(np.float64) < middle, rounded, np.nextafter(rounded, np.float32(0)))
    above = np.where(rounded.astype(np.float64) > middle, rounded, np.nextafter(rounded, np.float32(2)))
    assert (below < middle).all() and (above > middle).all()
    np.testing.assert_array_equal(looked_up(table, below), lower)
    np.testing.assert_array_equal(looked_up(table, above), lower + 1)


def test_every_entry_is_its_own_nearest(table: Manifold) -> None:
    np.testing.assert_array_equal(looked_up(table, half_of(table)), np.arange(table.top + 1))


def test_ends_of_the_thresholds(table: Manifold) -> None:
    thresholds = table.thresholds.numpy()
    assert thresholds.dtype == np.float32 and thresholds.shape == (table.top + 2,)
    assert thresholds[0] == 0 and thresholds[-1] == np.inf
    assert (np.diff(thresholds[:-1]) > 0).all()


@pytest.mark.parametrize("which", ["thresholds", "fixed"])
def test_buckets_bracket_every_search(table: Manifold, which: str) -> None:
    """The entry of any x in bucket b lies between ``buckets[b]`` and ``buckets[b + 1]``, both inclusive."""
    if which == "thresholds":
        buckets, keys = table.threshold_buckets.numpy(), table.thresholds.numpy()[:-1].astype(np.float64)
    else:
        buckets, keys = table.fixed_buckets.numpy(), table.fixed.numpy() / 2.0**FIXED_BITS
    assert buckets.dtype == np.int32 and buckets.shape == (32770,)
    edges = np.arange(32770) / 32768.0
    assert (keys[buckets] <= edges).all()
    later = buckets < table.top
    assert (keys[buckets[later] + 1] > edges[later]).all()
    assert buckets[0] == 0 and (buckets[32768:] == table.top).all()


def _swapped(values: torch.Tensor) -> torch.Tensor:
    values[[40_000, 40_001]] = values[[40_001, 40_000]]
    values[[25_536, 25_535]] = values[[25_535, 25_536]]
    return values


def _with(at: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(values: torch.Tensor) -> torch.Tensor:
        values[at] = value
        return values

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_swapped, "not strictly increasing"),
        (
            lambda v: v[torch.cat([torch.arange(40_001), torch.tensor([40_000]), torch.arange(40_002, ENTRIES)])],
            "increasing",
        ),
        (_with(50_000, math.nan), "non-finite"),
        (_with(ENTRIES - 1, math.inf), "non-finite"),
        (_with(0, -math.inf), "non-finite"),
        (
            lambda v: v.clone().index_put_((torch.tensor(50_000),), torch.nextafter(v[50_000], v[50_001])),
            "antisymmetric",
        ),
        (lambda v: v - v[32769] / 4, "antisymmetric"),
        (lambda v: v * 0.5, "largest entry"),
        (lambda v: v.double(), "float64"),
        (lambda v: v.half(), "float16"),
        (lambda v: v[1:], "65535"),
        (lambda v: v.view(2, -1), "32768"),
        (lambda v: v * v.abs().pow(2), "fractional bits"),
    ],
)
def test_from_values_refuses(change: Callable[[torch.Tensor], torch.Tensor], words: str) -> None:
    broken = change(manifolds.build("linear").values.clone())
    with pytest.raises(ManifoldError, match=words):
        manifolds.from_values("broken", broken)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_with(32_768 + 640 + 5, 0.5), "repeat each of its levels for 6 bits"),
        (_with(32_768 + 640 - 32, 0.0), "repeat"),
        (_with(0, -3.0), "repeat"),
        (_with(ENTRIES - 1, 1.0), "repeat"),
        (lambda v: torch.roll(v, 1), "repeat"),
        (lambda v: torch.roll(v, 64), "repeat"),
        (lambda _: manifolds.build("linear").values, "repeat"),
        (lambda v: v * 0.5, "largest entry"),
        (_with(32_768 + 700, math.nan), "non-finite"),
        (lambda v: manifolds._spread(np.sort(half_of(COMPACT).round(2)), 6), "not strictly increasing"),
    ],
)
def test_from_values_refuses_words_with_broken_runs(change: Callable[[torch.Tensor], torch.Tensor], words: str) -> None:
    broken = change(COMPACT.values.clone())
    with pytest.raises(ManifoldError, match=words):
        manifolds.from_values("broken", broken, 6)


@pytest.mark.parametrize("vote_bits", [-1, 1, 5, 7, 16])
def test_from_values_refuses_other_vote_bits(vote_bits: int) -> None:
    with pytest.raises(ManifoldError, match=f"vote bits are {vote_bits}, expected 0 or 6"):
        manifolds.from_values("broken", COMPACT.values, vote_bits)


def test_compact_is_no_table_of_single_entries() -> None:
    with pytest.raises(ManifoldError, match="not strictly increasing"):
        manifolds.from_values("broken", COMPACT.values)


def test_from_values_refuses_gaps_that_a_move_could_not_multiply() -> None:
    """A 28-bit draw times the gap has to fit into 63 bits: gaps of just below 2^-7 are allowed, 2^-7 is not."""
    upper = 1 - np.arange(101) * (2.0**-7 - 2.0**-22)
    half = np.concatenate([np.arange(INDEX_MAX - 100) * 7 * 2.0**-20, upper[::-1]])
    for allowed in (True, False):
        half[-2] -= 0 if allowed else 2.0**-22
        values = torch.from_numpy(np.concatenate([[-2.0], -half[:0:-1], half]).astype(np.float32))
        if allowed:
            assert int(manifolds.from_values("coarse", values).fixed.diff().max()) == (1 << 33) - (1 << 18)
        else:
            with pytest.raises(ManifoldError, match=r"largest gap is 0\.0078125, expected below 0\.0078125"):
                manifolds.from_values("coarse", values)


def test_from_values_accepts_its_own_table_and_keeps_a_copy(table: Manifold) -> None:
    source = table.values.clone()
    again = manifolds.from_values("again", source, table.vote_bits)
    source.zero_()
    assert again.name == "again" and again.sha256 == table.sha256 and again.vote_bits == table.vote_bits
    for field in ("values", "fixed", "thresholds", "threshold_buckets", "fixed_buckets"):
        assert torch.equal(getattr(again, field), getattr(table, field)), field


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ManifoldError, match=r"'prime'.*prime-harmonic, linear, compact"):
        manifolds.build("prime")


def test_build_is_shared_and_immutable(table: Manifold) -> None:
    assert manifolds.build(table.name) is manifolds.build(table.name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.name = "other"  # type: ignore[misc]


def test_the_default_is_not_built_a_second_time() -> None:
    assert manifolds.build() is manifolds.build(manifolds.DEFAULT)


def test_to_moves_every_table(table: Manifold) -> None:
    assert table.to("cpu") is table
    moved = table.to("meta")
    assert (moved.name, moved.sha256, moved.vote_bits) == (table.name, table.sha256, table.vote_bits)
    for field in dataclasses.fields(Manifold):
        before = getattr(table, field.name)
        if isinstance(before, torch.Tensor):
            after = getattr(moved, field.name)
            assert after.device.type == "meta" and after.dtype == before.dtype and after.shape == before.shape
    assert moved.to("meta") is moved
