"""The training loop: sample, train, sync weights. Everything else lies behind its calls.

    python -m nanoslime.train [RECIPE.yaml] [flags]
        trains on one machine: alone, with --num-gpus N through Ray, or under torchrun
    python -m nanoslime.train --mock --num-rollout 5
        is the smallest run: a tiny model on the CPU, in a minute
    python -m nanoslime.train --resume DIR [flags]
        goes on with a run of this machine
    python -m nanoslime.train --run DIR --attempt N
        drives a submitted run; its node agent starts it so

The loop is the same in all of them.
"""

import logging
import sys
import threading
import time
from contextlib import ExitStack

from transformers.utils.logging import disable_progress_bar

from nanoslime.failures import summary
from nanoslime.orchestration.launch import Launch, parse, serve_rank_0, serves_rank_0
from nanoslime.orchestration.report import Clock, report_failure, watch, write_summary
from nanoslime.orchestration.session import Session
from nanoslime.processes.logs import logged_to
from nanoslime.processes.temp import private_tmpdir
from nanoslime.rollout.producer import StopAsked
from nanoslime.run_dir import DONE, FAILED, STOPPED
from nanoslime.tracking import Tracker, make_tracker
from nanoslime.types import RunError

logger = logging.getLogger(__name__)


def train(session: Session, tracker: Tracker, clock: Clock, start: int) -> int:
    """Trains from rollout `start` on; returns DONE, or STOPPED after a commit."""
    try:
        return _train(session, tracker, clock, start)
    except StopAsked as reason:
        # What was being sampled goes into the checkpoint, and on in the next attempt.
        clock("checkpoint")
        session.checkpoints.commit(clock.step, None)
        logger.warning("stopped after %d rollouts: %s", clock.step, reason)
        return STOPPED


def _train(session: Session, tracker: Tracker, clock: Clock, start: int) -> int:
    config = session.config
    trainer = session.trainer
    rollout = session.rollout
    checkpoints = session.checkpoints
    num_rollout = config.rollout.num_rollout
    session.weights.sync(start)
    rollout.set_version(start)
    is_evaluated = start > 0 and not config.eval.due(start - 1, num_rollout)
    if not is_evaluated and not rollout.is_evaluated(start - 1):
        clock("evaluate")
        rollout.evaluate(start - 1)
    for step in range(start, num_rollout):
        begin = time.monotonic()
        clock("generate")
        groups = rollout.generate(step)
        clock("train")
        metrics = rollout.metrics | trainer.train(groups, step)
        due = checkpoints.due(step, clock.in_phase_s)
        if due or session.attempt.must_stop():
            clock("checkpoint")
            checkpoints.save(step + 1)  # while the trainer is awake; `commit` comes below
        clock("weight_sync")
        metrics |= session.weights.sync(step + 1) | session.engines.metrics()
        metrics["time/step_s"] = time.monotonic() - begin
        rollout.set_version(step + 1)
        clock.step = step + 1
        evaluated: dict[str, float] | None = {}
        if config.eval.due(step, num_rollout):
            clock("evaluate")
            evaluated = rollout.evaluate(step)
        metrics |= evaluated or {}
        tracker.log(step, metrics)
        stop = session.attempt.must_stop()
        if due or stop:
            clock("checkpoint")
            checkpoints.commit(step + 1, metrics.get("eval/reward_mean"))
        if stop and (step + 1 < num_rollout or evaluated is None):
            logger.warning("stopped after %d rollouts: %s", step + 1, stop)
            return STOPPED
    if config.checkpoint.export_hf:
        clock("export")
        trainer.export_hf(session.attempt.run.hf(num_rollout))
    clock("end")
    return DONE


def run(launch: Launch) -> int:
    """Opens the session, trains and sums up.

    A failure of any kind is one line, in the log and in the run's status.
    """
    started = time.monotonic()
    run_dir = launch.attempt.run
    clock = Clock(run_dir)
    if launch.log is not None:
        threading.Thread(target=watch, args=(launch.attempt, clock), daemon=True).start()
    with logged_to(launch.log):
        try:
            with launch.open(clock) as session:
                start = session.checkpoints.resume()
                launch.accept()
                clock.step = start
                with make_tracker(session.config, run_dir, start) as tracker:
                    code = train(session, tracker, clock, start)
                if code == DONE:
                    write_summary(session, clock, time.monotonic() - started)
            clock("done" if code == DONE else "stopped")
        except BaseException as e:  # torch's CheckpointException is no Exception
            report_failure(launch.attempt, clock, e)
            return FAILED
    return code


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    disable_progress_bar()  # transformers shows one for each of many small reads
    with ExitStack() as resources:
        try:
            resources.enter_context(private_tmpdir())
            if serves_rank_0():
                return serve_rank_0(argv)
            launch = parse(argv)
        except (RunError, ValueError, OSError) as e:
            logger.error("%s", e)
            return FAILED
        except Exception as e:
            logger.exception("the run could not be started")  # there is no log yet
            logger.error("%s", summary(e))
            return FAILED
        return run(launch)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
