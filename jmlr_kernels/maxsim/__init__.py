"""MaxSim (late interaction, ColBERT): definition in reference.py, public functions in function.py."""
