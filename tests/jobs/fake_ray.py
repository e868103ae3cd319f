"""A stand-in for `ray start --block`: it listens as a head does, says that it is up, stays."""

import argparse
import socket
import time


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--head", action="store_true")
    parser.add_argument("--port", type=int)
    parser.add_argument("--node-ip-address")
    options, _ = parser.parse_known_args()
    with socket.socket() as listener:
        if options.head:
            listener.bind((options.node_ip_address, options.port))
            listener.listen()
        print("Ray runtime started.", flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main()
