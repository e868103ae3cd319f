"""Processes that this process starts, the ports that they listen on, and the logs that they write."""
