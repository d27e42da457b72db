"""Privacy: what keeps a single update from being seen, free of Flower."""
