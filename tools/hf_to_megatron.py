"""Convert a Hugging Face checkpoint to Megatron's torch_dist format.

    python tools/hf_to_megatron.py HF_DIR OUT

The result loads into any TP, PP and EP layout. Everything is read from config.json. OUT
is what Megatron-LM's --load takes, the checkpoint is OUT/release; OUT/hf keeps
configuration, tokenizer and headers, so that megatron_to_hf.py gives the same files back.
The same command continues an interrupted conversion.
"""

import sys

from tools.conversion.command import convert, finish, make_parser
from tools.conversion.plan import to_megatron


def main(argv: list[str]) -> int:
    parser = make_parser(__doc__, "hf_to_megatron.py", "HF_DIR")
    convert(parser.parse_args(argv), to_megatron)
    return 0


if __name__ == "__main__":
    sys.exit(finish("hf_to_megatron", lambda: main(sys.argv[1:])))
