"""Trainer weights to engines and files: whole Hugging Face tensors from ranks' pieces, then sent."""
