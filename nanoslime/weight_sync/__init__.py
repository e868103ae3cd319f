"""From the trainer's weights to the engines.

plan.py       which rank sends which part of which tensor in which bucket
session.py    the driver's state machine: pause, begin, send, end, verify, resume
engine_pool.py, devices.py    the engines of a run, whoever is alive, and whose turn it is
broadcast.py, colocated.py, disk.py, in_process.py    ways for a bucket; TRANSPORTS is their table
"""
