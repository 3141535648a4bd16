"""Write the API reference: python -W error .ci/docs.py FOLDER"""

from __future__ import annotations

import pkgutil
import re
import sys
from pathlib import Path

import pdoc

import lightning_ptq
from lightning_ptq import callbacks


def readable(docstring: str) -> str:
    """Return a docstring without markup that pdoc shows literally: ``~`` in cross-references, ``::`` after Example."""
    return re.sub(
        r"^( *)Example::$", r"\1**Example**", docstring.replace("`~lightning_ptq.", "`lightning_ptq."), flags=re.M
    )


def main(folder: Path) -> None:
    """Write one page for the public names, and one for each module."""
    for name in callbacks.__all__:  # the package imports these names only on access
        setattr(lightning_ptq, name, getattr(callbacks, name))
    specs = ["lightning_ptq"]
    for module in pkgutil.walk_packages(lightning_ptq.__path__, "lightning_ptq."):
        if module.name not in pdoc.extract.walk_specs(specs):
            specs.append(module.name)
    convert = pdoc.docstrings.convert
    pdoc.docstrings.convert = lambda docstring, *rest: convert(readable(docstring), *rest)
    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc(*specs, output_directory=folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
