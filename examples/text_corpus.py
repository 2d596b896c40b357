"""A corpus of text under permissive licences: technical documentation and Python sources.

It is made of documentation packages of Debian and of Python packages that are installed beside mq-ao. Whole documents
are held out, or kept for calibration, by a hash of their names.

Examples:

    python examples/text_corpus.py --out runs/corpus    # on Debian: fetches and unpacks the packages first

    python examples/text_corpus.py --packages unpacked --out runs/corpus    # folders that dpkg-deb -x made
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated

import typer
from demo_corpus import is_text
from training import console, say

from mq_ao.files import write_atomically

HELD_OUT_SHARE = 0.004
"""Share of the documents that are never trained on and measured on."""
CALIBRATION_SHARE = 0.003
"""Share of the documents that are never trained on and calibrated on."""
LARGEST = 400_000
"""Bytes of the largest document; larger files are tables, but for dictionaries, which are cut."""
PIECE = 20_000
"""Bytes, about, of a piece of a dictionary: a document."""

SPLITS = ("train", "heldout", "calibration")


@dataclass(frozen=True)
class Source:
    """Where a part of the text is from.

    Attributes:
        name: Debian package, or Python package.
        licence: its own statement, shortened.
        files: patterns of the paths that are read, below the package.
        without: patterns of those that are not.
        share: share of the documents that are taken, by a hash of their names.
        python: whether it is an installed Python package, or "stdlib".
        cut: whether a file is cut into pieces at empty lines, or at lines of a percent sign.
    """

    name: str
    licence: str
    files: tuple[str, ...]
    without: tuple[str, ...] = ()
    share: float = 1.0
    python: bool = False
    cut: bool = False


_NO_TESTS = ("test/*", "tests/*", "*/test/*", "*/tests/*", "*/idle_test/*", "encodings/*", "lib2to3/tests/*")
_EXCLUDED = ("*site-packages/*", "*dist-packages/*", "*/__pycache__/*")


def _python(name: str, licence: str, share: float = 1.0) -> Source:
    return Source(name, licence, ("*.py",), (*_NO_TESTS, *_EXCLUDED), share, python=True)


def _sphinx(package: str, licence: str, without: tuple[str, ...] = ()) -> Source:
    return Source(package, licence, ("*/_sources/*.txt",), without)


SOURCES = (
    _sphinx("python3.11-doc", "PSF"),
    _sphinx("python-pandas-doc", "BSD-3-Clause", ("*/reference/api/*",)),
    _sphinx("python-astropy-doc", "BSD-3-Clause", ("*/api/*",)),
    _sphinx("python-statsmodels-doc", "BSD-3-Clause", ("*/generated/*",)),
    _sphinx("python-sympy-doc", "BSD-3-Clause"),
    _sphinx("python-xarray-doc", "Apache-2.0", ("*/generated/*",)),
    _sphinx("python-ipython-doc", "BSD-3-Clause"),
    _sphinx("python-celery-doc", "BSD-3-Clause"),
    _sphinx("python-flask-doc", "BSD-3-Clause"),
    _sphinx("python-werkzeug-doc", "BSD-3-Clause"),
    _sphinx("python-pytest-doc", "MIT"),
    _sphinx("python-setuptools-doc", "MIT"),
    _sphinx("python-cryptography-doc", "Apache-2.0 or BSD-3-Clause"),
    _sphinx("twisted-doc", "MIT", ("*/api/*",)),
    _sphinx("sphinx-doc", "BSD-2-Clause"),
    _sphinx("cython-doc", "Apache-2.0"),
    _sphinx("cmake-doc", "BSD-3-Clause"),
    _sphinx("llvm-14-doc", "Apache-2.0 with LLVM exceptions"),
    _sphinx("clang-14-doc", "Apache-2.0 with LLVM exceptions"),
    _sphinx("swift-doc", "Apache-2.0"),
    _sphinx("nova-doc", "Apache-2.0"),
    _sphinx("keystone-doc", "Apache-2.0"),
    _sphinx("neutron-doc", "Apache-2.0"),
    _sphinx("cinder-doc", "Apache-2.0"),
    Source("dict-jargon", "public domain", ("*.dict.dz",), cut=True),
    _python("stdlib", "PSF"),
    _python("numpy", "BSD-3-Clause"),
    _python("scipy", "BSD-3-Clause"),
    _python("sklearn", "BSD-3-Clause"),
    _python("networkx", "BSD-3-Clause"),
    _python("matplotlib", "PSF-like"),
    _python("nltk", "Apache-2.0"),
    _python("sympy", "BSD-3-Clause", share=0.4),
)


@dataclass
class Tally:
    """What was read of a source."""

    name: str
    licence: str
    version: str
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))


def place(name: str) -> float:
    """A number in [0, 1) that depends on a document's name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


def split_of(name: str) -> str:
    """Which of `SPLITS` a document belongs to."""
    at = place(name)
    if at < HELD_OUT_SHARE:
        return "heldout"
    return "calibration" if at < HELD_OUT_SHARE + CALIBRATION_SHARE else "train"


def documents(source: Source, root: Path) -> Iterator[tuple[str, bytes]]:
    """Names and texts of a source's documents below `root`, in a fixed order; what is no UTF-8 is left out."""
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root).as_posix()
        if not any(fnmatch(inside, pattern) for pattern in source.files):
            continue
        if any(fnmatch(inside, pattern) for pattern in source.without) or path.is_symlink() or not path.is_file():
            continue
        content = path.read_bytes()
        if path.suffix in (".gz", ".dz"):
            content = gzip.decompress(content)
        for index, piece in enumerate(_pieces(content) if source.cut else [content]):
            name = f"{source.name}/{inside}" + (f"#{index}" if source.cut else "")
            # Of another hash than the one that splits, so that shares stay what they are.
            if place(f"share of {name}") < source.share and _is_text(piece):
                yield name, piece


def _pieces(content: bytes) -> list[bytes]:
    """Cuts behind empty lines, or lines of a percent sign, into pieces of about `PIECE` bytes."""
    found, piece = [], b""
    for entry in re.split(rb"(?<=\n\n)|(?<=\n%\n)", content):
        piece += entry
        if len(piece) >= PIECE:
            found.append(piece)
            piece = b""
    return [*found, piece]


def _is_text(content: bytes) -> bool:
    return 200 <= len(content) <= LARGEST and is_text(content)


def root_and_version(source: Source, packages: Path) -> tuple[Path, str]:
    """Where a source is, and which version of it.

    Raises:
        FileNotFoundError: it is not there.
    """
    if not source.python:
        root = packages / source.name
        if not root.is_dir():
            raise FileNotFoundError(f"{root} does not exist: unpack the Debian package {source.name} there.")
        version = root / "VERSION"
        return root, version.read_text().strip() if version.exists() else "unknown"
    if source.name == "stdlib":
        return Path(sysconfig.get_path("stdlib")), sysconfig.get_python_version()
    spec = importlib.util.find_spec(source.name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the Python package {source.name} is not installed: run pip install {source.name}.")
    distribution = importlib.metadata.packages_distributions()[source.name][0]
    return Path(spec.submodule_search_locations[0]), importlib.metadata.version(distribution)


def collect(packages: Path, out: Path, sources: tuple[Source, ...] = SOURCES) -> list[Tally]:
    """Writes train.txt, heldout.txt and calibration.txt, documents separated by 0 bytes, and sources.json.

    A text that was there before, word for word, is left out.
    """
    texts: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    seen: set[bytes] = set()
    tallies = []
    for source in sources:
        root, version = root_and_version(source, packages)
        tally = Tally(source.name, source.licence, version)
        for name, content in documents(source, root):
            digest = hashlib.sha256(content).digest()
            if digest in seen:
                continue
            seen.add(digest)
            split = split_of(name)
            texts[split].append(content)
            tally.documents[split] += 1
            tally.bytes[split] += len(content)
        tallies.append(tally)
        say(f"{source.name}: {sum(tally.documents.values()):,} documents, {sum(tally.bytes.values()):,} bytes")
    for split, found in texts.items():
        write_atomically(out / f"{split}.txt", b"\0".join(found))
    write_atomically(out / "sources.json", json.dumps([asdict(tally) for tally in tallies], indent=1).encode())
    return tallies


def fetch(packages: Path, sources: tuple[Source, ...] = SOURCES) -> None:
    """Downloads and unpacks the Debian packages that are not there yet (apt-get and dpkg-deb, no rights needed)."""
    for source in sources:
        folder = packages / source.name
        if source.python or folder.exists():
            continue
        say(f"fetching {source.name}")
        packages.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=packages) as temporary:
            subprocess.run(["apt-get", "download", "-qq", source.name], cwd=temporary, check=True)
            (archive,) = Path(temporary).glob("*.deb")
            unpacked = Path(temporary) / "unpacked"
            subprocess.run(["dpkg-deb", "-x", archive, unpacked], check=True)
            (unpacked / "VERSION").write_text(archive.name.split("_")[1] + "\n")
            unpacked.rename(folder)


def main(
    *,
    out: Annotated[Path, typer.Option(help="Folder for the texts and sources.json.")] = Path("runs/corpus"),
    packages: Annotated[
        Path | None, typer.Option(help="Folder with a folder for each Debian package; what is missing is fetched.")
    ] = None,
) -> None:
    """Collects the text that train_lm.py trains on."""
    packages = packages or out / "packages"
    fetch(packages)
    tallies = collect(packages, out)
    sizes = {split: sum(tally.bytes[split] for tally in tallies) for split in SPLITS}
    console.print(f"{sizes['train']:,} bytes to train on, {sizes['heldout']:,} held out, ", end="", highlight=False)
    console.print(f"{sizes['calibration']:,} to calibrate on; in {out}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
