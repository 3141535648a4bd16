"""The command line ``lightning-ptq``; nothing of it is imported with the library."""

from lightning_ptq.cli.main import main

__all__ = ["main"]
