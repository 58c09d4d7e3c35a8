"""The original fork's names for this network's tensors: its .pth files are bare state_dicts."""

from collections.abc import Iterable

FORK_SCALE_XY = (1.0, 1.0, 1.0)
BACKBONE = "backbone."  # name prefix, absent in a file of the backbone alone
MODULES = {
    "backbone.stem": "backbone.conv1",
    "spp.before": "conv1",
    "spp.after": "conv2",
    "top_down_p4.reduce": "upsample1.upsample.0",
    "top_down_p4.lateral": "conv_for_P4",
    "top_down_p4.merge": "make_five_conv1",
    "top_down_p3.reduce": "upsample2.upsample.0",
    "top_down_p3.lateral": "conv_for_P3",
    "top_down_p3.merge": "make_five_conv2",
    "head_p3.conv": "yolo_head3.0",
    "head_p3.output": "yolo_head3.1",
    "bottom_up_p4.down": "down_sample1",
    "bottom_up_p4.merge": "make_five_conv3",
    "head_p4.conv": "yolo_head2.0",
    "head_p4.output": "yolo_head2.1",
    "bottom_up_p5.down": "down_sample2",
    "bottom_up_p5.merge": "make_five_conv4",
    "head_p5.conv": "yolo_head1.0",
    "head_p5.output": "yolo_head1.1",
}
STAGE_MODULES = {
    "down": "downsample_conv",
    "short": "split_conv0",
    "main": "split_conv1",
    "merge": "concat_conv",
}
RESIDUAL_MODULES = {"reduce": "block.0", "expand": "block.1"}


def fork_names(names: Iterable[str]) -> dict[str, str]:
    """Map a network's tensor names, all of them, to the fork's, in the given order."""
    names = list(names)
    residuals = [name.split(".")[:5] for name in names if ".residuals." in name]
    blocks = {stage: int(index) + 1 for _, _, stage, _, index in residuals}  # the last one counts
    return {name: fork_name(name, blocks) for name in names}


def fork_name(name: str, blocks: dict[str, int]) -> str:
    """The fork's name of a tensor; `blocks` maps a stage's index to its number of residuals."""
    if name.startswith("backbone.stages."):
        _, _, stage, module, rest = name.split(".", 4)
        if module == "residuals":
            index, part, rest = rest.split(".", 2)
            inner = f"blocks_conv.{index}.{RESIDUAL_MODULES[part]}"
        elif module == "transition":
            inner = f"blocks_conv.{blocks[stage]}"
        else:
            inner = STAGE_MODULES[module]
        return f"backbone.stages.{stage}.{inner}.{rest}"
    module, part, rest = name.split(".", 2)
    return f"{MODULES[f'{module}.{part}']}.{rest}"
