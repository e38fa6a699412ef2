"""A Python for aarch64 that qemu-user runs here: Debian's packages and PyPI's wheels, unpacked into a folder.

Nothing is installed on this machine. What is unpacked or compiled once is used again.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from workshop.places import ROOT

TOOLS = {"qemu-aarch64": "qemu-user", "apt-get": "apt", "apt-cache": "apt", "dpkg-deb": "dpkg"}
"""The programs that are needed, and the Debian packages that have them."""
DEBIAN = ("python3-minimal", "libpython3-stdlib", "libstdc++6", "zlib1g")
WHEELS = ("gguf", "llvmlite", "numba", "numpy", "pytest")
"""What quantizing takes, in the versions of this environment; pytest, because the rows are those of the tests."""
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")

CPUS: Mapping[str, str] = {
    "generic": "cortex-a57",
    "cortex-a72": "cortex-a72",
    "cortex-a76": "cortex-a76",
    "neoverse-n1": "neoverse-n1",
    "a64fx": "a64fx",
    "neoverse-v1": "max",
    "apple-m1": "max",
}
"""LLVM's names of processors to compile for, and what qemu is to be: the same, or one with all that it knows."""


def check_tools() -> None:
    """Leave with one line where a program is missing."""
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is not here, so nothing is compared: apt-get install {package}")


def make_python(directory: Path) -> None:
    """Unpack what is not in the directory yet."""
    if not (directory / "root").is_dir():
        _unpack_debian(directory)
    if not (directory / "site").is_dir():
        _unpack_wheels(directory)


def run_python(directory: Path, cpu: str, *words: str) -> None:
    """`python WORDS` in the repository, as one of CPUS.

    Why numba is told what to compile for: it would ask /proc/cpuinfo, which is this machine's.
    """
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{directory / 'site'}",
        "NUMBA_CACHE_DIR": str(directory / "caches" / cpu),
        "NUMBA_CPU_NAME": cpu,
        "NUMBA_CPU_FEATURES": "",
    }
    emulated = ("qemu-aarch64", "-cpu", CPUS[cpu], "-L", str(directory / "root"), str(_interpreter(directory)))
    subprocess.run([*emulated, *words], cwd=ROOT, env=environment, check=True)


def _interpreter(directory: Path) -> Path:
    """The program itself; python3 is a link."""
    return (directory / "root/usr/bin/python3").resolve()


def _unpack_debian(directory: Path) -> None:
    """The packages and all that they depend on, found by apt in lists of its own: this machine's stay as they are."""
    state, packages = directory / "apt", directory / "debian"
    for folder in (state / "lists/partial", state / "cache/archives/partial", packages):
        folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "root",
        "Dir::State::Lists": state / "lists",
        "Dir::State::status": "/dev/null",
        "Dir::Cache": state / "cache",
    }
    options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    subprocess.run(["apt-get", "-qq", *options, "update"], check=True)
    listing = ["apt-cache", *options, "depends", "--recurse", "--important", *DEBIAN]
    lines = subprocess.run(listing, check=True, capture_output=True, text=True).stdout.splitlines()
    names = sorted({line for line in lines if line and not line.startswith((" ", "<"))})
    subprocess.run(["apt-get", "-qq", *options, "download", *names], check=True, cwd=packages)
    for package in packages.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(package), str(directory / "unpacking")], check=True)
    (directory / "unpacking").rename(directory / "root")


def _unpack_wheels(directory: Path) -> None:
    version = _interpreter(directory).name.removeprefix("python")
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in WHEELS]
    platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_aarch64")]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(directory / "site.unpacking")]
    only = ["--only-binary=:all:", "--implementation", "cp", "--python-version", version]
    subprocess.run([*install, *only, *platforms, *wanted], check=True)
    (directory / "site.unpacking").rename(directory / "site")
