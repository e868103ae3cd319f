"""What a person is told of a run before it is submitted: text, made of values alone.

Deliberately not here: whether the run is accepted, and the memory's arithmetic.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from nanoslime.config import RunConfig
from nanoslime.config.deadlines import derive_deadlines
from nanoslime.config.evaluation import HELD_OUT
from nanoslime.engine_kind import engine_kind
from nanoslime.layout import Layout, slot_name, span
from nanoslime.models.parallel_sizes import PipelineSizes
from nanoslime.models.shape import ModelShape
from tools.fields import values
from tools.submit.choose import shortage
from tools.submit.memory_text import memory_lines

# A driver that generates on its CPU reads all weights once a token; about what it reads.
_CPU_BYTES_PER_S = 100e9
_WIDTH = 100
_MARGIN = " " * 10
CHOSEN = "chosen"
"""The source of a field that neither a file nor a flag has set, but the planner."""


def describe(
    config: RunConfig,
    shape: ModelShape,
    layout: Layout,
    prompts: Sequence[str] = (),
    sources: Mapping[str, str] | None = None,
) -> str:
    """The plan as a person reads it, from the line that says whether it fits to who has set what.

    prompts: what is known of each source of prompts. sources: by field, who has set it.
    """
    below = {
        "nodes": [_nodes_text(config, layout)],
        "idle": _idle_lines(config, layout),
        "model": [f"{shape.model_type}, {shape.num_parameters:,} parameters, {config.model.dtype}"],
        "trainers": [_trainers_text(config, shape, layout)],
        "engines": [_engines_text(config, shape, layout)],
        "step": _step_lines(config, shape, layout),
        "memory": memory_lines(config, shape, layout.parallel),
        "prompts": prompts,
        "evals": [_evals_text(config)],
        "saves": [_saves_text(config)],
        "deadlines": _deadline_lines(config, shape, layout),
        "set by": _set_lines(config, sources or {}),
    }
    short = shortage(config, shape, layout)
    lines = [f"may not fit: {short}" if short else "fits", "", layout.table(), ""]
    for heading, texts in below.items():
        for i, text in enumerate(texts):
            lines.append(f"{heading if i == 0 else '':10}{text}")
    return "\n".join(lines)


def _nodes_text(config: RunConfig, layout: Layout) -> str:
    text = f"{layout.num_nodes} x {layout.slots_per_node} {slot_name(config)}s"
    if layout.device == "cpu":
        return text
    gpus = layout.num_nodes * layout.slots_per_node
    hours = config.cluster.time_limit_min / 60
    return f"{text}; at most {gpus * hours:g} GPU hours ({gpus} GPUs for {hours:g} h)"


def _idle_lines(config: RunConfig, layout: Layout) -> list[str]:
    """Which slots nothing runs on."""
    taken = {(trainer.node, trainer.slot) for trainer in layout.trainers}
    taken |= {(engine.node, slot) for engine in layout.engines for slot in engine.slots}
    found = []
    for node in range(layout.num_nodes):
        idle = [slot for slot in range(layout.slots_per_node) if (node, slot) not in taken]
        if idle:
            found.append(f"node {node}: {slot_name(config)} {span(idle)}")
    return [f"nothing runs on {'; '.join(found)}"] if found else []


def _trainers_text(config: RunConfig, shape: ModelShape, layout: Layout) -> str:
    if not layout.trainers:
        return "none"
    backend = "Megatron" if layout.backend == "megatron" else "FSDP2"
    if layout.backend == "fsdp" and layout.num_nodes == 1:
        backend += " (what one node gets without --backend)"
    dims = layout.parallel
    stages = f"PP={dims.pp}"
    if config.training.vpp_size > 1:
        stages += f" (interleaved by {config.training.vpp_size})"
    layers = PipelineSizes.of(config.training).layers_of_ranks(shape.num_layers)
    if len(set(layers)) > 1:
        stages += f" with {' + '.join(map(str, layers))} layers"
    text = f"{backend}: TP={dims.tp} CP={dims.cp} {stages} DP={dims.dp}"
    if shape.moe:
        text += f" EP={dims.ep} ETP={config.training.etp_size}"
    return text


def _engines_text(config: RunConfig, shape: ModelShape, layout: Layout) -> str:
    if config.rollout.load_rollouts:
        return "none: recorded rollouts"
    engine = engine_kind(config.rollout).title
    if not layout.engines:
        text = f"{engine}, in the driver"
        if layout.device == "cuda":
            speed = _CPU_BYTES_PER_S / (2 * shape.num_parameters)
            text += f": on its CPU, about {speed:.0f} tokens a second, while the GPUs wait"
        return text
    size = f"{config.rollout.engine_tp_size} {slot_name(config)}(s)"
    text = f"{engine}: {len(layout.engines)} of {size} each"
    if config.cluster.colocate:
        text += ", the trainers' own; one of the two sleeps"
    elif config.rollout.max_staleness:
        text += f", up to {config.rollout.max_staleness} rollout(s) ahead of training"
    return text


def _step_lines(config: RunConfig, shape: ModelShape, layout: Layout) -> list[str]:
    """What one of the run's rollouts holds at most."""
    rollout = config.rollout
    samples = rollout.rollout_batch_size * rollout.n_samples_per_prompt
    prompt, response = config.data.max_prompt_tokens, rollout.max_new_tokens
    longest = min(prompt + response, shape.context_length)
    lines = [
        f"{rollout.rollout_batch_size} prompts x {rollout.n_samples_per_prompt} samples = "
        f"{samples:,} samples, at most {samples * longest:,} tokens; {rollout.num_rollout} rollouts"
    ]
    if layout.trainers:
        steps = config.training.num_steps_per_rollout
        of_step = samples // steps
        lines.append(
            f"{steps} optimizer step(s) a rollout, of {of_step:,} samples: "
            f"{of_step / layout.parallel.dp:,.4g} for each of the DP={layout.parallel.dp} ranks"
        )
    lines.append(
        f"longest sequence {longest:,} tokens ({prompt:,} of the prompt + {response:,} of the "
        f"response), and the model reads {shape.context_length:,}"
    )
    return lines


def _evals_text(config: RunConfig) -> str:
    titles = [one.title for one in config.eval_sets] or [HELD_OUT]
    if not (config.eval_sets or config.rehearsal.enabled):
        return (
            "none, as neither data.eval_prompts nor eval.sets is set; "
            "eval.interval and checkpoint.keep_best have no effect"
        )
    interval = config.eval.interval
    between = f", after every {interval} rollouts" if interval else ""
    return f"{', '.join(titles)}: before the first rollout{between} and after the last"


def _saves_text(config: RunConfig) -> str:
    keep = config.checkpoint
    times = []
    if keep.interval:
        times.append(f"every {keep.interval} rollouts")
    if keep.every_min:
        times.append(f"every {keep.every_min:g} min")
    kept = [f"the last {keep.keep_last}"]
    if keep.keep_every:
        kept.append(f"each {keep.keep_every}th")
    if keep.keep_best:
        kept.append("the best")
    return f"{', '.join([*times, 'at the end and at a stop'])}; kept: {', '.join(kept)}"


def _deadline_lines(config: RunConfig, shape: ModelShape, layout: Layout) -> list[str]:
    if not layout.trainers:
        return []
    deadlines = derive_deadlines(config, shape.num_parameters, len(layout.trainers))
    train = f"{deadlines.train.seconds:.0f} s for the training on a rollout"
    return [f"{train}, {deadlines.save.seconds:.0f} s for a checkpoint"]


def _set_lines(config: RunConfig, sources: Mapping[str, str]) -> list[str]:
    """The fields that differ from the defaults, by who has set them."""
    by_source: dict[str, list[str]] = {}
    for one in values(config):
        source = sources.get(one.name, "")
        if source and one.value != one.default:
            kind = "flags" if source.startswith("flag ") else source
            by_source.setdefault(kind, []).append(f"{one.name}={_short(one.value)}")
    lines = []
    for source, settings in by_source.items():
        text = f"{PurePath(source).name}: {', '.join(settings)}"
        lines += textwrap.wrap(text, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return lines


def _short(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _WIDTH // 2 else f"{text[: _WIDTH // 2]}..."
