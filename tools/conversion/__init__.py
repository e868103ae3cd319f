"""Hugging Face and Megatron checkpoints as byte ranges of one another.

The package does not import torch, which takes longer to import than a gigabyte to copy.

    checkpoint.py    opens and checks a directory of either format
    plan.py          the files of the other format, each a list of byte ranges and boxes
    run.py           writes them: resumable, hashed, committed by rename
    torch_dist.py, torch_pickle.py, keys.py    Megatron's format
    tensor_copy.py, tensor_blocks.py           moving bytes
"""
