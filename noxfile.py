"""Sessions for development, listed by ``nox --list``. Each sets up its own environment, with uv if it is installed."""

from __future__ import annotations

from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "tests", "integrations", "wheel"]

# Python does this on import, except where PYTHONDONTWRITEBYTECODE is set, as in many containers.
COMPILE = "import compileall, sysconfig; compileall.compile_dir(sysconfig.get_path('purelib'), quiet=2, workers=0)"

CODE = ["lightning_ptq", "recipes", "tests", "noxfile.py"]


@nox.session
def quickstart(session: nox.Session) -> None:
    """Train a small network, quantize it at three settings, print a table: nox -s quickstart"""
    session.install(".[recipes]")
    session.run("python", "recipes/quickstart.py", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run unit tests, doctests and tests with several processes: nox -s tests [-- pytest arguments]"""
    session.install("-e", ".[tests]")
    session.run("python", "-c", COMPILE)  # many tests start processes, and each would compile all of torch
    at_once = ["--numprocesses=auto", "--maxprocesses=4"]
    session.run("pytest", *at_once, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def integrations(session: nox.Session) -> None:
    """Tests with libraries that are slow to import, and so are left out of the other tests."""
    session.install("-e", ".[tests,integrations]")
    session.run("python", "-c", COMPILE)
    files = session.posargs or [
        "tests/test_register_layer.py", "tests/test_docs.py", "tests/test_sweep_libraries.py",
        "tests/test_export_libraries.py",
    ]  # fmt: skip
    session.run("pytest", *files, env={"OMP_NUM_THREADS": "1", "PTQ_TEST_INTEGRATIONS": "1"})


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format, and the order of imports between folders."""
    session.install("ruff==0.17.6", "import-linter>=2.1", "-e", ".")
    session.run("ruff", "check", *CODE)
    session.run("ruff", "format", "--check", *CODE)
    session.run("lint-imports")


@nox.session
def format(session: nox.Session) -> None:
    """Format the code."""
    session.install("ruff==0.17.6")
    session.run("ruff", "check", "--fix", *CODE)
    session.run("ruff", "format", *CODE)


@nox.session
def types(session: nox.Session) -> None:
    """Check static types with mypy in strict mode."""
    session.install("mypy>=1.14", "nox", "-e", ".[plots]")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation in build/docs; a warning is an error. The package is read, not imported."""
    session.install("mkdocs<2", "mkdocs-material>=9.7,<10", "mkdocstrings[python]>=1", "latex2mathml>=3.77", "ruff")
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(reuse_venv=False)
def bare(session: nox.Session) -> None:
    """Run all callbacks with only the library and its dependencies installed."""
    session.install(".")
    session.run("python", "tests/bare.py", session.create_tmp())


@nox.session(reuse_venv=False)
def wheel(session: nox.Session) -> None:
    """Build sdist and wheel, install the wheel without the repository on the path, and use it as the README does."""
    folder = Path(session.create_tmp()).resolve()
    session.install("build[uv]")
    # The wheel is built from the sdist, which shows that the sdist is complete.
    session.run("python", "-m", "build", "--installer", "uv", "--outdir", f"{folder}/dist", silent=True)
    (built,) = (folder / "dist").glob("*.whl")
    session.install(f"{built}[cli]")
    check = Path("tests/wheel.py").resolve()
    with session.chdir(folder):  # where no package of this name lies
        session.run("python", str(check), str(built))


@nox.session
def recipe(session: nox.Session) -> None:
    """Run a recipe: nox -s recipe -- recipes/cifar10.py --data FILE.npz --weights FILE.th --qconfig w4a4"""
    session.install(".[recipes-all]")
    session.run("python", *session.posargs, env={"PYTHONPATH": "recipes"})  # for classes that YAML files name


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Measure the defaults on a panel of networks: nox -s benchmarks [-- --data DIR --json FILE]"""
    session.install(".[benchmarks]")
    session.run("python", "recipes/panel.py", *session.posargs)
