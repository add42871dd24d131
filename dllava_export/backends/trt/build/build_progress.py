"""TensorRT's progress monitor as a progress bar, and as a way to stop a build."""

from __future__ import annotations

import threading
from types import ModuleType
from typing import Any

__all__ = ["progress_monitor"]


def progress_monitor(trt: ModuleType, name: str, *, show: bool) -> Any:
    """Return an `IProgressMonitor` that draws the outermost phase as a bar on stderr.

    Its attribute `was_interrupted` is True after Ctrl-C, which stops the build at its next step.

    Args:
        trt: Module of `trt_module`.
        name: Name of the engine.
        show: Draw the bar.
    """
    from tqdm import tqdm

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
        """Called by TensorRT, from several threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.was_interrupted = False
            self._lock = threading.Lock()
            self._outermost: str | None = None
            self._num_steps = 0
            form = "{desc} {bar} {n}/{total} [{elapsed}]"
            self._bar = tqdm(desc=name, total=0, disable=not show, bar_format=form)

        def phase_start(
            self, phase_name: str, parent_phase: str | None, num_steps: int
        ) -> None:
            """Start the bar with the first phase; show the names of those right below it."""
            with self._lock:
                if self._outermost is None:
                    self._outermost = phase_name
                    self._bar.total = self._num_steps = num_steps
                elif parent_phase == self._outermost:
                    self._bar.set_description(f"{name}: {phase_name:36.36}")

        def phase_finish(self, phase_name: str) -> None:
            """Complete the bar when the first phase ends."""
            with self._lock:
                if phase_name == self._outermost:
                    self._bar.update(self._num_steps - self._bar.n)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Count the outermost phase's steps; False stops the build."""
            try:
                with self._lock:
                    if phase_name == self._outermost:
                        self._bar.update()
            except KeyboardInterrupt:
                self.was_interrupted = True
            return not self.was_interrupted

        def close(self) -> None:
            """End the bar."""
            self._bar.close()

    return Monitor()
