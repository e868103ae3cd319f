"""Rewards by name: a file here and a line in REWARDS.

The table lies in `config`, where the login node can check the name of a reward.
"""

from nanoslime.config.model import REWARDS as REWARDS
