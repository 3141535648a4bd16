"""Entry point of ``lightning-ptq``: the subcommands, and errors as one message each."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from lightning_ptq import __version__
from lightning_ptq.cli.saved import compare_reports, print_report
from lightning_ptq.errors import PTQError
from lightning_ptq.report.table import default_console

LIGHTNING_COMMANDS = {
    "inspect": "print what would be quantized, what stays float, and what will go wrong; nothing is changed",
    "quantize": "quantize a trained model by one pass over calibration samples, and write the result",
    "validate": "run the model's validation on a quantized file, or on float weights",
    "export": "write a quantized file as ONNX with integer weights, verified in onnxruntime",
}
"""Subcommands that take model, data and trainer as LightningCLI does."""

_NOT_INSTALLED = (
    "lightning-ptq {command} needs the package jsonargparse with its signatures. Run pip install 'lightning-ptq[cli]'."
)
_EPILOG = """\
examples:
  lightning-ptq quantize --model my.Net --data my.Data --weights trained.ckpt --qconfig w4a4 --report_dir report
  lightning-ptq validate --model my.Net --data my.Data --weights quantized.ckpt
  lightning-ptq report report

Classes are given by import path; the current folder is searched first. lightning-ptq COMMAND --help lists the options.
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        args: Arguments of the command line; those of the process by default.

    Returns:
        The exit status: 0, or 1 after an error of the library. Wrong arguments exit with status 2.
    """
    given = list(sys.argv[1:] if args is None else args)
    try:
        if given and given[0] in LIGHTNING_COMMANDS:
            _run_with_lightning(given[0], given[1:])
            return 0
        parsed = _parser().parse_args(given)
        parsed.run(parsed)
    except Exception as error:
        if not _is_message(error):
            raise
        notes = [str(error), *getattr(error, "__notes__", ())]
        Console(stderr=True, soft_wrap=True).print("error: " + "\n".join(notes), style="red", markup=False)
        return 1
    return 0


def _run_with_lightning(command: str, args: list[str]) -> None:
    if any(importlib.util.find_spec(name) is None for name in ("jsonargparse", "docstring_parser", "typeshed_client")):
        raise PTQError(_NOT_INSTALLED.format(command=command))
    if os.getcwd() not in sys.path:  # a console script has its own folder there, and the user's classes are here
        sys.path.insert(0, os.getcwd())
    importlib.import_module("lightning_ptq.cli.commands").run(command, args)


def _is_message(error: Exception) -> bool:
    """True for an error whose message is all that the user needs: the library's, or Lightning's about its settings."""
    # By name, as either package of Lightning has a class of its own.
    return isinstance(error, PTQError) or type(error).__name__ == "MisconfigurationException"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lightning-ptq", description="Post-training quantization of LightningModules.", epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"lightning-ptq {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, text in LIGHTNING_COMMANDS.items():
        commands.add_parser(name, help=text)
    report = _add(commands, "report", "print a saved report: its key figures and main tables", _report)
    report.add_argument("report", metavar="FOLDER", help="folder of a report, or its report.json")
    report.add_argument("--every", action="store_true", help="print all tables, also units, sensitivities and settings")
    compare = _add(commands, "compare", "put saved reports side by side: settings that differ, metrics, size", _compare)
    compare.add_argument("reports", metavar="FOLDER", nargs="+", help="folders of reports, or their report.json")
    return parser


def _add(commands: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def _report(parsed: argparse.Namespace) -> None:
    print_report(parsed.report, parsed.every, default_console())


def _compare(parsed: argparse.Namespace) -> None:
    compare_reports(parsed.reports, default_console())
