"""The command line: ``settler``."""
