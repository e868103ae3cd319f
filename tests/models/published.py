"""Excerpts of config.json files as their authors published them, in published.json.

They are from before transformers 5 renamed keys. Left out are ids of tokens, dropout and
initialization, and the quantization of DeepSeek-V3's FP8 weights.
"""

import json
from pathlib import Path

_FILE = Path(__file__).with_name("published.json")

CONFIGS: dict[str, dict[str, object]] = json.loads(_FILE.read_text(encoding="utf-8"))
