"""FedAvg over all sites, without evaluation; the last model is saved."""

import torch
import work
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from timed import TimedFedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    torch.manual_seed(0)
    strategy = TimedFedAvg(
        fraction_evaluate=0.0, min_train_nodes=work.SITES, min_available_nodes=work.SITES
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(work.build().state_dict()),
        num_rounds=work.ROUNDS,
    )
    torch.save(result.arrays.to_torch_state_dict(), "model.pt")
