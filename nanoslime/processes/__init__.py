"""Processes that this process starts, the ports on which they listen, and their logs."""
