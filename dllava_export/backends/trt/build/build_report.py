"""What a build did, for people and programs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dllava_export.backends.trt.engine_config import EngineConfig
from dllava_export.reporting.byte_sizes import format_bytes

__all__ = ["BuildReport"]


@dataclasses.dataclass(frozen=True)
class BuildReport:
    """What `build_engines` made.

    Attributes:
        folder: Where the engines lie.
        config: What `config.json` there says.
        seconds: Engine name → time to parse and build it, in seconds.
    """

    folder: Path
    config: EngineConfig
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return the report as values that `json.dumps` takes."""
        return {
            "folder": str(self.folder),
            "config": dataclasses.asdict(self.config),
            "seconds": self.seconds,
        }

    def to_text(self) -> str:
        """Return the report as aligned plain text."""
        config = self.config
        targets = ", ".join(config.compute_capabilities) or "as the backend chooses"
        lines = [
            f"Wrote {self.folder}",
            f"  built by   {config.backend} {config.backend_version}, for compute capability: "
            f"{targets}",
            f"  sizes      {config.precision}, up to {config.max_batch_size} samples of "
            f"{config.max_input_len} rows; caches of "
            f"{' and '.join(map(str, config.capacities.values()))} rows",
        ]
        for name, engine in config.engines.items():
            size = format_bytes(engine.num_bytes)
            profiles = ", ".join(engine.profiles)
            lines.append(
                f"  {name:<10} {engine.file}, {size}, {self.seconds[name]:.1f} s, profiles: "
                f"{profiles}"
            )
        lines += [f"  {name:<10} not built: {why}" for name, why in config.not_built.items()]
        by_plugin = [op for op, how in config.plugins.items() if how == "plugin"]
        lines.append(f"  plugins    {', '.join(by_plugin) or 'none, all ops by their bodies'}")
        return "\n".join(lines)
