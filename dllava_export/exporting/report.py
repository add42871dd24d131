"""What an export wrote."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dllava_export.bundles import layout
from dllava_export.bundles.bundle_writer import BundleWriter
from dllava_export.bundles.manifest import Manifest
from dllava_export.geometry import Geometry
from dllava_export.reporting.byte_sizes import format_bytes
from dllava_export.sparsity import Sparsity

__all__ = ["ExportReport"]

_LINK_WARNING = (
    "weights are hard links: onnx, netron, polygraphy and onnxslim refuse to read them, and "
    "whoever changes the linked files in place changes this bundle. Leave --link out for a copy."
)


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        folder: The bundle.
        manifest: Its manifest.
        bytes_linked: Bytes of files that are hard links to those of the source.
        bytes_cloned: Bytes of files that share their blocks with those of the source.
        bytes_written: Bytes of new files.
        seconds: Wall time.
        weights_seconds: The part of it that weights took.
        warnings: What the user should know.
    """

    folder: Path
    manifest: Manifest
    bytes_linked: int
    bytes_cloned: int
    bytes_written: int
    seconds: float
    weights_seconds: float
    warnings: tuple[str, ...]

    @classmethod
    def of(
        cls,
        folder: Path,
        manifest: Manifest,
        writer: BundleWriter,
        bytes_written: int,
        seconds: float,
        warnings: tuple[str, ...],
    ) -> ExportReport:
        """Return what a writer has put into a bundle."""
        return cls(
            folder=folder,
            manifest=manifest,
            bytes_linked=writer.bytes_linked,
            bytes_cloned=writer.bytes_cloned,
            bytes_written=bytes_written,
            seconds=seconds,
            weights_seconds=writer.seconds,
            warnings=warnings,
        )

    def to_text(self) -> str:
        """Return a summary: what was written, where, and what it is."""
        sparsity, geometry = self.manifest.sparsity, self.manifest.geometry
        lines = [
            f"Wrote {self.folder} in {self.seconds:.1f} s: "
            f"{format_bytes(self.bytes_written)} new, weights {self._how_weights_came()}",
            f"  decoder   {geometry.num_layers} layers, hidden {geometry.hidden_size}, "
            f"{self.manifest.precision}",
        ]
        if sparsity.is_dense:
            lines.append("  sparsity  none (dense decoder)")
        else:
            text = (
                f"generated text keep rate {sparsity.output_text_keep_rate:g}"
                if sparsity.has_keep_bit
                else "all generated text kept"
            )
            lines.append(
                f"  sparsity  {sparsity.policy_text}, from layer {sparsity.sparse_layer} on: "
                f"{_kept_image_tokens(sparsity, geometry)} image tokens, {text}"
            )
        if self.manifest.chat_template is not None:
            lines.append(f"  prompts   chat template {self.manifest.chat_template}")
        names = [layout.DECODER, layout.RECOMPUTE]
        visual = (
            f", {layout.VISUAL_FOLDER}/{layout.VISUAL}" if self.manifest.has_visual else ""
        )
        lines.append(f"  graphs    {', '.join(f'llm/{name}' for name in names)}{visual}")
        lines += [f"warning: {warning}" for warning in self.warnings]
        if self.bytes_linked:
            lines.append(f"warning: {_LINK_WARNING}")
        return "\n".join(lines)

    def _how_weights_came(self) -> str:
        if self.bytes_linked:
            return f"linked ({format_bytes(self.bytes_linked)})"
        if self.bytes_cloned:
            return f"cloned ({format_bytes(self.bytes_cloned)} that take no space)"
        return f"copied in {self.weights_seconds:.1f} s"


def _kept_image_tokens(sparsity: Sparsity, geometry: Geometry) -> str:
    if geometry.num_image_tokens:
        kept = sparsity.num_kept_image_tokens(geometry.num_image_tokens)
        return f"{kept} of {geometry.num_image_tokens}"
    if sparsity.image_keep_tokens is not None:
        return str(sparsity.image_keep_tokens)
    return f"{sparsity.image_keep_rate:.3g} of the"
