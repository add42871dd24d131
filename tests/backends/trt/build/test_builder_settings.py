from __future__ import annotations

import pytest

from dllava_export.backends import doctor
from dllava_export.backends.trt.build.build_options import BuildOptions
from dllava_export.backends.trt.build.builder_settings import BuilderSettings
from dllava_export.backends.trt.trt_module import trt_logger
from dllava_export.errors import BackendError


@pytest.fixture
def trt():
    return pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "find_gpus", lambda: ())


def applied(trt, tmp_path, **options):
    builder = trt.Builder(trt_logger(trt))
    config = builder.create_builder_config()
    settings = BuilderSettings(trt, tmp_path, BuildOptions("tensorrt-rtx", **options))
    settings.apply(config)
    return settings, config, builder


def test_targets_and_level_reach_the_builder(trt, tmp_path):
    settings, config, _builder = applied(
        trt, tmp_path, compute_capabilities=("8.9", "12.0"), builder_optimization_level=1
    )
    found = [config.get_compute_capability(i) for i in range(config.num_compute_capabilities)]
    assert found == [trt.ComputeCapability.SM89, trt.ComputeCapability.SM120]
    assert config.builder_optimization_level == 1
    assert settings.compute_capabilities == ("8.9", "12.0")


def test_defaults_leave_the_builder_alone(trt, tmp_path):
    settings, config, _builder = applied(trt, tmp_path)
    assert config.num_compute_capabilities == 0
    assert not config.get_flag(trt.BuilderFlag.STRIP_PLAN)
    assert settings.timing_cache_name is None
    settings.save_timing_cache(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_float32_is_not_rounded_to_tf32(trt, tmp_path):
    _settings, config, _builder = applied(trt, tmp_path)
    assert not config.get_flag(trt.BuilderFlag.TF32)


def test_unknown_target(trt, tmp_path):
    with pytest.raises(
        BackendError, match=r"compute capability 6\.1; it builds for 7\.5, 8\.0"
    ):
        applied(trt, tmp_path, compute_capabilities=("6.1",))


def test_stripping_needs_a_gpu(trt, tmp_path, no_gpu):
    with pytest.raises(BackendError, match="strips weights on a machine with a GPU only"):
        applied(trt, tmp_path, strip_weights=True)


def test_stripping_with_a_gpu(trt, tmp_path, monkeypatch):
    gpus = (doctor.Gpu("RTX", 1024, None, "8.9"),)
    monkeypatch.setattr(doctor, "find_gpus", lambda: gpus)
    settings, config, _builder = applied(trt, tmp_path, strip_weights=True)
    assert config.get_flag(trt.BuilderFlag.STRIP_PLAN)
    assert settings.is_stripped


def test_plugin_library_that_is_not_there(trt, tmp_path, no_gpu):
    options = BuildOptions("tensorrt", plugin_paths=(tmp_path / "none.so",))
    with pytest.raises(
        BackendError, match=r"none\.so: there is no such file; expected a shared"
    ):
        BuilderSettings(trt, tmp_path, options)


def test_timing_cache_is_read_and_written(trt, tmp_path, no_gpu):
    cache = tmp_path / "my.cache"
    cache.write_bytes(b"timings")
    options = BuildOptions("tensorrt", timing_cache_file=cache)
    settings = BuilderSettings(trt, tmp_path, options)
    target = tmp_path / "engines"
    target.mkdir()
    settings.save_timing_cache(target)
    assert (target / "timing.cache").read_bytes() == b"timings"
    assert cache.read_bytes() == b"timings"
    assert settings.timing_cache_name == "timing.cache"
    assert not list(tmp_path.glob("*.partial"))
