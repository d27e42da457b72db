"""The least Flower app that federates the benchmark's work."""
