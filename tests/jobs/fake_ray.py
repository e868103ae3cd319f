"""A stand-in for `ray start --block`: it listens as a head does, says that it is up, and stays."""

import argparse
import socket
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--head", action="store_true")
    parser.add_argument("--port", type=int)
    parser.add_argument("--node-ip-address")
    parser.add_argument("--temp-dir", type=Path)
    options, _ = parser.parse_known_args()
    with socket.socket() as listener:
        if options.head:
            listener.bind((options.node_ip_address, options.port))
            listener.listen()
        logs = options.temp_dir / "session_1" / "logs"
        logs.mkdir(parents=True)
        (logs / "raylet.err").write_text("the raylet ran out of file descriptors\n")
        (options.temp_dir / "session_latest").symlink_to("session_1")
        print("Ray runtime started.", flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main()
