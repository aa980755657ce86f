import numpy as np
import pytest

from almost_jax.sampling.reading import Batch, Sizes, batches

SIZES = Sizes(few=8, usual=32, all=256, parts=1, most_tokens=2048)


def padded(found: list[Batch]) -> int:
    return sum(batch.rows * batch.width for batch in found)


def test_every_prompt_is_read_once_and_fits() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 7, 8, 9, 40, 300):
        lengths = rng.integers(1, 500, count).tolist()
        found = batches(lengths, SIZES)
        assert sorted(place for batch in found for place in batch.members) == list(range(count))
        for batch in found:
            assert len(batch.members) <= batch.rows
            assert batch.rows * batch.width <= SIZES.most_tokens
            assert max(lengths[place] for place in batch.members) <= batch.width


@pytest.mark.parametrize(
    ("count", "rows"),
    [(1, [8]), (8, [8]), (9, [8, 8]), (17, [32]), (32, [32]), (33, [32, 32]), (100, [32] * 4)],
)
def test_rows_by_the_number_of_prompts(count: int, rows: list[int]) -> None:
    assert [batch.rows for batch in batches([16] * count, SIZES)] == rows


def test_all_slots_at_once_where_a_program_may_read_so_much() -> None:
    sizes = Sizes(few=8, usual=32, all=256, parts=1, most_tokens=4096)
    assert [batch.rows for batch in batches([16] * 200, sizes)] == [256]
    assert [batch.rows for batch in batches([17] * 200, sizes)] == [32] * 7


def test_few_prompts_of_several_widths_are_read_together() -> None:
    # 8 prompts in four widths would be four programs of 8 rows.
    lengths = [20, 40, 70, 90, 33, 25, 64, 80]
    found = batches(lengths, SIZES)
    assert [(batch.width, batch.rows, batch.members) for batch in found] == [(128, 8, tuple(range(8)))]


def test_many_prompts_of_several_widths_are_read_apart() -> None:
    found = batches([16] * 32 + [200] * 8, SIZES)
    assert [(batch.width, batch.rows) for batch in found] == [(16, 32), (224, 8)]


def test_joining_never_costs_more_than_reading_every_width_apart() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        lengths = rng.integers(1, 250, int(rng.integers(1, 60))).tolist()
        together = batches(lengths, SIZES)
        widths = {width for width in (batch.width for one in lengths for batch in batches([one], SIZES))}
        apart = [
            batch
            for width in widths
            for batch in batches([one for one in lengths if batches([one], SIZES)[0].width == width], SIZES)
        ]
        assert padded(together) + 128 * len(together) <= padded(apart) + 128 * len(apart)


def test_a_prompt_longer_than_a_program_should_read_is_read_alone() -> None:
    assert [(batch.width, batch.rows) for batch in batches([5000] * 2, SIZES)] == [(5120, 1)] * 2
    assert batches([500] * 7, SIZES)[0].rows == 4


def test_rows_split_evenly_over_devices() -> None:
    sizes = Sizes(few=8, usual=32, all=256, parts=8, most_tokens=2048)
    for length in (10, 100, 500, 5000):
        assert all(batch.rows % 8 == 0 for batch in batches([length] * 40, sizes))


def test_no_prompts_no_batches() -> None:
    assert batches([], SIZES) == []
