from __future__ import annotations

import dataclasses
import sys

import pytest
from click.testing import CliRunner

from dllava_export import cli
from dllava_export.backends.doctor import collect
from dllava_export.backends.registry import BACKENDS, DEFAULT_BACKEND, backend_options
from dllava_export.errors import BackendError, RegistryError
from dllava_export.runtime.loading import load

MODULE = """
import dataclasses

from dllava_export.backends.factory import BackendFactory, BackendStatus, option
from dllava_export.backends.ort.backend import OrtBackend

opened = []


@dataclasses.dataclass(frozen=True)
class Options:
    speed: int | None = option(None, "--speed", "How fast.")
    quiet: bool = True


class Mine(BackendFactory):
    name, summary, options = "mine", "a backend of a test", Options

    def open(self, folder, manifest, options, *, verify=True):
        opened.append((folder, manifest, options, verify))
        backend = OrtBackend(folder, manifest, num_threads=1)
        backend.name = "mine"
        return backend

    def status(self, gpus):
        return BackendStatus("mine", "1.5", can_run=True, summary="runs here", install="pip")


class Short(Mine):
    def open(self, folder, manifest, options, *, verify=True):
        backend = super().open(folder, manifest, options, verify=verify)
        backend.max_length = 20
        return backend


class Plain(BackendFactory):
    name, summary = "mine", "a backend without options"

    def open(self, folder, manifest, options, *, verify=True):
        return OrtBackend(folder, manifest, num_threads=1)

    def status(self, gpus):
        raise AssertionError
"""


@pytest.fixture
def install(packages):
    """Return a function that installs a package with backend `mine`."""

    def do(entry="Mine", source=MODULE):
        packages.install(BACKENDS.group, "mine", entry, source)

    return do


def opened():
    return sys.modules["module_of_p"].opened


# The backends of this toolkit.


def test_knows_its_backends():
    assert BACKENDS.names() == ("onnxruntime", "tensorrt-rtx", "tensorrt")
    assert [factory.name for factory in BACKENDS.usable()] == list(BACKENDS.names())
    assert DEFAULT_BACKEND == "onnxruntime"
    assert [BACKENDS.get(name).can_build for name in BACKENDS.names()] == [False, True, True]


def test_unknown_backends_are_told_the_known_ones_and_where_to_look():
    with pytest.raises(
        BackendError,
        match=r"^backend must be one of onnxruntime, tensorrt-rtx, tensorrt, got 'tensorr'\. Did "
        r"you mean 'tensorrt' or 'tensorrt-rtx'\? `dllava-export doctor` tells what each",
    ):
        BACKENDS.get("tensorr")


def test_a_backend_that_needs_no_build_says_so(bundles):
    with pytest.raises(BackendError, match=r"'onnxruntime' runs bundles as they are; nothing"):
        BACKENDS.get("onnxruntime").build(bundles.path("mha"), {})


# Backends of other packages.


def test_a_backend_of_another_package_is_opened(bundles, install):
    install()
    path = bundles.path("mha")
    with load(path, "mine", speed=3, verify=False) as session:
        assert session.backend == "mine"
        found = session.generate("w5 w9", max_new_tokens=4)
    ((folder, manifest, options, verify),) = opened()
    assert (folder, verify) == (path, False)
    assert manifest == session.manifest
    assert dataclasses.asdict(options) == {"speed": 3, "quiet": True}
    expected = bundles.session("mha").generate("w5 w9", max_new_tokens=4)
    assert (found.text, found.token_ids) == (expected.text, expected.token_ids)


def test_files_are_verified_unless_told_not_to(bundles, install):
    install()
    load(bundles.path("mha"), "mine")
    assert opened()[0][3] is True


def test_a_backend_may_limit_the_length(bundles, install):
    install("Short")
    path = bundles.path("mha")
    assert load(path, "mine", verify=False).max_length == 20
    assert load(path, "mine", verify=False, max_length=30).max_length == 30


def test_doctor_lists_it(install):
    install()
    report = collect()
    assert [backend.name for backend in report.backends][-1] == "mine"
    assert "  mine          1.5: runs here" in report.to_text().splitlines()


def test_a_broken_package_does_not_hide_the_others(bundles, install, caplog):
    install(source="import nowhere")
    names = [backend.name for backend in collect().backends]
    assert names == ["onnxruntime", "tensorrt-rtx", "tensorrt"]
    assert "Backend 'mine' of package p 1.5 cannot be loaded" in caplog.text
    assert load(bundles.path("mha"), num_threads=1, verify=False).backend == "onnxruntime"
    with pytest.raises(RegistryError, match=r"cannot be loaded .*No module named 'nowhere'"):
        load(bundles.path("mha"), "mine")


def test_something_else_is_no_backend(bundles, install):
    install("opened")
    with pytest.raises(
        RegistryError,
        match=r"is module_of_p:opened, a list; expected .*backends\.factory\.BackendFactory",
    ):
        load(bundles.path("mha"), "mine")


# Options.


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        pytest.param("mine", {"provider": "cuda"}, "provider 'cuda' was given with backend "
                     "'mine', which has none; it belongs to onnxruntime. Leave it out.",
                     id="of a built-in one"),
        pytest.param("onnxruntime", {"speed": 3}, "speed 3 was given with backend "
                     "'onnxruntime', which has none; it belongs to mine. Leave it out.",
                     id="of another package"),
        pytest.param("onnxruntime", {"cuda_graph": False}, "cuda_graph False was given with "
                     "backend 'onnxruntime', which has none; it belongs to tensorrt-rtx and "
                     "tensorrt. Leave it out.", id="of two"),
        pytest.param("tensorrt", {"num_threads": 2}, "num_threads 2 was given with backend "
                     "'tensorrt', which has none; it belongs to onnxruntime. Leave it out.",
                     id="of onnxruntime"),
        pytest.param("onnxruntime", {"num_thread": 2}, "Backend 'onnxruntime' has no option "
                     "'num_thread'; it has provider, num_threads. Did you mean 'num_threads'?",
                     id="misspelt"),
        pytest.param("mine", {"colour": 2}, "Backend 'mine' has no option 'colour'; it has "
                     "speed, quiet.", id="of none"),
    ],
)  # fmt: skip
def test_options_of_other_backends_are_refused(tmp_path, install, backend, options, message):
    install()
    # Before anything is read: there is no such bundle.
    with pytest.raises(BackendError) as caught:
        load(tmp_path / "nothing", backend, **options)
    assert str(caught.value) == message


def test_a_backend_may_have_no_options(install):
    install("Plain")
    with pytest.raises(
        BackendError, match=r"^Backend 'mine' has no option 'x'; it has none\.$"
    ):
        backend_options(BACKENDS.get("mine"), {"x": 1})
    assert dataclasses.asdict(backend_options(BACKENDS.get("mine"), {})) == {}


def test_options_take_their_defaults():
    options = backend_options(BACKENDS.get("onnxruntime"), {"num_threads": 2})
    assert dataclasses.asdict(options) == {"provider": "cpu", "num_threads": 2}
    options = backend_options(BACKENDS.get("tensorrt"), {})
    assert dataclasses.asdict(options) == {"cuda_graph": True}


# On the command line.


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def test_the_command_line_offers_it_with_its_options(bundles, install):
    install()
    text = run("run", "--help").stdout
    assert "onnxruntime|tensorrt-rtx|tensorrt|mine" in " ".join(text.split()).replace(
        "| ", "|"
    )
    assert "--speed" in text
    assert "--quiet" not in text  # an option of `load` alone
    arguments = ["run", bundles.path("gqa"), "--input-ids", "3,4,5", "--image", "none"]
    done = run(*arguments, "--max-new-tokens", 2, "--backend", "mine", "--speed", 7)
    assert done.exit_code == 0, done.stderr
    assert opened()[0][2].speed == 7


def test_the_command_line_refuses_options_of_other_backends(bundles, install):
    install()
    arguments = ["run", bundles.path("gqa"), "--input-ids", "3,4,5", "--image", "none"]
    done = run(*arguments, "--speed", 7)
    assert done.exit_code != 0
    assert "belongs to mine" in done.stderr
    assert not opened()
