"""Check an installed wheel, and use it as the examples of the README do: python tests/wheel.py FILE.whl"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import lightning_ptq

REPOSITORY = Path(__file__).resolve().parents[1]
FILES = ("lightning_ptq/py.typed", "lightning_ptq/report/page.html", "lightning_ptq/cli/main.py")


def main(wheel: Path) -> None:
    """Check the files of the wheel, where the package was imported from, the console script, and the example."""
    missing = set(FILES) - set(zipfile.ZipFile(wheel).namelist())
    if missing:
        raise SystemExit(f"{wheel.name} lacks {sorted(missing)}")
    home = Path(lightning_ptq.__file__).resolve().parent
    if home == REPOSITORY / "lightning_ptq":
        raise SystemExit(f"lightning_ptq was imported from the repository, {home}")
    (script,) = entry_points(group="console_scripts", name="lightning-ptq")
    if script.load() is not __import__("lightning_ptq.cli.main", fromlist=["main"]).main:
        raise SystemExit(f"the console script runs {script.value}")
    command = Path(sys.executable).with_name("lightning-ptq")
    shown = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    if shown.strip() != f"lightning-ptq {lightning_ptq.__version__}":
        raise SystemExit(f"{command} --version printed {shown!r}")
    example()


def example() -> None:
    """Run the Python blocks of the README as they stand, as a reader who copies them in order."""
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile("\n".join(blocks), "README.md", "exec"), {})
    if not Path("model.safetensors").is_file():
        raise SystemExit("the example of the README wrote no model.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
