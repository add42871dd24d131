"""An extension module of `polygraphy run`: the product's backends beside polygraphy's own.

polygraphy finds it by the entry point `polygraphy.run.plugins` and asks it for groups of
options. Each backend adds one, `--dllava-BACKEND`, which runs a graph of a bundle as the product
does:

    polygraphy run out/llm/model.onnx --onnxrt --dllava-onnxruntime --load-inputs FILE
"""

from __future__ import annotations

import argparse
from typing import Any

from polygraphy.tools.args import ModelArgs
from polygraphy.tools.args.base import BaseArgs, BaseRunnerArgs
from polygraphy.tools.script import make_invocable

from dllava_export.backends.ort.backend import OrtBackend
from dllava_export.backends.ort.providers import PROVIDERS
from dllava_export.runtime.loading import BACKENDS

__all__ = ["argument_groups"]


def argument_groups() -> list[BaseArgs]:
    """Return what polygraphy adds to its command line: one runner per backend."""
    # polygraphy tells groups apart by their type.
    kinds = [type(name, (_BackendArgs,), {"backend": name}) for name in BACKENDS]
    return [_ProviderArgs(), *(kind() for kind in kinds)]


class _ProviderArgs(BaseArgs):
    """dllava-export: running a bundle's graphs in the product's backends."""

    def add_parser_args_impl(self) -> None:
        self.group.add_argument(
            "--dllava-provider",
            choices=PROVIDERS,
            default="cpu",
            help=f"Where --dllava-{OrtBackend.name} computes.",
        )

    def parse_impl(self, args: argparse.Namespace) -> None:
        self.provider = args.dllava_provider


class _BackendArgs(BaseRunnerArgs):
    backend: str

    def get_name_opt_impl(self) -> tuple[str, str]:
        return f"dllava-export's {self.backend} backend", f"dllava-{self.backend}"

    def get_extra_help_text_impl(self) -> str:
        return "The model is a graph of a bundle, with inputs of `validate --save-inputs`."

    def add_parser_args(self, parser: argparse.ArgumentParser) -> None:
        """Add nothing: polygraphy adds the option that selects the runner."""

    def add_to_script_impl(self, script: Any) -> None:
        script.add_import(
            imports=["BackendRunner"], frm="dllava_export.validation.backend_runner"
        )
        provider = None
        if self.backend == OrtBackend.name:
            provider = self.arg_groups[_ProviderArgs].provider
        model = self.arg_groups[ModelArgs].path
        script.add_runner(
            make_invocable("BackendRunner", model, self.backend, provider=provider)
        )
