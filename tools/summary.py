"""Print the layers of a network, its parameters, its work and its memory.

    python -m tools.summary --num_classes 20 --width 0.5 --input_shape 416 416

Nothing is computed: the network runs on torch's meta device, which has shapes but no values.
"""

import dataclasses

import torch
import tyro
from torch import Tensor, nn

from nets.blocks import ConvBnAct
from nets.yolo import YoloV4
from utils.errors import run_script

FLOAT_BYTES = 4
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Config:
    num_classes: int = 80  # classes of the detector
    width: float = 1.0  # multiplier of the channels; 1.0 is the full YOLOv4
    depth: float = 1.0  # multiplier of the residual blocks
    input_shape: tuple[int, int] = (416, 416)  # height, width in pixels; multiples of 32


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution (with its BN and activation) or a pool, as run on one image."""

    name: str
    kind: str
    output_shape: tuple[int, ...]  # channels, height, width
    parameters: int
    flops: int  # 2 x multiply-accumulate of the convolution
    activation_bytes: int  # float32 kept for the backward pass


def main() -> None:
    config = tyro.cli(Config, description=__doc__, use_underscores=True)
    model = meta_model(config.num_classes, width=config.width, depth=config.depth)
    layers = trace_layers(model, config.input_shape)
    print(layer_table(layers))
    print()
    print(totals(model, layers, config.input_shape))


def meta_model(num_classes: int, *, width: float = 1.0, depth: float = 1.0) -> YoloV4:
    """A network without values, built at once; raise UserError for bad arguments."""
    with torch.device("meta"):
        return YoloV4(num_classes, width=width, depth=depth).eval()


def trace_layers(model: YoloV4, input_shape: tuple[int, int]) -> list[Layer]:
    """Run a meta model on one image of (height, width) pixels; its layers in the order they run."""
    names = {module: name for name, module in model.named_modules()}
    layers: list[Layer] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        layers.append(describe(names[module], module, output))

    handles = [module.register_forward_hook(record) for module in names if is_layer(module)]
    with torch.inference_mode():
        model(torch.empty(1, 3, *input_shape, device="meta"))
    for handle in handles:
        handle.remove()
    return layers


def is_layer(module: nn.Module) -> bool:
    """A ConvBnAct counts as one layer; a convolution with a bias is one of the bare outputs."""
    bare = isinstance(module, nn.Conv2d) and module.bias is not None
    return bare or isinstance(module, ConvBnAct | nn.MaxPool2d)


def describe(name: str, module: nn.Module, output: Tensor) -> Layer:
    output_bytes = output.numel() * FLOAT_BYTES
    conv, copies = module, 1
    if isinstance(module, ConvBnAct):
        conv = module.conv
        # BN keeps its input, Mish its own, the next layer the result; leaky ReLU works in place.
        copies = 2 if getattr(module.act, "inplace", False) else 3
    kind, flops = "max pool", 0
    if isinstance(conv, nn.Conv2d):
        suffix = f" {type(module.act).__name__}" if conv is not module else ""
        kind = f"conv {conv.kernel_size[0]}x{conv.kernel_size[1]}/{conv.stride[0]}{suffix}"
        flops = 2 * output.numel() * conv.weight[0].numel()
    return Layer(
        name=name,
        kind=kind,
        output_shape=tuple(output.shape[1:]),
        parameters=count_parameters(module),
        flops=flops,
        activation_bytes=copies * output_bytes,
    )


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def convolution_flops(layers: list[Layer]) -> int:
    """Work of one forward pass of one image: 2 x MAC of the convolutions, as darknet counts."""
    return sum(layer.flops for layer in layers)


def layer_table(layers: list[Layer]) -> str:
    """One line per layer: index, name, type, output shape, parameters."""
    name_width = max(len(layer.name) for layer in layers)
    lines = [f"{'':>3}  {'layer':<{name_width}}  {'type':<20}  {'output':<16}  {'parameters':>10}"]
    for index, layer in enumerate(layers):
        shape = " x ".join(map(str, layer.output_shape))
        lines.append(
            f"{index:>3}  {layer.name:<{name_width}}  {layer.kind:<20}  {shape:<16}  "
            f"{layer.parameters:>10,}"
        )
    return "\n".join(lines)


def totals(model: YoloV4, layers: list[Layer], input_shape: tuple[int, int]) -> str:
    """Parameters, work and memory. Training holds weights, gradients, momentum and EMA."""
    weights = sum(tensor.nbytes for tensor in model.state_dict().values()) / MIB
    activations = sum(layer.activation_bytes for layer in layers) / MIB
    return (
        f"YOLOv4, {model.num_classes} classes, width {model.width}, depth {model.depth}, "
        f"input {input_shape[0]} x {input_shape[1]}\n"
        f"parameters   {count_parameters(model):,}\n"
        f"work         {convolution_flops(layers) / 1e9:.2f} BFLOPs an image\n"
        f"weights      {weights:,.0f} MiB in float32\n"
        f"activations  {activations:,.0f} MiB an image in float32, kept for the backward pass\n"
        f"training     about {4 * weights:,.0f} MiB + {activations:,.0f} MiB an image; "
        f"with autocast, or on a CPU,\n{'':13}about half as much an image"
    )


if __name__ == "__main__":
    run_script(main)
