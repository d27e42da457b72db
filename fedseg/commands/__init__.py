"""Commands of the command line, by subject; each is a thin print over a public function."""
