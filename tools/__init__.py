"""Thin command lines and benchmarks. They may import everything; nothing imports them."""
