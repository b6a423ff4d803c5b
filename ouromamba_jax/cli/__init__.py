"""The command `ouromamba`."""
