"""The passes of `pipeline.py` together, on the tiny decoder."""

from __future__ import annotations

import helpers
import numpy as np
import onnx
import onnx.checker
import pytest

from dllava_export import names, pipeline
from dllava_export.passes.base import Pass, run_passes
from dllava_export.passes.graph_io import graph_from_model, model_from_graph
from dllava_export.passes.policies.registry import NO_POLICY, POLICIES
from dllava_export.sparsity import DENSE, Sparsity

SPARSITIES = [
    pytest.param(DENSE, id="none"),
    pytest.param(Sparsity("predictor", 2), id="predictor"),
    pytest.param(Sparsity("random", 1), id="random"),
    pytest.param(Sparsity("uniform", 2), id="uniform"),
    *(
        pytest.param(Sparsity(name, 1, output_text_keep_rate=1.0), id=f"{name}, text kept")
        for name in POLICIES.names()
    ),
    pytest.param(Sparsity("norm", 1, output_text_policy="uniform"), id="norm, text uniform"),
    pytest.param(Sparsity("dart", 1, output_text_policy="predictor"), id="dart, text"),
    pytest.param(Sparsity("uniform", 1, output_text_policy="predictor"), id="uniform, text"),
]
KINDS = [[1, 2, 2, 2, 2, 2, 1, 1], [2, 2, 2, 2, 2, 1], [1, 1, 1]]
NUM_LAYERS = 3


def decoder(sparsity: Sparsity, *more: Pass) -> onnx.ModelProto:
    return transform(pipeline.decoder_passes(sparsity, helpers.predictor_weights()), *more)


def recompute(sparsity: Sparsity, *more: Pass) -> onnx.ModelProto:
    return transform(pipeline.recompute_passes(sparsity, helpers.predictor_weights()), *more)


def transform(passes: list[Pass], *more: Pass) -> onnx.ModelProto:
    graph = graph_from_model(helpers.dense_decoder(NUM_LAYERS))
    run_passes(graph, [*passes, *more])
    return model_from_graph(graph)


def caches(sparsity: Sparsity) -> dict[str, np.ndarray]:
    capacities = [24 if i < sparsity.sparse_layer else 20 for i in range(NUM_LAYERS)]
    capacities = [24] * NUM_LAYERS if sparsity.is_dense else capacities
    return helpers.empty_caches(len(KINDS), capacities)


def prompt(sparsity: Sparsity) -> dict[str, np.ndarray]:
    return helpers.prompt(KINDS, drop=0 if sparsity.is_dense else 3)


def next_row(step: int) -> dict[str, np.ndarray]:
    row = helpers.generated_row(len(KINDS), 0, seed=step)
    return row | {names.POSITION_IDS: np.array([[len(kinds) + step] for kinds in KINDS])}


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("build", ["decoder", "recompute"])
def test_a_second_run_changes_nothing(sparsity: Sparsity, build: str) -> None:
    weights = helpers.predictor_weights()
    passes = getattr(pipeline, f"{build}_passes")(sparsity, weights)
    first = transform(passes)
    graph = graph_from_model(first)
    assert not any(result.modified for result in run_passes(graph, passes))
    assert model_from_graph(graph).SerializeToString() == first.SerializeToString()


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("build", [decoder, recompute])
def test_models_pass_the_checker(sparsity: Sparsity, build) -> None:
    onnx.checker.check_model(build(sparsity), full_check=True)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("build", [decoder, recompute])
def test_every_value_is_declared_as_it_is_inferred(sparsity: Sparsity, build) -> None:
    model = build(sparsity)
    declared = declared_shapes(model)
    assert declared.keys() >= {name for node in model.graph.node for name in node.output}
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    for name, shape in declared_shapes(inferred).items():
        assert len(shape) == len(declared[name]), name
        for dim, known in zip(shape, declared[name], strict=True):
            if isinstance(dim, int) or (
                isinstance(known, str) and dim in declared_dims(model)
            ):
                assert dim == known, (name, shape, declared[name])


def declared_shapes(model: onnx.ModelProto) -> dict[str, list[int | str]]:
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.value_info, *model.graph.output)
    }


def declared_dims(model: onnx.ModelProto) -> set[str]:
    dims = (d for v in model.graph.input for d in v.type.tensor_type.shape.dim)
    return {d.dim_param for d in dims if d.dim_param}


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_lowered_and_portable_model_agree(sparsity: Sparsity) -> None:
    portable = helpers.Runner(decoder(sparsity))
    lowered = helpers.Runner(decoder(sparsity, *pipeline.lowering_passes()))
    feeds = prompt(sparsity) | caches(sparsity)
    first, second = portable(feeds), lowered(feeds)
    rewound = False
    for step in range(6):
        for name in first.keys() - {n for n in first if n.startswith("present")}:
            helpers.assert_close(second[name], first[name])
        row = next_row(step)
        first = portable(row | helpers.carried_over(first))
        second = lowered(row | helpers.carried_over(second))
        rewound |= names.KEEP in first and not first[names.KEEP].all()
    assert rewound == sparsity.has_keep_bit


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_a_batch_keeps_what_its_samples_keep_alone(sparsity: Sparsity) -> None:
    kinds = [[1, 2, 2, 1, 2, 2, 2, 1, 1], [2, 2, 2, 2, 2, 1], [1, 1, 1]]
    runner = helpers.Runner(decoder(sparsity, *pipeline.lowering_passes()))
    drop = 0 if sparsity.is_dense else 3
    feeds = helpers.prompt(kinds, drop)
    capacities = [16] * NUM_LAYERS
    together = runner(feeds | helpers.empty_caches(len(kinds), capacities))
    for sample, row_kinds in enumerate(kinds):
        alone = helpers.prompt([row_kinds], drop)
        rows = feeds[names.INPUTS_EMBEDS][sample : sample + 1, : len(row_kinds)]
        alone |= {names.INPUTS_EMBEDS: rows} | helpers.empty_caches(1, capacities)
        found = runner(alone)
        helpers.assert_close(found[names.LOGITS][0], together[names.LOGITS][sample])
        if not sparsity.is_dense:
            kept = found[names.KEPT_INDICES][0].tolist()
            assert together[names.KEPT_INDICES][sample, : len(kept)].tolist() == kept


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_the_form_for_tensorrt_agrees(sparsity: Sparsity) -> None:
    passes = pipeline.tensorrt_passes({names.FULL: 24, names.SPARSE: 20})
    portable, lowered = (helpers.Runner(decoder(sparsity, *more)) for more in ([], passes))
    feeds = prompt(sparsity) | caches(sparsity)
    first, second = portable(feeds), lowered(feeds)
    for step in range(2):
        for name in first.keys() - {n for n in first if n.startswith("present")}:
            helpers.assert_close(second[name], first[name])
        row = next_row(step)
        first = portable(row | helpers.carried_over(first))
        second = lowered(row | helpers.carried_over(second))


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_recompute_equals_prefill_on_a_prompt(sparsity: Sparsity) -> None:
    feeds = prompt(sparsity) | caches(sparsity)
    cached = helpers.run(decoder(sparsity), feeds)
    again = helpers.run(recompute(sparsity), feeds)
    for name in (names.LOGITS, names.KEPT_INDICES):
        if name in cached:
            helpers.assert_close(again[name], cached[name])


@pytest.mark.parametrize("policy", [*POLICIES.names(), NO_POLICY])
def test_recompute_equals_decode_while_all_text_is_kept(policy: str) -> None:
    sparsity = Sparsity(policy, 1, output_text_keep_rate=1.0)
    cached, again = helpers.Runner(decoder(sparsity)), helpers.Runner(recompute(sparsity))
    kinds, drop = [1, 2, 2, 2, 2, 1], 0 if sparsity.is_dense else 2
    feeds = helpers.prompt([kinds], drop)
    outputs = cached(feeds | helpers.empty_caches(1, [16] * NUM_LAYERS))
    rows = feeds[names.INPUTS_EMBEDS]
    for step in range(3):
        row = helpers.generated_row(1, len(kinds), seed=20 + step)
        outputs = cached(row | helpers.carried_over(outputs))
        kinds = [*kinds, names.GENERATED_TEXT]
        rows = np.concatenate([rows, row[names.INPUTS_EMBEDS]], axis=1)
        whole = helpers.prompt([kinds], drop) | {names.INPUTS_EMBEDS: rows}
        helpers.assert_close(again(whole)[names.LOGITS], outputs[names.LOGITS])


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_graph_inputs_and_outputs_are_public_names(sparsity: Sparsity) -> None:
    known = {v for k, v in vars(names).items() if k.isupper() and isinstance(v, str)}
    known |= {
        f(i, p)
        for f in (names.past, names.present)
        for i in range(NUM_LAYERS)
        for p in ("key", "value")
    }
    known |= {
        f(group) for f in (names.write_index, names.next_write_index) for group in names.GROUPS
    }
    for model in (decoder(sparsity), recompute(sparsity)):
        assert {v.name for v in (*model.graph.input, *model.graph.output)} <= known
        assert model.graph.output[0].name == names.LOGITS
