"""Convert a Hugging Face checkpoint to Megatron's torch_dist format, which loads into any TP, PP, EP layout.

    python tools/hf_to_megatron.py HF_DIR OUT

Everything is read from config.json. OUT is what Megatron-LM's --load takes, the checkpoint is OUT/release;
OUT/hf keeps configuration, tokenizer and headers, so that megatron_to_hf.py gives the same files back.
An interrupted conversion is continued by the same command.
"""

import sys

from tools.conversion.command import convert, finish, parser
from tools.conversion.plan import to_megatron


def main(argv: list[str]) -> int:
    convert(parser(__doc__, "hf_to_megatron.py", "HF_DIR").parse_args(argv), to_megatron)
    return 0


if __name__ == "__main__":
    sys.exit(finish("hf_to_megatron", lambda: main(sys.argv[1:])))
