"""A stand-in for the trainer: it writes the nodes of Ray to seen.json and ends well."""

import json
import sys

import ray

from tests.jobs.driver_place import parse_place


def main() -> int:
    attempt, _ = parse_place()
    head = json.loads(attempt.head.read_text())
    ray.init(address=head["ray_address"], _node_ip_address=head["node_ip"], log_to_driver=False)
    seen = []
    for node in ray.nodes():
        if node["Alive"]:
            facts = {
                "address": node["NodeManagerAddress"],
                "labels": node["Labels"],
                "slots": node["Resources"].get("slot"),
            }
            seen.append(facts)
    (attempt.path / "seen.json").write_text(json.dumps(seen))
    print(f"the driver sees {len(seen)} Ray nodes", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
