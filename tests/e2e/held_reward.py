"""A reward that does not come to an end for as long as the file $HELD_REWARD is there."""

import os
import time
from pathlib import Path

from nanoslime.rollout.rewards import exact_match


def reward(text, label, metadata, status):
    while Path(os.environ["HELD_REWARD"]).exists():
        time.sleep(0.05)
    return exact_match.reward(text, label, metadata, status=status)
