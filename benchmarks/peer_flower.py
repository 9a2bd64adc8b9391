"""FedAvg of `peer_work.py` in Flower's simulation; `peers.py` runs it in the peers' environment.

Messages, strategy and records as in Flower's own quickstart for PyTorch. A worker process keeps its model and its data
(`functools.cache`), and a message carries only what is trained. `run_simulation` is the engine that ``flwr run``
starts, without the processes around it.
"""

from __future__ import annotations

import functools
import logging
import sys
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peer_work import Report, Work

client_app = ClientApp()


@functools.cache
def work_of_this_process(folder: str) -> Work:
    torch.set_num_threads(1)
    return Work(folder)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    config = message.content["config"]
    work, client = work_of_this_process(config["folder"]), context.node_config["partition-id"]
    work.model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=False)
    work.train(client, config["server-round"] - 1)
    metrics = MetricRecord({"num-examples": len(work.labels[client])})
    return Message(RecordDict({"arrays": ArrayRecord(dict(work.trained)), "metrics": metrics}), reply_to=message)


def main(folder: str) -> None:
    logging.getLogger("flwr").setLevel(logging.ERROR)
    work, report, server_app = Work(folder), Report(("flwr", "ray", "torch", "timm", "numpy")), ServerApp()
    clients, processes = work.settings["clients"], work.settings["processes"]

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        strategy.start(
            grid,
            ArrayRecord(dict(work.trained)),
            num_rounds=work.settings["rounds"],
            train_config=ConfigRecord({"folder": folder}),
            evaluate_fn=lambda round, arrays: report.ended(
                lambda: {name: array.numpy() for name, array in arrays.items()}
            ),
        )

    run_simulation(
        server_app,
        client_app,
        num_supernodes=clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"address": "local", "num_cpus": processes},
        },
    )
    report.write(Path(folder))


if __name__ == "__main__":
    # Under its own name, so that Ray's workers import it, and keep what is cached, instead of unpickling its functions.
    import peer_flower

    peer_flower.main(sys.argv[1])
