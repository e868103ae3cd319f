"""Environments by name: a file here and a line in ENVIRONMENTS.

An environment is `async run(prompt, policy) -> list[Sample]`: one rollout of a prompt. It asks
the policy for tokens as often as it likes, and gives back the sequences that are trained on, one
or several. A rollout has one reward, which all of its samples share: where the environment sets
none, the last sample is scored for all, so the sample whose text holds the answer comes last; what
it sets has to be the same in all samples that it sets it in.

What it raises is the error of its rollout, and so is taking longer than
rollout.environment_timeout_s, in which waiting for tokens does not count. All environments of a
rollout worker run in one event loop: what blocks belongs into a thread (`asyncio.to_thread`).
A loop that is blocked for 100 s ends the run, with the line at which it is.

An environment is a function, whose further parameters are its options; or a class that is
made of the options and called so, with an `async close()` where it has something to end.

The table lies in `config`, where the login node can check the name of an environment.
"""

import inspect
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from nanoslime.config.rollout import ENVIRONMENTS as ENVIRONMENTS
from nanoslime.failures import summary
from nanoslime.plugins import resolve
from nanoslime.rollout.policy import Policy
from nanoslime.types import Prompt, RunError, Sample

Environment = Callable[[Prompt, Policy], Awaitable[list[Sample]]]

_SETTING = "rollout.environment"


def make(name: str, options: Mapping[str, Any]) -> Environment:
    """The environment that rollout.environment names, with rollout.environment_options.

    Raises RunError where it cannot be loaded, or takes other options.
    """
    found = resolve(name, ENVIRONMENTS, _SETTING)
    if not callable(found):
        raise RunError(f"{_SETTING}={name!r} is {found!r}; name a function or a class")
    positional = () if inspect.isclass(found) else ("prompt", "policy")
    try:
        signature = inspect.signature(found)
        signature.bind(*positional, **options)
    except (TypeError, ValueError) as error:
        takes = ", ".join(list(signature.parameters)[len(positional) :]) or "none"
        raise RunError(
            f"rollout.environment_options do not fit {_SETTING}={name!r} ({error}); "
            f"its options: {takes}"
        ) from error
    if not inspect.isclass(found):
        return partial(found, **options)
    try:
        environment: Environment = found(**options)
    except Exception as error:
        raise RunError(f"{_SETTING}={name!r} cannot be made: {summary(error)}") from error
    return environment


async def close(environment: Environment) -> None:
    """Ends what the environment has started."""
    end = getattr(environment, "close", None)
    if end is not None:
        await end()
