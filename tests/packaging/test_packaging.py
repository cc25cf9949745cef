"""What is built is what is meant: wheel, source archive, editable install, cold imports."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"phsa_megatron", "phsa_kernels", "phsa_launch"}


def run(*command: str, cwd: Path = ROOT, **env: str) -> str:
    result = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT))
    return out


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own that sees the dependencies but not this project."""
    home = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(home, with_pip=False)
    site = home / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    # A path line in a .pth file is not searched for further .pth files, so this project's own editable
    # install in the parent environment stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin" / "python"


def pip_install(python: Path, *arguments: str) -> None:
    run(sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps",
        "--no-index", "--no-build-isolation", "--force-reinstall", *arguments)  # fmt: skip


def test_wheel_holds_three_packages_and_the_recipes(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == PACKAGES
    assert "phsa_megatron/_recipes/train.yaml" in names
    recipes = sorted(p.name for p in (ROOT / "recipes" / "recipe").glob("*.yaml"))
    assert recipes and recipes == sorted(
        n.rsplit("/")[-1] for n in names if n.startswith("phsa_megatron/_recipes/recipe/")
    )
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
    assert any("demo_corpus" in name for name in names)
    assert "phsa_megatron/config/planning/h100_attention.json" in names
    assert "phsa_launch/templates/job.sbatch.j2" in names


def test_source_archive_builds_from_itself(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    assert {"pyproject.toml", "LICENSE", "README.md", "recipes/train.yaml"} <= names


PROBE = """
import sys
import phsa_megatron, phsa_launch
import phsa_megatron.config.compose as c
print(c.__file__)
c.compose(["recipe=phsa_demo_cpu"])
heavy = {"torch", "numpy", "megatron", "triton", "phsa_kernels"} & set(sys.modules)
assert not heavy, heavy
"""


def test_installed_wheel_composes_a_recipe_without_a_checkout(
    built: Path, bare_python: Path, tmp_path: Path
) -> None:
    (wheel,) = built.glob("*.whl")
    pip_install(bare_python, str(wheel))
    where = run(str(bare_python), "-c", PROBE, cwd=tmp_path, PYTHONPATH="")
    assert "site-packages" in where


def test_editable_install_reads_the_checkout(bare_python: Path, tmp_path: Path) -> None:
    pip_install(bare_python, "-e", str(ROOT))
    where = run(str(bare_python), "-c", PROBE, cwd=tmp_path, PYTHONPATH="")
    assert where.startswith(str(ROOT))


@pytest.mark.parametrize(
    ("imported", "forbidden"),
    [
        ("phsa_megatron.cli", "torch numpy megatron phsa_kernels"),
        ("phsa_megatron.generate", "torch numpy megatron phsa_kernels"),
        ("phsa_megatron.config.validate", "torch numpy megatron phsa_kernels"),
        ("phsa_launch.cli", "torch numpy megatron phsa_kernels"),
        ("phsa_kernels", "megatron phsa_megatron triton hydra"),
    ],
)
def test_cold_import(imported: str, forbidden: str) -> None:
    program = f"import sys, {imported}; print(sorted(set({forbidden.split()!r}) & set(sys.modules)))"
    path = os.pathsep.join(str(ROOT / p) for p in (".", "kernels", "launch"))
    assert run(sys.executable, "-c", program, PYTHONPATH=path).strip() == "[]"


def test_the_folder_kernels_does_not_shadow_the_package_of_that_name(tmp_path: Path) -> None:
    """A regular package called `kernels` elsewhere on the path wins over our folder, from our root too."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("who = 'the other project'\n")
    out = run(sys.executable, "-c", "import kernels; print(kernels.who)", PYTHONPATH=str(tmp_path))
    assert out.strip() == "the other project"
