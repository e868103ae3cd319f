"""A checkpoint holds everything that the next step of a run depends on. It is written
aside, hashed by the ranks that wrote it, and committed by one rename.

checkpoints/step_<k>/
    trainer/       weights, optimizer, RNG and schedule, as the backend writes them
    rollout/       groups that were being sampled, of each rollout worker, if there were any
    driver.json    rollouts done, policy version, data cursor, numbers of the groups, best
                   evaluation
    manifest.json  the checksum of every file, written last
"""

import errno
import json
import logging
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanoslime.config import RunConfig
from nanoslime.failures import summary
from nanoslime.orchestration.groups import TrainGroup
from nanoslime.orchestration.rollout_manager import Replay, RolloutManager
from nanoslime.processes.phases import DRIVER, IDLE, own_report
from nanoslime.run_dir import Attempt, RunDir
from nanoslime.storage.commit import checkpoints, commit, partial_dir, partial_path, retain
from nanoslime.storage.manifest import DamagedError, verify
from nanoslime.types import RunError
from nanoslime.weight_sync.session import SyncSession

logger = logging.getLogger(__name__)

_PROBE_BYTES = 1 << 20
# A quota does not say how much room there is: what was to be written is written again.
_RETRY_S = 20.0


@dataclass(slots=True)
class Checkpoints:
    """`step_<k>` is the state after k rollouts.

    It is made in two parts: `save` comes while the trainer is awake, `commit` after the
    weight sync and the evaluation of the step. A trainer and engines that share devices
    then change turns no more often than without checkpoints.
    """

    config: RunConfig
    attempt: Attempt
    trainer: TrainGroup
    rollout: RolloutManager | Replay
    weights: SyncSession
    _best: tuple[float, int] | None = field(default=None, init=False)  # reward, rollouts
    # The rollouts of the state that `save` has put aside, and the hashes of its files.
    _saved: int | None = field(default=None, init=False)
    _hashes: dict[str, str] = field(default_factory=dict, init=False)
    clock: Callable[[], float] = time.monotonic
    _last_commit_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._last_commit_s = self.clock()

    @property
    def run(self) -> RunDir:
        return self.attempt.run

    def due(self, step: int, train_s: float = 0.0) -> bool:
        """Whether a checkpoint is committed after this step, which has trained for `train_s`.

        A job that is told to stop while it trains for longer than it may drain loses that step:
        then every step before it is committed.
        """
        if train_s > self.config.cluster.drain_s and self.attempt.key:
            return True
        since_commit_s = self.clock() - self._last_commit_s
        return self.config.checkpoint.due(step, self.config.rollout.num_rollout, since_commit_s)

    def resume(self) -> int:
        """Loads the newest checkpoint that verifies; returns its number of rollouts.

        Returns 0 where there is no checkpoint yet. Raises RunError where there are
        checkpoints, but none that verifies.
        """
        rollouts = self._newest_good()
        if rollouts is None:
            return 0
        path = self.run.checkpoint(rollouts)
        driver = json.loads((path / "driver.json").read_text())
        self.trainer.load(path / "trainer")
        self.rollout.load(path / "rollout", driver["rollout"])
        self._best = self._comparable_best(driver)
        logger.info("resumed after %d rollouts from %s", rollouts, path)
        return rollouts

    def _comparable_best(self, driver: dict[str, Any]) -> tuple[float, int] | None:
        """The best checkpoint of an earlier attempt; none where it was evaluated on others."""
        if not driver["best"]:
            return None
        before = driver["rollout"].get("held_out")
        if before is not None and before != self.rollout.held_out:
            logger.warning(
                "the evaluation prompts are others than before: rewards of evaluations cannot be "
                "compared across this start, and the best checkpoint is chosen anew"
            )
            return None
        reward, rollouts = driver["best"]
        return reward, rollouts

    def save(self, rollouts: int) -> None:
        """Puts the trainer's state aside; `commit` makes it a checkpoint. RunError where a newer
        attempt has begun: it would write to the same place.
        """
        self.attempt.require_newest()
        final = self.run.checkpoint(rollouts)
        wait_for_room(self.attempt, final, lambda: self._save_trainer(partial_dir(final), rollouts))

    def _save_trainer(self, partial: Path, rollouts: int) -> None:
        (partial / "trainer").mkdir()
        hashes = self.trainer.save(partial / "trainer")
        self._hashes = {f"trainer/{name}": digest for name, digest in hashes.items()}
        self._saved = rollouts

    def commit(self, rollouts: int, reward: float | None) -> None:
        """Commits the state after `rollouts` rollouts, then removes older checkpoints.

        Saves first where `save` was not called: a trainer and engines that share
        devices then change turns. `reward` comes from the evaluation at this step, if
        there was one; it decides which checkpoint is the best. Raises EnginesFailed where
        the engines turn out to have other weights than the trainer, and RunError where a newer
        attempt has begun.
        """
        self.attempt.require_newest()
        final = self.run.checkpoint(rollouts)
        wait_for_room(self.attempt, final, lambda: self._commit(final, rollouts, reward))
        self._retain()

    def _commit(self, final: Path, rollouts: int, reward: float | None) -> None:
        is_saved = self._saved == rollouts and partial_path(final).exists()
        partial = partial_path(final) if is_saved else partial_dir(final)
        self.weights.look_at_probe()
        # What is being sampled comes first: a stop ends it, and frees shared devices.
        rollout = self.rollout.save(partial / "rollout")
        if not is_saved:
            self._save_trainer(partial, rollouts)
        if reward is not None and (self._best is None or reward > self._best[0]):
            self._best = (reward, rollouts)
        state = {
            "rollouts": rollouts,
            "policy_version": self.weights.version,
            "rollout": rollout,
            "best": self._best,
        }
        (partial / "driver.json").write_text(json.dumps(state))
        commit(partial, final, self._hashes, self.attempt.require_newest)
        self._saved = None
        self._last_commit_s = self.clock()

    def _retain(self) -> None:
        keep = self.config.checkpoint
        best = self._best[1] if keep.keep_best and self._best else None
        retain(
            self.run.checkpoints, keep_last=keep.keep_last, keep_every=keep.keep_every, best=best
        )

    def _newest_good(self) -> int | None:
        """Returns the rollouts of the newest checkpoint that verifies; None without any."""
        refused = []
        for step, path in reversed(checkpoints(self.run.checkpoints)):
            try:
                verify(path)
            except DamagedError as e:
                refused.append(f"checkpoint {path.name} is refused: {e}")
                continue
            for reason in refused:
                logger.warning("%s; %s is used instead", reason, path.name)
            return step
        if refused:
            raise RunError(
                f"{'; '.join(refused)}; no other is left: put one back, "
                f"or empty {self.run.checkpoints} to begin anew"
            )
        return None


def wait_for_room(attempt: Attempt, final: Path, write: Callable[[], None]) -> None:
    """Does `write`, which makes the checkpoint `final`, again and again until it does not fail for
    a full disk. What it has written of it is removed meanwhile, since others need room too.

    Raises its error where that is another one, and where the run is told to stop.
    """
    run = attempt.run
    while True:
        try:
            return write()
        except Exception as error:
            if attempt.must_stop() or has_room(final.parent):
                raise
            cause = summary(error)
        shutil.rmtree(partial_path(final), ignore_errors=True)
        num_committed = run.num_committed()
        logger.error(
            f"the run waits for room to save, and keeps its commit after {num_committed} rollouts "
            f"({cause}); of {run.path} delete what is not needed, such as older ones in "
            "checkpoints/, rollouts/ or hf/"
        )
        own_report().enter(DRIVER, IDLE)
        with suppress(OSError):  # others may have filled the room
            run.write_status("wait for room", num_committed)
        time.sleep(_RETRY_S)
        own_report().enter(DRIVER, "checkpoint")


def has_room(directory: Path) -> bool:
    """Whether a megabyte more can be written there."""
    probe = directory / ".room"
    try:
        probe.write_bytes(bytes(_PROBE_BYTES))
    except OSError as error:
        return error.errno not in (errno.ENOSPC, errno.EDQUOT)
    finally:
        probe.unlink(missing_ok=True)
    return True
