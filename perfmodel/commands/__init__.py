"""The commands of `perfmodel`: a module each, with `add_arguments` and `run`."""
