"""A package, not a namespace: torch-fidelity installs one of the same name."""
