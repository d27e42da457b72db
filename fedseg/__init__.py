"""FedSeg: federated liver and liver-tumour segmentation as a Flower app."""

from importlib.util import find_spec

__all__ = ["__version__"]
__version__ = "0.1.0"

if find_spec("torch") is None or find_spec("flwr") is None:
    # uv reads `[tool.uv]` in pyproject.toml and then installs neither, without an error.
    raise ImportError(
        "fedseg needs torch and flwr: run `pip install -e .` "
        "(with uv: `uv pip install --no-config -e .`)"
    )
