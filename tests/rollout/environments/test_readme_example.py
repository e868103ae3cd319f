"""The environment that the README shows, as it stands there."""

import asyncio
import re
from pathlib import Path

import numpy as np
import pytest

from nanoslime.rollout import environments
from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.rollout.policy import Policy, ServedModel
from nanoslime.rollout.tasks import GroupTask, Sampling
from nanoslime.types import Prompt, Sample, Status
from tests.rollout.calling_model import save_calling_model, tokenizer_of
from tests.rollout.interrupting import InterruptingRouter

README = Path(__file__).parents[3] / "README.md"
WRONG = "That is wrong. Try again."


def test_the_readmes_environment_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = README.read_text().split("\n## Environments\n")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    assert code.count("\n") <= 20
    (tmp_path / "readmes_environment.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    path = save_calling_model(tmp_path / "model")
    engine = EmbeddedEngine(str(path), "float32", "cpu", seed=0)
    served = ServedModel(InterruptingRouter(engine), tokenizer_of(path), 512)
    # The model never writes the answer, and ends a response after "12=" soon.
    prompt = Prompt(4, np.array(served.tokenizer.encode("12="), np.int32), "12=", "3")
    sampling = Sampling(n_samples_per_prompt=8, max_new_tokens=60, temperature=1.0)
    task = GroupTask(7, prompt, sampling, 3, "none")

    async def run() -> list[list[Sample]]:
        environment = environments.make("readmes_environment:run", {"max_tries": 2})
        policies = [Policy(task, index, served) for index in range(8)]
        return await asyncio.gather(*(environment(prompt, policy) for policy in policies))

    num_asked = 0
    for [sample] in asyncio.run(run()):
        observed = served.tokenizer.decode(sample.token_ids[3:][~sample.loss_mask[3:]])
        assert observed in ("", WRONG)
        assert len(sample.policy_versions) == 1 + bool(observed)
        assert observed or sample.status is Status.TRUNCATED
        num_asked += bool(observed)
    assert num_asked > 4
