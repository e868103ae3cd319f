"""How layers are cut into pipeline stages, equally many or not."""

import pytest

from nanoslime.models.parallel_sizes import PipelineSizes


@pytest.mark.parametrize(
    ("num_layers", "sizes", "expected"),
    [
        (36, PipelineSizes(4), [9, 9, 9, 9]),
        (94, PipelineSizes(4), [23, 24, 24, 23]),  # Qwen3-235B
        (94, PipelineSizes(8), [11, 12, 12, 12, 12, 12, 12, 11]),
        (61, PipelineSizes(4), [15, 16, 15, 15]),  # DeepSeek-V3
        (61, PipelineSizes(8), [7, 8, 8, 8, 8, 8, 7, 7]),
        (46, PipelineSizes(4), [11, 12, 12, 11]),  # GLM-4.5-Air
        (46, PipelineSizes(8), [5, 6, 6, 6, 6, 6, 6, 5]),
        (3, PipelineSizes(2), [2, 1]),
        (3, PipelineSizes(2, first=1), [1, 2]),
        (31, PipelineSizes(4), [8, 8, 8, 7]),
        (94, PipelineSizes(4, first=20), [20, 25, 25, 24]),
        (94, PipelineSizes(4, last=20), [24, 25, 25, 20]),
        (94, PipelineSizes(4, first=20, last=22), [20, 26, 26, 22]),
        (61, PipelineSizes(16, first=3, last=2), [3] + [4] * 14 + [2]),
        (10, PipelineSizes(2, first=7, last=3), [7, 3]),
        (5, PipelineSizes(1), [5]),
    ],
    ids=str,
)
def test_layers_of_ranks_by_hand(num_layers, sizes, expected):
    assert sizes.layers_of_ranks(num_layers) == expected
    assert [len(stage) for stage in sizes.stages(num_layers)] == expected


def test_chunks_of_ranks_are_interleaved_by_hand():
    def lengths(num_layers, sizes):
        return [len(stage) for stage in sizes.stages(num_layers)]

    assert lengths(8, PipelineSizes(2, 2)) == [2, 2, 2, 2]
    # Ranks of 3 and 2 layers, in two chunks each; the first stage has the embedding too.
    assert lengths(5, PipelineSizes(2, 2)) == [1, 1, 2, 1]
    # Ranks of 2 and 5 layers; the last stage has the output layer too.
    assert lengths(7, PipelineSizes(2, 2, first=2)) == [1, 3, 1, 2]
    # Ranks of 23, 24, 24 and 23 layers.
    assert lengths(94, PipelineSizes(4, 2)) == [11, 12, 12, 12, 12, 12, 12, 11]


def test_stages_are_all_layers_in_order_and_ranks_differ_by_one_at_most():
    for pp_size in range(1, 9):
        for vpp_size in range(1, 4 if pp_size > 1 else 2):
            for num_layers in range(pp_size * vpp_size, 64):
                sizes = PipelineSizes(pp_size, vpp_size)
                stages = sizes.stages(num_layers)
                assert [layer for stage in stages for layer in stage] == list(range(num_layers))
                by_rank = sizes.layers_of_ranks(num_layers)
                assert [sum(map(len, stages[r::pp_size])) for r in range(pp_size)] == by_rank
                assert max(by_rank) - min(by_rank) <= 1
                assert min(map(len, stages)) >= 1
