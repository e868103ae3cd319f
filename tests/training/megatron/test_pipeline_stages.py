"""The stages that a plan shows are the ones that megatron-core builds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from nanoslime.config import TrainingConfig
from nanoslime.models.parallel_sizes import PipelineSizes
from nanoslime.training.megatron.parallel import megatron_stages
from tests.plans import TINY

pytestmark = pytest.mark.megatron


@pytest.mark.parametrize(
    ("num_layers", "sizes"),
    [
        (8, PipelineSizes(4)),
        (16, PipelineSizes(4, 2)),
        (3, PipelineSizes(2, first=1)),
        (3, PipelineSizes(2, last=1)),
        (94, PipelineSizes(4, first=23, last=23)),
        (61, PipelineSizes(4, last=16)),
        (61, PipelineSizes(16, first=3, last=2)),
        (22, PipelineSizes(4, 2, first=4)),
        (28, PipelineSizes(4, 2, first=6, last=6)),
    ],
    ids=str,
)
def test_sizes_that_megatron_takes_give_megatrons_stages(num_layers, sizes):
    settings = TransformerConfig(
        num_layers=num_layers,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_model_parallel_size=sizes.pp_size,
        virtual_pipeline_model_parallel_size=sizes.vpp_size if sizes.vpp_size > 1 else None,
        num_layers_in_first_pipeline_stage=sizes.first,
        num_layers_in_last_pipeline_stage=sizes.last,
        pipeline_dtype=float,
    )
    stages = sizes.stages(num_layers)
    for number, stage in enumerate(stages):
        chunk, rank = divmod(number, sizes.pp_size)
        vp_stage = chunk if sizes.vpp_size > 1 else None
        offset = get_transformer_layer_offset(settings, vp_stage, rank)
        assert offset == stage.start
        assert get_num_layers_to_build(settings, vp_stage, rank) == len(stage)


def test_megatron_is_told_the_stages_one_by_one():
    training = TrainingConfig(pp_size=2, vpp_size=2)
    stages = megatron_stages(replace(TINY, num_layers=5), training)
    assert stages == [
        ["embedding", "decoder"],
        ["decoder"],
        ["decoder", "decoder"],
        ["decoder", "loss"],
    ]
    assert megatron_stages(TINY, TrainingConfig()) is None
