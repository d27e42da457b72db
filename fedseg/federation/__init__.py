"""The federation at the server: find sites, run rounds, average, keep the run folder."""
