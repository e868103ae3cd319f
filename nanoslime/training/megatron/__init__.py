"""The Megatron backend: GPTModel of megatron-core under tensor, pipeline and data parallelism.

The only package that imports megatron. On a machine without CUDA cpu_compat.py makes it run on gloo.
"""
