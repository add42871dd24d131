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

from dllava_export.backends.factory import BackendOption
from dllava_export.backends.registry import BACKENDS

__all__ = ["argument_groups"]


def argument_groups() -> list[BaseArgs]:
    """Return what polygraphy adds to its command line: one runner per backend."""
    # polygraphy tells groups apart by their type.
    names = [factory.name for factory in BACKENDS.usable()]
    kinds = [type(name, (_BackendArgs,), {"backend": name}) for name in names]
    return [_OptionArgs(), *(kind() for kind in kinds)]


def _offered(backend: str) -> list[BackendOption]:
    return BACKENDS.get(backend).cli_options()


class _OptionArgs(BaseArgs):
    """dllava-export: running a bundle's graphs in the product's backends."""

    def add_parser_args_impl(self) -> None:
        options = {o.flag: o for f in BACKENDS.usable() for o in f.cli_options()}
        for option in options.values():
            self.group.add_argument(
                f"--dllava-{option.flag.removeprefix('--')}",
                dest=f"dllava_{option.name}",
                type=str if option.choices else int,
                choices=option.choices or None,
                help=option.help,
            )

    def parse_impl(self, args: argparse.Namespace) -> None:
        self.values = vars(args)


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
        given = self.arg_groups[_OptionArgs].values
        options = {
            option.name: given[f"dllava_{option.name}"]
            for option in _offered(self.backend)
            if given.get(f"dllava_{option.name}") is not None
        }
        model = self.arg_groups[ModelArgs].path
        script.add_runner(
            make_invocable("BackendRunner", model, self.backend, options=options)
        )
