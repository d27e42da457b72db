"""What each of NVFlare's clients runs, in the simulator's own process."""

import nvflare.client as flare
import torch
import work


def main() -> None:
    flare.init()
    site = int(flare.get_site_name().removeprefix("site-")) - 1
    network = work.build()
    while flare.is_running():
        received = flare.receive()
        if site == 0:
            work.stamp()
        network.load_state_dict(
            {name: torch.as_tensor(value) for name, value in received.params.items()}
        )
        loss = work.train(network, site, received.current_round)
        state = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
        flare.send(
            flare.FLModel(
                params=state,
                metrics={"train_loss": loss},
                meta={"NUM_STEPS_CURRENT_ROUND": work.STEPS},
            )
        )


if __name__ == "__main__":
    main()
