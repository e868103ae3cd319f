"""From trainer weights to engines and files: assemble whole Hugging Face tensors from the ranks' pieces,
then send them.
"""
