"""The packages that the claim study's text is made of, and the files in them.

Running text only: no dictionaries, whose entries are a third punctuation, and nothing without a clear
licence. Each package has a licence of its own (usr/share/doc/PACKAGE/copyright), and the texts are not in
the repository.
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from phsa_megatron.config.errors import DataError

_LEAST_HAN_FRAC = 0.15


@dataclass(frozen=True)
class Source:
    """Files of one package that go to one domain.

    Attributes:
        domain: of the study.
        package: its name; NAME@VERSION is of npm, all others of Debian.
        kind: key of `extract.EXTRACTORS`.
        paths: patterns of the files; `*` matches slashes too.
        but_not: patterns of files among them that are left out.
        join_chars: short texts are joined up to about so many characters; 0: each is a document.
        least_han_frac: documents with fewer Chinese characters are left out, as they are not translated.
    """

    domain: str
    package: str
    kind: str
    paths: tuple[str, ...]
    but_not: tuple[str, ...] = ()
    join_chars: int = 0
    least_han_frac: float = 0.0

    def wants(self, path: str) -> bool:
        """Return whether a file of the package is one of the source."""
        return any(fnmatch(path, x) for x in self.paths) and not any(fnmatch(path, x) for x in self.but_not)


def _chinese(package: str, kind: str, *paths: str, join_chars: int = 0) -> Source:
    return Source("chinese_prose", package, kind, paths, (), join_chars, _LEAST_HAN_FRAC)


_DOC = "usr/share/doc/"
_SWORD = ("usr/share/sword/modules/*.?zs", "usr/share/sword/modules/*.?zz")
_GAME = "cataclysm-dda-data", ("*/zh_CN/*.mo",)
_VERSE_FOLDERS: tuple[str, ...] = "yuanqu", "shijing", "chuci", "lunyu", "sishuwujing", "mengxue"
_VERSE_FOLDERS += "caocaoshiji", "nalanxingde", "youmengying", "shuimotangshi", "wudaishici"
_VERSE = "quantangshi/poet", "songci/ci.song", *(f"{folder}/" for folder in _VERSE_FOLDERS)
SOURCES = (
    Source("english_prose", "anarchism", "html", (_DOC + "anarchism/html/*.html",)),
    Source("english_prose", "sword-comm-tdavid", "sword", _SWORD),
    Source("english_prose", "sword-comm-mhcc", "sword", _SWORD),
    Source("english_prose", "sword-text-web", "sword", _SWORD),
    Source("english_prose", "fortunes", "fortunes", ("usr/share/games/fortunes/*",), ("*.dat", "*.u8"), 8000),
    Source("english_prose", _GAME[0], "messages", _GAME[1], join_chars=8000),
    Source("english_manuals", "python3.11-doc", "html", (_DOC + "python3.11/html/*.html",), ("*/genindex*",)),
    Source("english_manuals", "debian-handbook", "html", (_DOC + "debian-handbook/html/en-US/*.html",)),
    Source("english_manuals", "debian-reference-en", "html", ("usr/share/debian-reference/*.html",)),
    Source("english_manuals", "libreoffice-help-en-us", "html", ("*/help/en-US/text/*.html",)),
    _chinese("libreoffice-help-zh-cn", "html", "*/help/zh-CN/text/*.html"),
    _chinese("debian-handbook", "html", _DOC + "debian-handbook/html/zh-CN/*.html"),
    _chinese("debian-reference-zh-cn", "html", "usr/share/debian-reference/*.html"),
    _chinese("debian-faq-zh-cn", "html", _DOC + "debian/FAQ/zh-cn/*.html"),
    _chinese("maint-guide-zh-cn", "html", _DOC + "maint-guide-zh-cn/html/*.html"),
    _chinese("linux-doc-6.1", "plain", _DOC + "linux-doc-6.1/html/_sources/translations/zh_*.txt"),
    _chinese("manpages-zh", "man", "usr/share/man/zh_CN/*.gz"),
    _chinese(_GAME[0], "translations", *_GAME[1], join_chars=4000),
    Source(
        "chinese_verse",
        "chinese-poetry@2.0.1",
        "poems",
        tuple(f"package/dist/{start}*.json" for start in _VERSE),
        ("*/intro.json", "*/authors.json", "*-preface.json"),
        join_chars=2000,
    ),
    # Its third file, chinese, is mostly the Debian Reference again.
    Source(
        "chinese_verse",
        "fortunes-zh",
        "fortunes",
        ("usr/share/games/fortunes/tang300", "usr/share/games/fortunes/song100"),
        join_chars=2000,
    ),
)
"""In the order of the domains' files."""


def fetch(packages: Sequence[str], folder: Path) -> dict[str, Path]:
    """Return the file of each package in `folder`, after downloading what is not there.

    Debian packages come by `apt-get download`, the others by `npm pack`, from where these are configured to
    look; nothing is installed. What is there already is used, from wherever it came.

    Args:
        packages: NAME, or NAME@VERSION for npm.
        folder: made if it is not there; its files are kept.

    Raises:
        DataError: a download failed, or the folder has two versions of a package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    absent = [name for name in dict.fromkeys(packages) if _file_of(name, folder) is None]
    debian = [name for name in absent if "@" not in name]
    if debian:
        _run(["apt-get", "download", *debian], folder)
    for name in absent:
        if "@" in name:
            _run(["npm", "pack", "--silent", name], folder)
    found = {name: _file_of(name, folder) for name in packages}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise DataError(f"{folder}: {', '.join(missing)} not there after the download")
    return {name: path for name, path in found.items() if path is not None}


def _file_of(package: str, folder: Path) -> Path | None:
    name, _, version = package.partition("@")
    files = sorted(folder.glob(f"{name}-{version}.tgz" if version else f"{name}_*.deb"))
    if len(files) > 1:
        raise DataError(f"{folder}: {' and '.join(x.name for x in files)} are one package: keep one of them")
    return files[0] if files else None


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise DataError(
            f"{command[0]} is not on this machine. Run `{' '.join(command)}` where it is and put the files "
            f"into {folder}."
        )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(
            f"`{' '.join(command)}` failed: {done.stderr.strip()[-500:]}\nIf it knows no such package, run "
            f"`apt-get update` before, or put the file into {folder}."
        )


def read_files(archive: Path, sources: Sequence[Source]) -> list[dict[str, bytes]]:
    """Return the files of each source of one package by path, in the order of the paths.

    Args:
        archive: .deb or .tgz.
        sources: of the package; the archive is read once for all of them.

    Raises:
        DataError: the archive is damaged, `dpkg-deb` is missing, or a source finds no file.
    """
    found: list[dict[str, bytes]] = [{} for _ in sources]
    with _opened(archive) as tar:
        for member in tar:
            path = member.name.removeprefix("./")
            wanted = [files for files, s in zip(found, sources, strict=True) if s.wants(path)]
            stream = tar.extractfile(member) if wanted and member.isreg() else None
            if stream is not None:
                content = stream.read()
                for files in wanted:
                    files[path] = content
    for files, source in zip(found, sources, strict=True):
        if not files:
            raise DataError(
                f"{archive}: no file like {' or '.join(source.paths)}: this version of {source.package} is "
                f"another than the list of sources was made for ({__name__})"
            )
    return [dict(sorted(files.items())) for files in found]


@contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile]:
    """Give the archive's files as a stream, without unpacking them to disk."""
    try:
        if archive.suffix != ".deb":
            with tarfile.open(archive, "r|*") as tar:
                yield tar
            return
        if shutil.which("dpkg-deb") is None:
            raise DataError(f"{archive}: dpkg-deb is not on this machine; it comes with the package dpkg")
        command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                yield tar
            _, said = process.communicate()
        if process.returncode:
            raise DataError(f"{archive}: {said.decode(errors='replace').strip()}; download it again")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{archive}: damaged ({error}); delete it and start again") from error
