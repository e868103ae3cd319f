"""Convert a Megatron checkpoint in torch_dist format to Hugging Face's safetensors.

    python tools/megatron_to_hf.py MEGATRON_DIR OUT

MEGATRON_DIR is what hf_to_megatron.py wrote, a step of a run (checkpoints/step_<k>), or a
checkpoint of Megatron-LM or slime, of any TP, PP and EP layout. Optimizer state is left
out.
"""

import sys
from functools import partial
from pathlib import Path

from tools.conversion.command import convert, finish, make_parser
from tools.conversion.plan import to_huggingface


def main(argv: list[str]) -> int:
    parser = make_parser(__doc__, "megatron_to_hf.py", "MEGATRON_DIR")
    parser.add_argument(
        "--hf-checkpoint",
        type=Path,
        metavar="DIR",
        help="the original model: configuration and tokenizer where they are not beside the "
        "checkpoint (in hf/), and names, order and dtypes of the files",
    )
    parser.add_argument(
        "--dtype",
        choices=("BF16", "F16", "F32"),
        help="the dtype of all tensors; left out: as they are",
    )
    arguments = parser.parse_args(argv)
    make_plan = partial(to_huggingface, dtype=arguments.dtype)
    convert(arguments, make_plan, arguments.hf_checkpoint)
    return 0


if __name__ == "__main__":
    sys.exit(finish("megatron_to_hf", lambda: main(sys.argv[1:])))
