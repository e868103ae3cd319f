"""The embedded engine against plain transformers: logprobs, batching, filters, weights."""

import asyncio
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from nanoslime.rollout.engines.embedded_model import EmbeddedEngine, pick
from nanoslime.types import Engine, GenerateRequest, Generation, RunError, Status
from tests.models.hf import save_model
from tests.serving import VOCAB_SIZE, reference_logprobs, save_tiny_model


@pytest.fixture
def engine(tiny_model: Path) -> EmbeddedEngine:
    return make_engine(tiny_model)


def make_engine(path: Path, seed: int = 0) -> EmbeddedEngine:
    return EmbeddedEngine(model_path=str(path), dtype="float32", device="cpu", seed=seed)


def request(token_ids: list[int], **changes: object) -> GenerateRequest:
    return GenerateRequest(
        **({"token_ids": token_ids, "n": 2, "max_new_tokens": 8, "temperature": 1.0} | changes)
    )


def generate(engine: EmbeddedEngine, *requests: GenerateRequest) -> list[list[Generation]]:
    async def together() -> list[list[Generation]]:
        return await asyncio.gather(*(engine.generate(r) for r in requests))

    return asyncio.run(together())


def test_is_an_engine(engine: EmbeddedEngine) -> None:
    assert isinstance(engine, Engine)
    assert engine.policy_version() == 0


def test_released_memory_comes_back_with_the_weights_that_are_sent(
    tiny_model: Path, other_model: Path
) -> None:
    engine = make_engine(other_model)
    for version in (3, 4):
        engine.release_memory()
        assert sum(p.untyped_storage().nbytes() for p in engine._model.parameters()) == 0
        engine.resume_memory("weights")
        engine.update_weights_from_disk(str(tiny_model), version)
        engine.resume_memory("cache")
    [[answer]] = generate(engine, request([7, 8], n=1))
    reference = reference_logprobs(tiny_model, [7, 8], answer.token_ids, 1.0)
    assert (reference - torch.tensor(answer.logprobs)).abs().max() < 1e-5


def test_logprobs_of_a_padded_batch_are_those_of_each_sequence_alone(
    engine: EmbeddedEngine, tiny_model: Path
) -> None:
    """Prompts of different lengths, limits and temperatures in one batch, against one sequence at a time."""
    requests = [
        request([7]),
        request([5, 6, 7, 8, 9, 10, 11], temperature=0.7, max_new_tokens=12),
        request([250, 3, 99], temperature=1.5, max_new_tokens=3),
    ]
    for asked, answers in zip(requests, generate(engine, *requests), strict=True):
        assert len(answers) == asked.n
        for answer in answers:
            assert (len(answer.token_ids), answer.status) == (
                asked.max_new_tokens,
                Status.TRUNCATED,
            )
            reference = reference_logprobs(
                tiny_model, list(asked.token_ids), answer.token_ids, asked.temperature
            )
            assert (reference - torch.tensor(answer.logprobs)).abs().max() < 1e-5


def test_tokens_follow_the_distribution(engine: EmbeddedEngine, tiny_model: Path) -> None:
    """4,000 first tokens at temperature 0.7 against the model's probabilities, by the largest difference in
    mass."""
    (answers,) = generate(engine, request([5, 6, 7], n=4000, max_new_tokens=1, temperature=0.7))
    counts = torch.bincount(torch.tensor([a.token_ids[0] for a in answers]), minlength=VOCAB_SIZE)
    tokens = list(range(VOCAB_SIZE))
    probs = torch.stack(
        [reference_logprobs(tiny_model, [5, 6, 7], [t], 0.7)[0] for t in tokens[:40]]
    ).exp()
    assert (counts[:40] / 4000 - probs).abs().max() < 0.03


def test_pick_inverts_the_cumulative_distribution() -> None:
    probs = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).repeat(5, 1)
    randoms = torch.tensor([0.0, 0.49, 0.5, 0.76, 1.0 - 1e-12], dtype=torch.float64)
    assert pick(probs, randoms).tolist() == [0, 0, 2, 3, 3]


def test_top_k_and_top_p_limit_the_tokens_but_not_the_logprobs(
    engine: EmbeddedEngine, tiny_model: Path
) -> None:
    top = [
        t
        for (a,) in [generate(engine, request([5], n=300, max_new_tokens=1, top_k=3))]
        for g in a
        for t in g.token_ids
    ]
    nucleus = request([5], n=300, max_new_tokens=1, top_p=1e-6)
    (best,) = {g.token_ids[0] for g in generate(engine, nucleus)[0]}
    assert len(set(top)) == 3 and best in top
    (answer, *_) = generate(engine, nucleus)[0]
    assert (
        abs(answer.logprobs[0] - float(reference_logprobs(tiny_model, [5], [best], 1.0)[0])) < 1e-5
    )
    assert (
        answer.logprobs[0] < -0.1
    )  # of the whole distribution, in which the best token is not certain


def test_a_seed_decides_the_samples_whatever_else_is_in_the_batch(
    engine: EmbeddedEngine, tiny_model: Path
) -> None:
    seeded = request([5, 6], seed=11)
    (alone,) = generate(engine, seeded)
    _, crowded = generate(
        make_engine(tiny_model, seed=5), request([1] * 9, max_new_tokens=20), seeded
    )
    assert [g.token_ids for g in alone] == [g.token_ids for g in crowded]
    assert alone[0].token_ids != alone[1].token_ids
    assert generate(engine, request([5, 6], seed=12))[0][0].token_ids != alone[0].token_ids


def test_engines_of_one_seed_agree_call_by_call(tiny_model: Path) -> None:
    one, other = make_engine(tiny_model, seed=3), make_engine(tiny_model, seed=3)
    first = [g.token_ids for g in generate(one, request([5]))[0]]
    assert first == [g.token_ids for g in generate(other, request([5]))[0]]
    assert first != [g.token_ids for g in generate(one, request([5]))[0]]


def test_stop_tokens_end_a_sequence_and_are_part_of_it(engine: EmbeddedEngine) -> None:
    ((answer,),) = generate(engine, request([5], n=1, seed=1, max_new_tokens=8))
    stop = answer.token_ids[3]
    ((stopped,),) = generate(
        engine, request([5], n=1, seed=1, max_new_tokens=8, stop_token_ids=(stop,))
    )
    end = answer.token_ids.index(stop) + 1
    assert (stopped.token_ids, stopped.status) == (answer.token_ids[:end], Status.COMPLETED)
    assert len(stopped.logprobs) == end


def test_bad_requests(engine: EmbeddedEngine) -> None:
    with pytest.raises(RunError, match=f"embedded: token id {VOCAB_SIZE} at position 1"):
        generate(engine, request([5, VOCAB_SIZE]))
    full, fine = generate(engine, request([5] * 4096), request([5]))
    assert [g.status for g in full] == [Status.ERROR] * 2 and "4096 tokens" in str(full[0].error)
    assert len(fine[0].token_ids) == 8


def test_requests_wait_while_paused(engine: EmbeddedEngine) -> None:
    async def paused() -> list[Generation]:
        engine.pause()
        waiting = asyncio.create_task(engine.generate(request([5])))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        engine.resume()
        return await asyncio.wait_for(waiting, 20)

    assert len(asyncio.run(paused())) == 2


def test_weights_from_disk_and_in_process(
    engine: EmbeddedEngine, tiny_model: Path, other_model: Path
) -> None:
    for version, path in enumerate([other_model, tiny_model], start=1):
        if version == 1:
            engine.update_weights_from_disk(str(path), version)
        else:
            engine.load_weights(load_file(path / "model.safetensors").items(), version)
        assert engine.policy_version() == version
        ((answer, _),) = generate(engine, request([5, 6]))
        assert answer.versions == [(0, version)]
        reference = reference_logprobs(path, [5, 6], answer.token_ids, 1.0)
        assert (reference - torch.tensor(answer.logprobs)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        (
            "unknown",
            {"model.nrom.weight": torch.ones(64)},
            "unknown tensor 'model.nrom.weight'; the engine's checkpoint has .*'lm_head.weight'",
        ),
        ("missing", {"model.norm.weight": None}, "1 of 25 tensors missing: model.norm.weight"),
        (
            "shape",
            {"model.norm.weight": torch.ones(3)},
            r"shape \[3\], the engine's checkpoint \[64\]",
        ),
    ],
)
def test_refused_weights_change_nothing(
    engine: EmbeddedEngine,
    tiny_model: Path,
    other_model: Path,
    tmp_path: Path,
    name: str,
    tensors: dict,
    message: str,
) -> None:
    changed = {
        k: v
        for k, v in (load_file(other_model / "model.safetensors") | tensors).items()
        if v is not None
    }
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(RunError, match=f"embedded refused version 4: .*{message}"):
        engine.update_weights_from_disk(str(tmp_path), 4)
    assert engine.policy_version() == 0
    ((answer, _),) = generate(engine, request([5, 6]))
    reference = reference_logprobs(tiny_model, [5, 6], answer.token_ids, 1.0)
    assert (reference - torch.tensor(answer.logprobs)).abs().max() < 1e-5


def test_a_repeated_name_is_refused(engine: EmbeddedEngine, tiny_model: Path) -> None:
    tensors = list(load_file(tiny_model / "model.safetensors").items())
    with pytest.raises(RunError, match="came twice"):
        engine.load_weights([*tensors, tensors[0]], 1)


def test_tied_embeddings(tmp_path: Path) -> None:
    a, b = (
        save_tiny_model(tmp_path / "a", 0, tie=True),
        save_tiny_model(tmp_path / "b", 1, tie=True),
    )
    engine = make_engine(a)
    engine.update_weights_from_disk(str(b), 1)
    ((answer, _),) = generate(engine, request([5, 6]))
    reference = reference_logprobs(b, [5, 6], answer.token_ids, 1.0)
    assert (reference - torch.tensor(answer.logprobs)).abs().max() < 1e-5


def test_mixture_of_experts_takes_checkpoint_names(tmp_path: Path) -> None:
    """transformers 5 fuses experts in memory; the weights come under the names of the checkpoint all the
    same."""
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = Qwen3MoeConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=32,
            moe_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
            initializer_range=0.2,
            eos_token_id=None,
            bos_token_id=None,
        )
        Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / name)
    engine = make_engine(tmp_path / "a")
    engine.load_weights(load_file(tmp_path / "b" / "model.safetensors").items(), 1)
    ((answer, _),) = generate(engine, request([5, 6]))
    reference = reference_logprobs(tmp_path / "b", [5, 6], answer.token_ids, 1.0)
    assert (reference - torch.tensor(answer.logprobs)).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3"])
def test_reports_the_experts_of_every_token_but_the_last(family: str, tmp_path: Path) -> None:
    """In a padded batch, with rows that end at different steps, as transformers runs each sequence alone."""
    more = {"num_key_value_heads": 4} if family == "deepseek_v3" else {}
    path = save_model(tmp_path, family, **more)
    stop = tuple(range(0, 250, 9))
    requests = [
        request([7, 8], stop_token_ids=stop),
        request([5, 6, 7, 8, 9, 10, 11], max_new_tokens=12),
    ]
    for asked, answers in zip(requests, generate(make_engine(path), *requests), strict=True):
        for answer in answers:
            experts = routed_experts(path, [*asked.token_ids, *answer.token_ids[:-1]])
            assert answer.routed_experts is not None and answer.routed_experts.dtype == "uint8"
            assert torch.equal(torch.from_numpy(answer.routed_experts).long(), experts)


def routed_experts(path: Path, token_ids: list[int]) -> torch.Tensor:
    """[T, layers with experts, topk] by plain transformers, from what its routers hand to the experts."""
    model, chosen = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), []
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
    with torch.no_grad():
        model(torch.tensor([token_ids]))
    return torch.stack(chosen, 1)


def test_a_dense_model_has_no_experts_to_report(engine: EmbeddedEngine) -> None:
    assert generate(engine, request([7]))[0][0].routed_experts is None
