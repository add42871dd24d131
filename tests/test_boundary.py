from __future__ import annotations

import pytest

import dllava_export
from dllava_export.boundary import expected_errors_only, raises_expected_errors_only
from dllava_export.errors import BundleError, UnexpectedError


@pytest.mark.parametrize(
    "error", [BundleError("damaged"), KeyboardInterrupt(), ZeroDivisionError()]
)
def test_errors_of_ours_and_interrupts_pass(error):
    with (
        pytest.raises(type(error)) as caught,
        expected_errors_only("work", others=(ZeroDivisionError,)),
    ):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            KeyError("x"),
            r"work failed where .* KeyError: 'x' \(test_boundary.py:\d+\). Please",
        ),
        (MemoryError(), "work ran out of memory: no size is known. Use smaller"),
        (OSError(28, "No space left"), r"work met \[Errno 28\] No space left. Check"),
    ],
)
def test_others_are_the_cause_of_an_error_of_ours(error, message):
    with pytest.raises(UnexpectedError, match=message) as caught, expected_errors_only("work"):
        raise error
    assert caught.value.__cause__ is error


def test_decorated_functions():
    @raises_expected_errors_only
    def work(number: int) -> float:
        """Do it."""
        return 1 / number

    assert work(2) == 0.5
    assert work.__doc__ == "Do it."
    with pytest.raises(UnexpectedError, match=r"work failed where .* ZeroDivisionError"):
        work(0)
    with pytest.raises(TypeError, match="missing a required argument"):
        work()


@pytest.mark.parametrize(
    "name", [name for name in dllava_export.__all__ if name[0].islower() and name[0] != "_"]
)
def test_public_functions_raise_nothing_else(name, tmp_path):
    function = getattr(dllava_export, name)
    needs_out = name in ("export", "sparsify", "evaluate", "visualize", "train_predictors")
    arguments = [object(), *([tmp_path / "out.png"] if needs_out else [])]
    arguments += [tmp_path / "out"] if name == "train_predictors" else []
    arguments += ["onnxruntime"] if name == "build" else []
    with pytest.raises(dllava_export.DllavaExportError):
        function(*arguments)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda session, odd: session.generate(odd), id="generate"),
        pytest.param(lambda session, odd: session.generate("w5", image=odd), id="picture"),
        pytest.param(lambda session, odd: session.generate(input_ids=odd), id="ids"),
        pytest.param(lambda session, odd: session.stream(odd, image=None), id="stream"),
        pytest.param(lambda session, odd: session.chat().ask(odd), id="ask"),
        pytest.param(lambda session, odd: session.chat().stream("w5", odd), id="chat picture"),
        pytest.param(lambda session, odd: session.prefill(odd), id="prefill"),
        pytest.param(lambda session, odd: session.prefill([[5]], odd), id="pixels"),
        pytest.param(lambda session, odd: session.decode(odd), id="decode"),
        pytest.param(lambda session, odd: session.extend(odd), id="extend"),
        pytest.param(lambda session, odd: session.recompute(odd), id="recompute"),
        pytest.param(lambda session, odd: session.encode_images(odd), id="encode_images"),
        pytest.param(lambda session, odd: session.embed(odd), id="embed"),
        pytest.param(lambda session, odd: session.rewind(odd), id="rewind"),
        pytest.param(lambda session, odd: session.cache(odd), id="cache"),
    ],
)
@pytest.mark.parametrize(
    "odd", [object(), {"a": 1}, -1, [[[]], []]], ids=lambda odd: type(odd).__name__
)
def test_methods_of_a_session_raise_nothing_else(bundles, call, odd):
    session = bundles.session("mha")
    session.prefill([[5, 6]], max_new_tokens=4)
    with pytest.raises(dllava_export.DllavaExportError) as caught:
        call(session, odd)
    assert not isinstance(caught.value, UnexpectedError)


def test_what_a_caller_raises_in_on_token_passes(bundles):
    def on_token(*_):
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        bundles.session("mha").generate("w5", image=None, on_token=on_token)
