"""Options that take the name of a policy; which there are is looked up when it matters."""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import CompletionItem

from dllava_export.errors import DllavaExportError
from dllava_export.passes.policies.registry import NO_POLICY, POLICIES, text_policy_names

__all__ = ["PolicyName", "PolicyOption"]


class PolicyName(click.ParamType[str]):
    """The name of a policy, checked against the registry when a value or help is asked for.

    `none` is a choice too: a dense decoder, or all generated tokens.

    Args:
        decides_text: Take only policies that decide about generated tokens.
    """

    name = "policy"

    def __init__(self, *, decides_text: bool) -> None:
        self._decides_text = decides_text

    def choices(self) -> tuple[str, ...]:
        """Return the names to choose from."""
        names = text_policy_names() if self._decides_text else POLICIES.names()
        return (*names, NO_POLICY)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return the choices as click writes them."""
        return f"[{'|'.join(self.choices())}]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        """Return the name as it is.

        Raises:
            click.BadParameter: If it is no choice.
            click.ClickException: If the package that provides the policy is broken.
        """
        if value == NO_POLICY:
            return value
        try:
            policy = POLICIES.find(value)
        except DllavaExportError as error:
            raise click.ClickException(str(error)) from error
        if policy is None:
            self.fail(POLICIES.describe_unknown(value, self.choices()), param, ctx)
        if self._decides_text and not policy.decides_text:
            self.fail(
                f"policy {value!r} has no decision for a single token; expected one of "
                f"{', '.join(self.choices())}.",
                param,
                ctx,
            )
        return value

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the choices that start so."""
        return [CompletionItem(name) for name in self.choices() if name.startswith(incomplete)]


class PolicyOption(click.Option):
    """An option in whose help `{policies}` stands for all policies and what they are."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return names and help text."""
        record = super().get_help_record(ctx)
        if record is None:
            return None
        policies = "; ".join(f"{policy.name}: {policy.help}" for policy in POLICIES.usable())
        return record[0], record[1].replace("{policies}", policies)
