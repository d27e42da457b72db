"""One plain loop: every site's work one after the other on all cores, then the mean."""

import torch
import work


def main() -> None:
    torch.manual_seed(0)
    network = work.build()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for round_number in range(1, work.ROUNDS + 1):
        work.stamp()
        mean = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        for site in range(work.SITES):
            network.load_state_dict(state)
            work.train(network, site, round_number)
            for name, tensor in network.state_dict().items():
                mean[name] += tensor / work.SITES
        state = mean
    torch.save(state, "model.pt")


if __name__ == "__main__":
    main()
