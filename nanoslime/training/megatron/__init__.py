"""The Megatron backend: GPTModel of megatron-core under every kind of parallelism.

The only package that imports megatron. On a machine without CUDA cpu_compat.py makes it
run on gloo.
"""
