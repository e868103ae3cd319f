"""The first hour on a cluster: a ladder of short runs, each only if the one below it passed.

rungs.py: what is run -> ladder.py: submits and waits, rung after rung
driver.py: the run's driver, which is killed once and measures memory
checks.py: what the run's directory proves -> report.py: JSON and text without names
"""
