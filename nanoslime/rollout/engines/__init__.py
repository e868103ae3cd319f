"""The engines that sample tokens: a file here and a line in ENGINES.

nanoslime/engine_kind.py says what the file holds. The table lies in `config`, where the
login node can check the name of an engine.
"""

from nanoslime.config.rollout import ENGINES as ENGINES
