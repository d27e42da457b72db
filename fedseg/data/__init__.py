"""Data at a site: find, read, check, preprocess, sample; knows nothing of Flower."""
