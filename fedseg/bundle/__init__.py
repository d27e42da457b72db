"""MONAI bundles: a trained model with all that runs it where FedSeg isn't installed."""
