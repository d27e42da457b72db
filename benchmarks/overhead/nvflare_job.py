"""The job for NVFlare's simulator: its FedAvg recipe with the settings of its documentation."""

import sys
from pathlib import Path

import work
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv


def main() -> None:
    recipe = FedAvgRecipe(
        name="overhead",
        model={"class_path": "monai.networks.nets.unet.UNet", "args": work.UNET},
        min_clients=work.SITES,
        num_rounds=work.ROUNDS,
        train_script=str(Path(__file__).with_name("nvflare_client.py")),
    )
    environment = SimEnv(num_clients=work.SITES, workspace_root=sys.argv[1])
    run = recipe.execute(environment)
    print(run.get_status(), run.get_result())


if __name__ == "__main__":
    main()
