"""Networks, training, inference and metrics: plain MONAI and PyTorch, without federation."""
