"""A run on two Ray nodes of one CPU each: a simulator is killed after round 1, and after round 2 the other's node goes.

Ray's head is a third node, without a CPU: it cannot be removed, and the server may stand on any of the three. The node
that goes is one on which only a simulator stands. The arguments are the run's settings.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import numpy as np
import psutil
import ray
from ray.cluster_utils import Cluster

from fedsim.callbacks import Callback
from fedsim.config import load
from fedsim.simulation import run
from fedsim.tracking.record import Record

HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}


class Disturbance(Callback):
    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]

    def on_round_end(self, record: Record, accuracies: np.ndarray | None) -> None:
        if record["round"] == 1:
            # A stable sort: where the server stands on neither, the node added first stays.
            stays, self.goes = sorted(self.nodes, key=lambda node: "central" not in pids_on(node))
            (pid,) = (pid for name, pid in pids_on(stays).items() if name != "central")
            os.kill(pid, signal.SIGKILL)
        if record["round"] == 2:
            (pid,) = pids_on(self.goes).values()
            self.cluster.remove_node(self.goes, allow_graceful=False)
            psutil.Process(pid).wait(timeout=60)  # it outlives its raylet, and might train to the end of the run


def pids_on(node: Any) -> dict[str, int]:
    """Process ids of the actors that live there, by name."""
    actors = ray._private.state.actors(actor_state_name="ALIVE").values()  # the public API needs a dashboard
    return {actor["Name"]: actor["Pid"] for actor in actors if actor["Address"]["NodeID"] == node._node_id}


def main() -> None:
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    disturbance = Disturbance(cluster)
    ray.init(address=cluster.address, logging_level="warning")
    run(load(None, sys.argv[1:]), callbacks=[disturbance])
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
