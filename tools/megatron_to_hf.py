"""Convert a Megatron checkpoint in torch_dist format to Hugging Face's safetensors.

    python tools/megatron_to_hf.py MEGATRON_DIR OUT

MEGATRON_DIR: what hf_to_megatron.py wrote, a step of a run (checkpoints/step_<k>), or a checkpoint of
Megatron-LM or slime, of any TP, PP and EP layout. Optimizer state is left out.
"""

import sys
from functools import partial
from pathlib import Path

from tools.conversion.command import convert, finish, parser
from tools.conversion.plan import to_huggingface


def main(argv: list[str]) -> int:
    made = parser(__doc__, "megatron_to_hf.py", "MEGATRON_DIR")
    made.add_argument(
        "--hf-checkpoint",
        type=Path,
        metavar="DIR",
        help="the original model: configuration and tokenizer where they are not beside the checkpoint (in "
        "hf/), and names, order and dtypes of the files",
    )
    made.add_argument(
        "--dtype", choices=("BF16", "F16", "F32"), help="of all tensors; left out: as they are"
    )
    arguments = made.parse_args(argv)
    convert(arguments, partial(to_huggingface, dtype=arguments.dtype), arguments.hf_checkpoint)
    return 0


if __name__ == "__main__":
    sys.exit(finish("megatron_to_hf", lambda: main(sys.argv[1:])))
