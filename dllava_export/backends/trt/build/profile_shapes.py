"""Shape ranges of optimization profiles, from a few sizes and from trtexec's spelling."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dllava_export import names
from dllava_export.backends.trt.engine_config import ProfileShapes
from dllava_export.errors import SettingError

__all__ = ["ProfileSizes", "ShapeOverrides", "parse_shapes", "profile_shapes"]

Bounds = tuple[int, int, int]
_BOUND_NAMES = ("min", "opt", "max")
_VALUE_INPUTS = (names.NUM_KEPT, names.NUM_IMAGE_ROWS)  # their values are sizes of tensors


def parse_shapes(text: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes in `name:1x2x3,other:4`, as trtexec and polygraphy spell them.

    Raises:
        SettingError: If the text is anything else, or names a tensor twice.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([^:,]+):(\d+(?:x\d+)*)\s*", part)
        if match is None:
            raise SettingError(
                f"Shapes {text!r} are not readable at {part!r}; expected NAME:1x2x3, several "
                "separated by commas."
            )
        name, shape = match.groups()
        if name in shapes:
            raise SettingError(f"Shapes {text!r} name {name!r} twice; expected it once.")
        shapes[name] = tuple(int(size) for size in shape.split("x"))
    return shapes


@dataclasses.dataclass(frozen=True)
class ShapeOverrides:
    """Shapes that replace computed ones: tensor name → shape, or values of a shape tensor.

    Attributes:
        min: Smallest shapes.
        opt: Shapes that kernels are chosen for.
        max: Largest shapes.
    """

    min: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    opt: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    max: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def names(self) -> set[str]:
        """Return the tensors that are named."""
        return {*self.min, *self.opt, *self.max}


@dataclasses.dataclass(frozen=True)
class ProfileSizes:
    """The sizes that all inputs of one profile follow from, each (min, opt, max).

    Attributes:
        batch: Samples, or images.
        rows: Rows fed per sample.
        num_kept: Value of `num_kept`.
        num_image_rows: Value of `num_image_rows`.
        has_fixed_rows: True where overrides leave everything but the batch alone: decode.
    """

    batch: Bounds
    rows: Bounds
    num_kept: Bounds
    num_image_rows: Bounds
    has_fixed_rows: bool = False


def profile_shapes(
    profile: str,
    inputs: Sequence[Mapping[str, Any]],
    sizes: ProfileSizes,
    capacities: Mapping[str, int],
    overrides: ShapeOverrides | None = None,
) -> dict[str, ProfileShapes]:
    """Return the range of every input of one profile.

    An override fixes sizes that inputs share: the batch and the rows of one input are those of
    all others, since TensorRT takes no profile in which they differ.

    Args:
        profile: Its name, for messages.
        inputs: Name and shape of each input, as a manifest lists them.
        sizes: The sizes before overrides.
        capacities: Symbolic capacity → rows.
        overrides: What the user wants instead; inputs that are not of this graph are ignored.

    Raises:
        SettingError: If an override does not fit its input or another override, or a range is
            not min <= opt <= max.
    """
    if overrides is not None:
        sizes = _overridden(profile, inputs, sizes, capacities, overrides)
    for field in ("batch", "rows", "num_kept", "num_image_rows"):
        bounds: Bounds = getattr(sizes, field)
        if not bounds[0] <= bounds[1] <= bounds[2]:
            raise SettingError(
                f"Profile {profile!r}: {field} has min {bounds[0]}, opt {bounds[1]}, max "
                f"{bounds[2]}; expected min <= opt <= max. Change --min-shapes, --opt-shapes or "
                "--max-shapes."
            )
    _check_rows(profile, inputs, sizes)
    return {entry["name"]: _range(entry, sizes, capacities) for entry in inputs}


def _range(
    entry: Mapping[str, Any], sizes: ProfileSizes, capacities: Mapping[str, int]
) -> ProfileShapes:
    if entry["name"] in _VALUE_INPUTS:
        low, opt, high = getattr(sizes, entry["name"])
        return ProfileShapes((low,), (opt,), (high,), is_values=True)
    low, opt, high = (
        tuple(_size(entry["shape"], axis, sizes, capacities)[bound] for axis in _axes(entry))
        for bound in range(len(_BOUND_NAMES))
    )
    return ProfileShapes(low, opt, high)


def _axes(entry: Mapping[str, Any]) -> Iterable[int]:
    return range(len(entry["shape"]))


def _size(
    shape: Sequence[int | str], axis: int, sizes: ProfileSizes, capacities: Mapping[str, int]
) -> Bounds:
    """Return the bounds of one axis; symbolic ones are batch, rows or a capacity."""
    size = shape[axis]
    fixed = capacities.get(size) if isinstance(size, str) else size
    if fixed is not None:
        return (fixed, fixed, fixed)
    return sizes.batch if axis == 0 else sizes.rows


def _overridden(
    profile: str,
    inputs: Sequence[Mapping[str, Any]],
    sizes: ProfileSizes,
    capacities: Mapping[str, int],
    overrides: ShapeOverrides,
) -> ProfileSizes:
    found = {
        field: list(getattr(sizes, field))
        for field in ("batch", "rows", "num_kept", "num_image_rows")
    }
    sources: dict[tuple[str, int], str] = {}
    for bound, bound_name in enumerate(_BOUND_NAMES):
        for entry in inputs:
            wanted = getattr(overrides, bound_name).get(entry["name"])
            if wanted is None:
                continue
            for field, size in _sizes_in(profile, entry, wanted, sizes, capacities).items():
                if sizes.has_fixed_rows and field != "batch":
                    continue
                earlier = sources.setdefault((field, bound), entry["name"])
                if earlier != entry["name"] and found[field][bound] != size:
                    raise SettingError(
                        f"Profile {profile!r}: --{bound_name}-shapes give {field} as "
                        f"{found[field][bound]} for {earlier!r} and as {size} for "
                        f"{entry['name']!r}; expected one number."
                    )
                found[field][bound] = size
    _follow_rows(found, set(sources))
    bounds: dict[str, Any] = {field: tuple(values) for field, values in found.items()}
    _check_within(profile, bounds, sizes)
    return dataclasses.replace(sizes, **bounds)


def _follow_rows(found: dict[str, list[int]], given: set[tuple[str, int]]) -> None:
    """Lower numbers of selected rows that were not given to the rows that were.

    Not the most image rows: a profile that cannot take an image is refused, not made.
    """
    for bound, bound_name in enumerate(_BOUND_NAMES):
        for field in _VALUE_INPUTS:
            is_free = (field, bound) not in given
            if is_free and not (field == names.NUM_IMAGE_ROWS and bound_name == "max"):
                found[field][bound] = min(found[field][bound], found["rows"][bound])


def _check_within(profile: str, bounds: Mapping[str, Any], sizes: ProfileSizes) -> None:
    """Refuse maxima above those that caches were planned for."""
    remedies = {"batch": "--max-batch-size", "rows": "--max-input-len"}
    for field, remedy in remedies.items():
        planned = getattr(sizes, field)[-1]
        if bounds[field][-1] > planned:
            raise SettingError(
                f"Profile {profile!r}: --max-shapes give {field} as {bounds[field][-1]}, "
                f"expected at most {planned}. Raise {remedy}."
            )


def _sizes_in(
    profile: str,
    entry: Mapping[str, Any],
    wanted: tuple[int, ...],
    sizes: ProfileSizes,
    capacities: Mapping[str, int],
) -> dict[str, int]:
    """Return what one overriding shape says about sizes."""
    name, shape = entry["name"], entry["shape"]
    expected = "x".join(str(capacities.get(size, size)) for size in shape)
    if len(wanted) != len(shape):
        given = "x".join(map(str, wanted))
        raise SettingError(
            f"Profile {profile!r}: {name!r} got the shape {given}; expected {expected}."
        )
    if name in _VALUE_INPUTS:
        return {name: wanted[0]}
    said = {}
    for axis, size in enumerate(wanted):
        low, _, high = _size(shape, axis, sizes, capacities)
        is_fixed = isinstance(shape[axis], int) or shape[axis] in capacities
        if is_fixed and size != low == high:
            raise SettingError(
                f"Profile {profile!r}: {name!r} got {size} for axis {axis}; the engine has "
                f"{expected}."
            )
        if not is_fixed:
            said["batch" if axis == 0 else "rows"] = size
    return said


def _check_rows(
    profile: str, inputs: Sequence[Mapping[str, Any]], sizes: ProfileSizes
) -> None:
    """Refuse what TensorRT refuses later: more rows selected than there are."""
    present = {entry["name"] for entry in inputs}
    for field in _VALUE_INPUTS:
        for bound, bound_name in enumerate(_BOUND_NAMES):
            selected, rows = getattr(sizes, field)[bound], sizes.rows[bound]
            if field in present and selected > rows:
                raise SettingError(
                    f"Profile {profile!r}: {field} is {selected} at {bound_name}, where only "
                    f"{rows} rows are fed; expected at most as many. Change "
                    f"--{bound_name}-shapes, or raise --max-input-len."
                )
