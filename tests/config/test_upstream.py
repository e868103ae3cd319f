"""The committed option names are those of the installed packages."""

import json
import re
import subprocess
import sys

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from nanoslime.config import upstream
from nanoslime.config.load import load
from nanoslime.models.shape import ModelShape
from nanoslime.training.megatron import model
from nanoslime.types import RunError
from tests.models.hf import save_model
from tools import option_names

MEGATRON = upstream.SET_BY_NANOSLIME["megatron"]


@pytest.mark.parametrize("which", option_names.SOURCES)
def test_list_is_that_of_the_installed_package(which):
    way_out = "run `python -m tools.option_names`"
    assert upstream.known(which) == option_names.installed(which), way_out


@pytest.mark.parametrize(("which", "names"), upstream.SET_BY_NANOSLIME.items())
def test_names_that_we_set_exist_upstream(which, names):
    assert set(names) <= set(upstream.known(which)["names"])


def test_a_known_option_passes_and_an_unknown_one_is_refused():
    upstream.check("sglang", "rollout.sglang", {"mem_fraction_static": 0.8})
    with pytest.raises(RunError, match="mem_fraction_statik: .* did you mean mem_fraction_static"):
        upstream.check("sglang", "rollout.sglang", {"mem_fraction_statik": 0.8})


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("calculate_per_token_loss", "algorithm.*"),
        ("variable_seq_lengths", "nothing: packed sequences"),
        ("moe_router_topk", "model.hf_checkpoint (its config.json)"),
        ("moe_aux_loss_coeff", "algorithm.*"),
        ("pipeline_dtype", "model.dtype"),
        ("gtp_weight_remat_size", "training.tp_size"),
        ("use_mup", "model.hf_checkpoint"),
    ],
)
def test_what_the_maths_rests_on_is_refused_with_what_to_set_instead(name, instead):
    said = f"training.megatron.{name} is set by nanoslime; use {instead}"
    with pytest.raises(RunError, match=re.escape(said)):
        upstream.check("megatron", "training.megatron", {name: 1})


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("weight_version", "nothing: each weight sync counts it"),
        ("enable_return_routed_experts", "training.routing_replay: R3"),
        ("dp_size", "rollout.engines_per_node"),
        ("pp_size", "rollout.engine_tp_size"),
        ("nnodes", "rollout.engine_tp_size: an engine lies on one node"),
        ("node_rank", "rollout.engine_tp_size: an engine lies on one node"),
        ("dist_init_addr", "rollout.engine_tp_size: an engine lies on one node"),
        ("base_gpu_id", "rollout.engines_per_node: the plan gives"),
        ("gpu_id_step", "rollout.engines_per_node: the plan gives"),
        ("nccl_port", "nothing: each engine chooses a free one"),
        ("ssl_certfile", "nothing: an engine serves text"),
        ("delete_ckpt_after_loading", "nothing: the trainer and other engines read"),
        ("quantization", "model.dtype: engines hold the weights as the trainer has them"),
        ("load_format", "model.dtype: engines hold the weights as the trainer has them"),
        ("kv_cache_dtype", "model.dtype: with a cache of another one"),
    ],
)
def test_an_option_with_which_no_engine_of_a_run_would_start_or_agree_is_refused(name, instead):
    said = f"rollout.sglang.{name} is set by nanoslime; use {instead}"
    with pytest.raises(RunError, match=re.escape(said)):
        load(None, None, ["--rollout.sglang", json.dumps({name: 1})])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"megatron": {"recompute_modules": ["mlp"], "tp_com": 1}}, "training.megatron.tp_com"),
        ({"megatron_ddp": {"overlap_grad_reduc": True}}, "did you mean overlap_grad_reduce"),
        ({"megatron_ddp": {"exp_avg_dtype": "bfloat16"}}, "training.megatron_ddp.exp_avg_dtype"),
        ({"megatron_ddp": {"average_in_collective": True}}, "gradients are sums over ranks"),
        ({"megatron_ddp": {"use_megatron_fsdp": True}}, "use --backend fsdp"),
        (
            {"megatron_ddp": {"use_distributed_optimizer": True}},
            "use training.distributed_optimizer",
        ),
        ({"megatron_optimizer": {"lr": 1e-3}}, "set by nanoslime; use training.lr"),
        ({"megatron_optimizer": {"bf16": True}}, "use model.dtype"),
        ({"megatron_optimizer": {"clip_grad": 1.0}}, "use training.clip_grad"),
        ({"megatron_optimizer": {"optimizer": "muon"}}, "the optimizer is AdamW"),
        ({"megatron_optimizer": {"bucket_size": 1}}, "training.megatron_optimizer.bucket_size"),
        (
            {"megatron_ddp": {"overlap_param_gather": True}},
            "the weights of a step are gathered at its end",
        ),
    ],
)
def test_each_group_of_megatrons_options_is_checked_by_its_own_names(options, says, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"training": options}))
    with pytest.raises(RunError, match=re.escape(says)):
        load(recipe, None, ["--backend", "megatron"])


def test_overlap_of_reductions_is_taken_as_written(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    overlap = {"overlap_grad_reduce": True, "bucket_size": 1000}
    recipe.write_text(json.dumps({"training": {"megatron_ddp": overlap}}))
    config = load(recipe, None, [])
    assert config.training.backend == "megatron"
    assert config.training.megatron_ddp == overlap


# Options that nanoslime sets, and a user may set otherwise.
FREE = {
    "hidden_dropout",
    "attention_dropout",
    "moe_token_dispatcher_type",
    "deallocate_pipeline_outputs",
    "batch_p2p_sync",
    "moe_grouped_gemm",
    "moe_router_dtype",
    "moe_router_load_balancing_type",
    "apply_rope_fusion",
    "bias_activation_fusion",
    "moe_permute_fusion",
    "gradient_accumulation_fusion",
}


@pytest.mark.megatron
def test_whatever_nanoslime_sets_is_refused_or_listed_as_free(tmp_path, monkeypatch):
    given = {}

    def keep(**values):
        given.update(values)
        return TransformerConfig(**values)

    monkeypatch.setattr(model, "TransformerConfig", keep)
    monkeypatch.setattr(model, "fields", lambda kind: [])
    shape = ModelShape.read(save_model(tmp_path, "glm4_moe"))
    model.model_config(shape, torch.float32, torch.device("cpu"))
    assert set(given) - set(MEGATRON) == FREE


@pytest.mark.megatron
def test_names_read_from_the_sources_are_those_of_the_imported_class():
    code = (
        "import dataclasses, json\n"
        "from megatron.core.transformer import TransformerConfig as T\n"
        "print(json.dumps([f.name for f in dataclasses.fields(T) if f.name[0] != '_']))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert sorted(json.loads(shown.stdout.splitlines()[-1])) == upstream.known("megatron")["names"]
