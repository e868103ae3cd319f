"""A stand-in for the trainer, as the node agent starts it, which ends as its first argument says.

until-stop   exit 75 when told to stop; the second attempt exits 0 at once
until-told   exit 0 when the attempt has a file `finish`; the second attempt exits 0 at once
fail         print a line and exit 3
die          be killed
deaf         take no notice of anything, and leave a daemon behind
steps        go through phases of a tenth of a second, as the trainer reports them
hang         as steps, and hang in the fifth phase
long-step    be in a training that has taken 100 s each time, and take no notice of anything
"""

import argparse
import os
import signal
import subprocess
import sys
import time

from nanoslime.processes.phases import DRIVER, own_report
from nanoslime.run_dir import DONE, STOPPED
from tests.jobs.driver_place import parse_place


def go_through_phases(count: int) -> None:
    for _ in range(count):
        own_report().enter(DRIVER, "generate")
        time.sleep(0.1)
        own_report().enter(DRIVER, "train")


def train_long() -> None:
    begin = time.monotonic() - 500
    real_clock = time.monotonic
    for number in range(5):
        time.monotonic = lambda number=number: begin + 100 * number
        own_report().enter(DRIVER, "train")
    time.monotonic = real_clock
    own_report().enter(DRIVER, "train")


def hang_here() -> None:
    own_report().enter(DRIVER, "generate")
    time.sleep(240)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode")
    attempt, args = parse_place(parser)
    print(f"driver of attempt {args.attempt} begins", flush=True)
    if args.mode == "fail":
        print("error: rollout.temperature=-1 must be positive", flush=True)
        return 3
    if args.mode == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if args.mode == "deaf":
        subprocess.run(["setsid", "--fork", "sleep", "600"], check=True)
    if args.mode == "long-step":
        train_long()
    (attempt.path / "driver_began").touch()
    if args.mode in ("steps", "hang"):
        go_through_phases(4 if args.mode == "hang" else 2000)
        hang_here()
    deadline = time.monotonic() + 240
    while args.attempt == 1 and time.monotonic() < deadline:
        if args.mode == "until-stop" and attempt.must_stop():
            return STOPPED
        if args.mode == "until-told" and (attempt.path / "finish").exists():
            return DONE
        time.sleep(0.1)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
