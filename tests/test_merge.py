"""Profiles are added up and subtracted."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_pprof.errors import IncompatibleProfiles
from asgi_pprof.merge import by_stack, subtract, sum_samples
from asgi_pprof.profile import Function, Location, Profile, Sample, ValueType

pytestmark = pytest.mark.once

SPACE = ValueType("inuse_space", "bytes")
OBJECTS = ValueType("inuse_objects", "count")

# There are few locations and labels, so that some samples have the same.
places = st.builds(
    Location,
    st.sampled_from([Function("build_cart", "a.py", 1), Function("build_page", "a.py", 9)]),
    st.integers(1, 3),
)
stacks = st.lists(places, min_size=1, max_size=3).map(tuple)
label_sets = st.sampled_from([(), (("tenant", "acme"),), (("bytes", 16),), (("bytes", 32),)])
values = st.tuples(*[st.integers(-(2**40), 2**40)] * 2)
sample_lists = st.lists(st.builds(Sample, stacks, values, label_sets), max_size=30)


def snapshot(samples, time_ns=1_000):
    """Return a profile as from a collector: with one sample for each stack and label set."""
    return Profile((OBJECTS, SPACE), sum_samples(samples), SPACE, 1, time_ns)


def totals(samples):
    """Return the sums by stack and labels that are not all 0."""
    sums = [Counter(), Counter()]
    for sample in samples:
        for counter, value in zip(sums, sample.values, strict=True):
            counter[sample.stack, sample.labels] += value
    return {key: (sums[0][key], sums[1][key]) for key in sums[0] if sums[0][key] or sums[1][key]}


@given(sample_lists)
def test_totals_survive_a_sum(samples):
    """Nothing is lost or counted twice, and each stack with its labels is there once."""
    summed = sum_samples(samples)
    assert totals(summed) == totals(samples)
    keys = [(sample.stack, sample.labels) for sample in summed]
    assert len(keys) == len(set(keys))


@given(sample_lists, st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_change_totals(samples, random):
    """A shuffled list of samples has the same sums."""
    shuffled = list(samples)
    random.shuffle(shuffled)
    assert set(sum_samples(shuffled)) == set(sum_samples(samples))


@given(sample_lists)
def test_without_labels_there_is_one_sample_for_each_stack(samples):
    """The sums by stack stay, and those that are all 0 are left out."""
    found = by_stack(snapshot(samples)).samples
    assert len({sample.stack for sample in found}) == len(found)
    assert all(any(sample.values) for sample in found)
    assert totals(found) == totals(replace(sample, labels=()) for sample in samples)


@given(sample_lists, sample_lists)
def test_summing_in_steps_gives_the_same_samples(left, right):
    """A sum of sums is the sum of everything."""
    assert sum_samples([*sum_samples(left), *sum_samples(right)]) == sum_samples(left + right)


def test_samples_keep_the_order_of_their_first_occurrence():
    """Equal inputs give equal outputs, in a readable order."""
    leaf = Location(Function("build_cart", "a.py", 1), 2)
    root = Location(Function("main", "a.py", 1), 9)
    samples = [Sample((root,), (1, 1)), Sample((leaf,), (1, 1)), Sample((root,), (2, 5))]
    assert sum_samples(samples) == (Sample((root,), (3, 6)), Sample((leaf,), (1, 1)))


@given(sample_lists)
def test_a_profile_minus_itself_is_empty(samples):
    """Nothing happened between a snapshot and the same snapshot."""
    profile = snapshot(samples)
    assert subtract(profile, profile).samples == ()


@given(sample_lists, sample_lists)
def test_a_difference_added_to_the_start_gives_the_end(before, after):
    """before + (after - before) == after, stack by stack."""
    delta = subtract(snapshot(after, 2_000), snapshot(before))
    assert totals([*delta.samples, *before]) == totals(after)
    assert all(any(sample.values) for sample in delta.samples)


def test_values_that_shrank_are_negative():
    """Negative values are kept, even if other values of the sample did not change."""
    stack = (Location(Function("drop_cart", "a.py", 1), 2),)
    delta = subtract(
        snapshot([Sample(stack, (3, 64))], 2_000), snapshot([Sample(stack, (3, 4_096))])
    )
    assert delta.samples == (Sample(stack, (0, -4_032)),)


def test_stacks_that_are_gone_are_negative():
    """A stack that is only in the earlier snapshot has negative values."""
    stack = (Location(Function("drop_cart", "a.py", 1), 2),)
    delta = subtract(snapshot([], 2_000), snapshot([Sample(stack, (3, 4_096))]))
    assert delta.samples == (Sample(stack, (-3, -4_096)),)


def test_samples_with_other_labels_do_not_pair_up():
    """Samples are the same only if their labels are."""
    stack = (Location(Function("build_cart", "a.py", 1), 2),)
    delta = subtract(
        snapshot([Sample(stack, (1, 16), (("tenant", "acme"),))], 2_000),
        snapshot([Sample(stack, (1, 16), (("tenant", "globex"),))]),
    )
    assert {(sample.labels, sample.values) for sample in delta.samples} == {
        ((("tenant", "acme"),), (1, 16)),
        ((("tenant", "globex"),), (-1, -16)),
    }


def test_a_difference_ends_at_the_later_snapshot_and_covers_the_time_between():
    """Time, comments and the default sample type are those of the later snapshot."""
    before = replace(snapshot([], 1_000), comments=("tracing began",))
    after = replace(
        snapshot([], 4_500), default_sample_type="inuse_space", comments=("2 frames cut",)
    )
    delta = subtract(after, before)
    assert (delta.time_ns, delta.duration_ns) == (4_500, 3_500)
    assert delta.default_sample_type == "inuse_space"
    assert delta.comments == ("2 frames cut",)
    assert (delta.sample_types, delta.period_type, delta.period) == ((OBJECTS, SPACE), SPACE, 1)


@pytest.mark.parametrize("after_ns", [1_000, 999])
def test_a_difference_has_a_duration_even_if_the_clock_did_not_move(after_ns):
    """Readers take a profile of duration 0 for a snapshot, and clocks can be set back."""
    assert subtract(snapshot([], after_ns), snapshot([], 1_000)).duration_ns == 1


@pytest.mark.parametrize(
    "change",
    [
        {"sample_types": (SPACE, OBJECTS)},
        {"sample_types": (OBJECTS,)},
        {"sample_types": (OBJECTS, ValueType("inuse_space", "kilobytes"))},
        {"period_type": OBJECTS},
    ],
)
def test_profiles_that_count_different_things_are_not_subtracted(change):
    """The error is Go's, word for word."""
    with pytest.raises(IncompatibleProfiles) as caught:
        subtract(snapshot([]), replace(snapshot([]), **change))
    assert str(caught.value) == "failed to compute delta"
