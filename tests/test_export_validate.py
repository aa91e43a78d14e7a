"""Whatever is changed about an exported decoder's inputs, outputs or weights is found; renaming changes names only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("torch", reason="the cloud extra is not installed")

from onnx import TensorProto, helper

from export_tiny import Runner, export, tiny
from saec.errors import BadInput
from saec.vlm.contract.bundle import DECODER, EMBEDDING, VISION, Bundle, Preprocess, Prompt, Vision, write_bundle
from saec.vlm.contract.signature import Signature, TensorSpec
from saec.vlm.export.decoder import METADATA, build_decoder
from saec.vlm.export.embedding import build_embedding
from saec.vlm.export.graph import Graph
from saec.vlm.export.rename import rename
from saec.vlm.export.validate import stored_signature, validate_bundle, validate_decoder
from saec.vlm.export.weights import open_decoder

PROMPT = [5, 17, 300, 8, 8, 41]
FORMS = {"free": {"n": None}, "fixed, genie": {"n": 4, "style": "genie", "rope": "inputs", "dtype": "float16"}}


@pytest.fixture(scope="module", params=FORMS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Signature]:
    folder = tmp_path_factory.mktemp("decoder")
    tiny().save_pretrained(folder)
    shape, weights = open_decoder(folder)
    signature = Signature(shape=shape, cache=12, **FORMS[request.param])
    return export(folder / "decoder.onnx", signature, weights), signature


@pytest.fixture
def dot(tmp_path: Path) -> tuple[Path, Signature, np.ndarray]:
    tiny().save_pretrained(tmp_path)
    shape, weights = open_decoder(tmp_path)
    signature = Signature(shape=shape, cache=12, n=None)
    table = weights.array("model.embed_tokens.weight")
    return export(tmp_path / "decoder.onnx", signature, weights), signature, table


def problems(graph: onnx.ModelProto, folder: Path, signature: Signature) -> list[tuple[str, str, str]]:
    """Write a changed graph beside the weights and return what validation says about it."""
    file = folder / "changed.onnx"
    file.write_bytes(graph.SerializeToString())
    return [(found.what, found.name, found.kind) for found in validate_decoder(file, signature)]


Ends = "google.protobuf.internal.containers.RepeatedCompositeFieldContainer"
Change = Callable[[Ends, int], set[tuple[str, str]]]


def drop(ends: Ends, at: int) -> set[tuple[str, str]]:
    name = ends[at].name
    del ends[at]
    return {(name, "missing")}


def rename_one(ends: Ends, at: int) -> set[tuple[str, str]]:
    name = ends[at].name
    ends[at].name = f"{name}x"
    return {(name, "missing"), (f"{name}x", "unexpected")}


def double(ends: Ends, at: int) -> set[tuple[str, str]]:
    ends.add().CopyFrom(ends[at])
    return {(ends[at].name, "duplicate")}


def another(ends: Ends, at: int) -> set[tuple[str, str]]:
    ends.add().CopyFrom(ends[at])
    ends[-1].name = "odd"
    return {("odd", "unexpected")}


def retype(ends: Ends, at: int) -> set[tuple[str, str]]:
    ends[at].type.tensor_type.elem_type = TensorProto.INT64
    return {(ends[at].name, "dtype")}


def untyped(ends: Ends, at: int) -> set[tuple[str, str]]:
    ends[at].type.tensor_type.elem_type = TensorProto.UNDEFINED
    return {(ends[at].name, "dtype")}


def flatter(ends: Ends, at: int) -> set[tuple[str, str]]:
    del ends[at].type.tensor_type.shape.dim[0]
    return {(ends[at].name, "shape")}


@pytest.mark.parametrize("change", [drop, rename_one, double, another, retype, untyped, flatter])
@pytest.mark.parametrize("side", ["input", "output"])
def test_any_change_to_any_input_or_output_is_found_and_nothing_else(
    made: tuple[Path, Signature], side: str, change: Change
):
    file, signature = made
    whole = onnx.load(file, load_external_data=False)
    assert validate_decoder(file, signature) == []
    for at in range(len(getattr(whole.graph, side))):
        changed = onnx.ModelProto.FromString(whole.SerializeToString())
        wanted = {(side, *each) for each in change(getattr(changed.graph, side), at)}
        assert set(problems(changed, file.parent, signature)) == wanted


def test_any_other_size_of_any_dimension_is_found(made: tuple[Path, Signature]):
    file, signature = made
    whole = onnx.load(file, load_external_data=False)
    for side, at, dim in dims(whole):
        for key, value in (("dim_value", 7), ("dim_param", "odd"), ("dim_value", 0), ("dim_param", "")):
            changed = onnx.ModelProto.FromString(whole.SerializeToString())
            end = getattr(changed.graph, side)[at]
            setattr(end.type.tensor_type.shape.dim[dim], key, value)
            assert problems(changed, file.parent, signature) == [(side, end.name, "shape")]


def dims(model: onnx.ModelProto) -> Iterator[tuple[str, int, int]]:
    for side in ("input", "output"):
        for at, end in enumerate(getattr(model.graph, side)):
            yield from ((side, at, dim) for dim in range(len(end.type.tensor_type.shape.dim)))


BOTH = {"input", "output"}


@pytest.mark.parametrize(
    ("field", "sides"),
    [("layers", BOTH), ("kv_heads", BOTH), ("head_dim", BOTH), ("hidden_size", {"input"}), ("vocab_size", {"output"})],
)
def test_a_decoder_of_another_configuration_is_found(made: tuple[Path, Signature], field: str, sides: set[str]):
    file, signature = made
    shape = signature.shape.model_copy(update={field: getattr(signature.shape, field) * 2})
    found = validate_decoder(file, signature.model_copy(update={"shape": shape}))
    assert {problem.what for problem in found} == sides


@pytest.mark.parametrize("field", ["heads", "intermediate_size", "rope_theta", "rms_eps"])
def test_figures_that_inputs_and_outputs_do_not_show_are_compared_with_the_decoders_own_record(
    made: tuple[Path, Signature], field: str
):
    file, signature = made
    shape = signature.shape.model_copy(update={field: getattr(signature.shape, field) * 2})
    found = validate_decoder(file, signature.model_copy(update={"shape": shape}))
    assert [(problem.what, problem.name) for problem in found] == [("figure", field)]


@pytest.mark.parametrize("damage", ["cut", "gone", "length", "offset", "outside"])
def test_weights_beside_the_graph_must_be_there_and_whole(made: tuple[Path, Signature], damage: str, tmp_path: Path):
    file, signature = made
    model = onnx.load(file, load_external_data=False)
    weight = max((w for w in model.graph.initializer if w.external_data), key=lambda w: int(w.external_data[1].value))
    entries = {entry.key: entry for entry in weight.external_data}
    data = file.with_suffix(".bin").read_bytes()
    if damage in ("length", "offset"):
        entries[damage].value = {"length": "12", "offset": "-1"}[damage]
    if damage == "outside":
        entries["location"].value = "../decoder.bin"
    if damage != "gone":
        (tmp_path / "decoder.bin").write_bytes(data[:-1] if damage == "cut" else data)
    if damage == "outside":
        with pytest.raises(BadInput, match="outside of the model's folder"):
            problems(model, tmp_path, signature)
        return
    found = problems(model, tmp_path, signature)
    assert ("weight", weight.name, "missing" if damage == "gone" else "weights") in found


@pytest.mark.parametrize("content", [b"", b"\x00garbage", b"{}"])
def test_a_file_that_is_no_model_is_refused(content: bytes, tmp_path: Path):
    (tmp_path / "decoder.onnx").write_bytes(content)
    with pytest.raises(BadInput, match=r"not .*ONNX.*decoder\.onnx"):
        stored_signature(tmp_path / "decoder.onnx")


def test_all_graphs_of_a_bundle_are_held_to_its_record(dot, tmp_path: Path):
    _, signature, table = dot
    folder = tmp_path / "bundle"
    folder.mkdir()
    _, weights = open_decoder(tmp_path)
    export(folder / DECODER, signature, weights)
    pixels = TensorSpec(name="pixel_values", shape=(1, 3, 8, 8), dtype="float32")
    how = Preprocess(side=8, place="corner", fill=(0, 0, 0), mean=(0, 0, 0), std=(1, 1, 1))
    vision = Vision(inputs=(pixels,), tokens=4, preprocess=how)
    about = {"name": "tiny", "family": "llava", "model_id": "tiny", "fingerprint": "f", "precision": "float32"}
    bundle = Bundle(**about, signature=signature, vision=vision, prompt=Prompt(ends=(2,)))
    for tokens, width, wanted in ((4, 96, []), (5, 64, [(EMBEDDING, "inputs_embeds"), (VISION, "image_embeds")])):
        build_embedding(table[:, :width], "float32").save(folder / EMBEDDING)
        graph = Graph("vision")
        shape = TensorSpec(name="image_embeds", shape=(1, tokens, 96), dtype="float32")
        graph.output(shape, graph.op("Identity", graph.input(pixels)))
        graph.save(folder / VISION)
        found = validate_bundle(folder, write_bundle(folder, bundle))
        assert [(each.file, each.name) for each in found] == wanted


# -- rename


def test_renaming_keeps_every_logit_and_state_and_there_and_back_is_the_same_file(dot):
    file, signature, table = dot
    genie = file.parent / "elsewhere" / "genie.onnx"
    assert rename(file, "genie", genie) == [genie, genie.parent / "decoder.bin"]
    other = signature.model_copy(update={"style": "genie"})
    assert stored_signature(genie) == other
    assert validate_decoder(genie, other) == []
    one, two = Runner(file, signature, table), Runner(genie, other, table)
    assert np.array_equal(one.feed(PROMPT), two.feed(PROMPT))
    assert all(np.array_equal(a, b) for a, b in zip(one.past.values(), two.past.values(), strict=True))
    rename(genie, "dot", genie.with_name("dot.onnx"))
    assert genie.with_name("dot.onnx").read_bytes() == file.read_bytes()


def test_renaming_beside_the_original_shares_its_weights(dot):
    file, _, _ = dot
    assert rename(file, "genie", file.with_name("genie.onnx")) == [file.with_name("genie.onnx")]


@pytest.mark.parametrize("where", ["input", "node", "weight"])
def test_a_new_name_that_is_taken_is_refused(dot, where: str):
    file, _, _ = dot
    model = onnx.load(file, load_external_data=False)
    taken = "past_value_1_in"
    if where == "input":
        model.graph.input.append(helper.make_tensor_value_info(taken, TensorProto.FLOAT, [1]))
    elif where == "node":
        model.graph.node.append(helper.make_node("Identity", ["inputs_embeds"], [taken]))
    else:
        model.graph.initializer.append(helper.make_tensor(taken, TensorProto.FLOAT, [1], [0.0]))
    file.write_bytes(model.SerializeToString())
    with pytest.raises(BadInput, match=f"past_key_values.1.value cannot be called {taken}"):
        rename(file, "genie", file.with_name("genie.onnx"))
    assert not file.with_name("genie.onnx").exists()


def test_what_cannot_be_renamed_is_refused_and_nothing_is_overwritten(dot):
    file, _, _ = dot
    with pytest.raises(BadInput, match="no cache tensor is called in style genie"):
        rename(file, "dot", file.with_name("new.onnx"))
    with pytest.raises(BadInput, match="there is a file already"):
        rename(file, "genie", file)
    other = file.parent / "other"
    other.mkdir()
    (other / "decoder.bin").write_text("somebody else's")
    with pytest.raises(BadInput, match=r"there is a file already.*decoder\.bin"):
        rename(file, "genie", other / "genie.onnx")
    assert (other / "decoder.bin").read_text() == "somebody else's"
    with pytest.raises(BadInput, match="cannot be written"):
        rename(file, "genie", file / "genie.onnx")


def test_nothing_stays_of_a_renaming_that_fails(dot, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    file, _, _ = dot
    monkeypatch.setattr("saec.vlm.export.rename.write_atomic", full)
    with pytest.raises(BadInput, match="No space left"):
        rename(file, "genie", file.parent / "new" / "genie.onnx")
    assert not list((file.parent / "new").iterdir())


# -- on the command line


def test_the_command_line_says_what_is_wrong_and_exits_with_1(dot):
    from cli_run import saec

    file, _, _ = dot
    assert saec("vlm", "validate", file).code == 0
    assert saec("vlm", "validate", file, "--config", file.parent, "--json").code == 0
    assert "figure" in saec("vlm", "validate", file, "--cache", 13).out
    assert saec("vlm", "validate", file.with_name("none.onnx")).error()
    found = saec("vlm", "validate", file, "--kv-style", "genie", "--json")
    tree = json.loads(found.out)
    assert found.code == 1
    assert "differs from its signature in 16 places" in found.err
    assert {(each["kind"], each["what"]) for each in tree["problems"]} == {
        (kind, what) for kind in ("missing", "unexpected") for what in ("input", "output")
    }
    assert "past_key_0_in" in saec("vlm", "validate", file, "--kv-style", "genie").out
    assert saec("vlm", "rename", file, "--to", "genie", "--out", file.with_name("g.onnx")).code == 0
    assert saec("vlm", "validate", file.with_name("g.onnx"), "--config", file.parent, "--kv-style", "genie").code == 0


def test_the_command_line_takes_a_file_without_a_signature_when_told_which(dot):
    from cli_run import saec

    file, signature, _ = dot
    _, weights = open_decoder(file.parent)
    fixed = signature.model_copy(update={"n": 4})
    build_decoder(fixed, weights, "float32").save(file)
    assert METADATA not in {entry.key for entry in onnx.load(file, load_external_data=False).metadata_props}
    assert "--config" in saec("vlm", "validate", file).error()
    assert saec("vlm", "validate", file, "--config", file.parent, "--cache", 12, "--ar", 4).code == 0
    assert saec("vlm", "validate", file, "--config", file.parent, "--cache", 12, "--ar", 1).code == 1
