"""Programs that tests start as children."""

# A server that has a child of its own, never answers, and ignores polite requests to end.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(600)"])
print("loading shards", flush=True)
time.sleep(600)
"""
