"""python -m nanoslime.config.upstream: write the option name lists of the installed Megatron and SGLang."""

import json

from nanoslime.config.upstream import HERE, SOURCES, installed

if __name__ == "__main__":
    for which in SOURCES:
        (HERE / f"{which}.json").write_text(json.dumps(installed(which), indent=0) + "\n", encoding="utf-8")
