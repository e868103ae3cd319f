"""Bytes on disk without torch: shared files, manifests, atomic commits, safetensors headers."""
