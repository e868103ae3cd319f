"""Trainer ranks and rollout workers are Ray actors on the nodes that the plan names. No other
folder imports ray.

    driver (node 0) ── RayTrainGroup ── one RankActor for each trainer rank
                    └─ RayEngines ───── one WorkerActor for each node with engines; it owns
                                        their servers and runs a rollout worker

The arrays of samples go from the worker that made them to the ranks that train on them; the
driver has their numbers. An actor that dies ends the run: RunError says its name, node and log.
A rollout worker does not where others are left: they make its groups anew, and Ray starts it again,
where its node is lost as soon as there is one in its place.
"""
