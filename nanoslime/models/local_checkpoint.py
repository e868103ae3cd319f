"""The checkpoint of a run: found, fetched and checked before anything starts. Torch-free."""

from dataclasses import replace

from nanoslime.config import RunConfig
from nanoslime.models.checkpoint_files import read_tensors
from nanoslime.models.context import check_context
from nanoslime.models.shape import ModelShape
from nanoslime.models.tiny import tiny_qwen3_config
from nanoslime.storage.checkpoint_code import check_code, check_tokenizer
from nanoslime.storage.hub import find_checkpoint
from nanoslime.storage.tokenizer_files import check_vocabulary


def with_local_checkpoint(config: RunConfig, *, download: bool) -> tuple[RunConfig, ModelShape]:
    """The configuration with a local directory as model.hf_checkpoint, and the model's shape.

    download: a hub id is fetched whole; otherwise only its config.json, and nothing else of
    it is checked. Raises RunError for a checkpoint that does not exist, that cannot be
    trained, or whose files are not those of its model.
    """
    if config.rehearsal.enabled:
        shape = ModelShape.from_config(tiny_qwen3_config())
        check_context(config, shape)
        return config, shape
    model = config.model
    found = find_checkpoint(model.hf_checkpoint, model.revision, download=download)
    shape = ModelShape.read(found.directory)
    check_context(config, shape)
    if found.is_whole:
        read_tensors(found.directory, shape)
        if model.trust_remote_code:
            check_code(found.directory)
        if not config.rollout.load_rollouts:
            check_tokenizer(found.directory, trust_remote_code=model.trust_remote_code)
            check_vocabulary(found.directory, shape.vocab_size)
    model = replace(model, hf_checkpoint=str(found.directory), revision=found.revision)
    return replace(config, model=model), shape
