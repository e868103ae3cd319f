"""python -m nanoslime.config.upstream: write the option name lists of the installed Megatron and SGLang."""

from nanoslime.config.upstream import regenerate

if __name__ == "__main__":
    regenerate()
